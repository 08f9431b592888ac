//! What the cases took when the baseline was recorded, and under which circumstances.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::callgrind;

/// Instructions of each case, and what else they depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Baseline {
    pub(crate) circumstances: Circumstances,
    /// By the case's name.
    pub(crate) instructions_per_operation: BTreeMap<String, f64>,
}

/// What changes counts without any change of the code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Circumstances {
    /// The processor's instruction set, and whether valgrind shows the program one with AVX2: libraries choose
    /// other code without.
    pub(crate) processor: String,
    pub(crate) rustc: String,
    pub(crate) valgrind: String,
    /// The cargo profile.
    pub(crate) profile: String,
}

impl Baseline {
    /// Without cases, for here and now.
    ///
    /// # Errors
    /// When a tool is missing, or this is a build without optimisation.
    pub(crate) fn here() -> anyhow::Result<Self> {
        anyhow::ensure!(
            !cfg!(debug_assertions),
            "this is a build without optimisation, whose counts mean nothing; run `tests/run gate`"
        );
        let rustc = Command::new("rustc").arg("--version").output().context("cannot run rustc")?;
        let circumstances = Circumstances {
            processor: processor(),
            rustc: String::from_utf8_lossy(&rustc.stdout).trim().to_owned(),
            valgrind: callgrind::version()?,
            profile: "gate".to_owned(),
        };
        Ok(Self { circumstances, instructions_per_operation: BTreeMap::new() })
    }

    /// Notes a case.
    pub(crate) fn set(&mut self, case: &str, instructions: u64, operations: u64) {
        let each = instructions as f64 / operations as f64;
        self.instructions_per_operation.insert(case.to_owned(), (each * 100.0).round() / 100.0);
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or is no baseline.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!("cannot read the baseline {}; record one with `tests/run gate --record`", path.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("{} is no baseline", path.display()))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    let avx2 = if std::arch::is_x86_feature_detected!("avx2") { "with" } else { "without" };
    format!("x86_64 {avx2} avx2")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    std::env::consts::ARCH.to_owned()
}
