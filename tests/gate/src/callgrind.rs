//! Runs the cases under callgrind.

use std::{fs, path::PathBuf, process::Command};

use anyhow::Context as _;

/// The function whose instructions are counted; it is in the mangled name as in the plain one.
const PATTERN: &str = "*counted_region*";

/// jemalloc never gives memory back and never tidies its caches: it does so by the clock and by chance, and without
/// it every count repeats exactly.
const MALLOC_CONF: &str = "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,tcache_gc_incr_bytes:1099511627776";

/// The C library copies memory with what every x86-64 processor has, instead of what this one has beside it.
const TUNABLES: &str =
    "glibc.cpu.hwcaps=-AVX2,-AVX2_Usable,-AVX_Fast_Unaligned_Load,-ERMS,-SSSE3,-Fast_Unaligned_Copy";

const NO_VALGRIND: &str = "cannot run valgrind; install Debian's package of that name";

/// The program that does the work.
#[derive(Debug)]
pub(crate) struct Cases {
    program: PathBuf,
}

/// A piece of work.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) operations: u64,
}

impl Cases {
    /// The program that was built beside this one.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("sanjay-gate-cases");
        anyhow::ensure!(program.is_file(), "there is no {}; run `tests/run gate`", program.display());
        Ok(Self { program })
    }

    /// Which cases there are.
    ///
    /// # Errors
    /// When the program does not say.
    pub(crate) fn list(&self) -> anyhow::Result<Vec<Case>> {
        let output = Command::new(&self.program).arg("--list").output().context("the list of cases")?;
        let text = String::from_utf8(output.stdout)?;
        text.lines().map(|line| parse(line).with_context(|| format!("no case: {line}"))).collect()
    }

    /// The instructions of a case.
    ///
    /// # Errors
    /// When valgrind is missing, the case fails, or nothing was counted.
    pub(crate) fn count(&self, case: &str) -> anyhow::Result<u64> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("callgrind.out");
        let output = Command::new("valgrind")
            .arg("--tool=callgrind")
            .arg(format!("--toggle-collect={PATTERN}"))
            .arg(format!("--callgrind-out-file={}", file.display()))
            .arg(&self.program)
            .arg(case)
            // Nothing of the caller's: variables lie on the stack and are read by the C library.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("_RJEM_MALLOC_CONF", MALLOC_CONF)
            .env("GLIBC_TUNABLES", TUNABLES)
            .output()
            .context(NO_VALGRIND)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{case} failed under valgrind:\n{errors}");
        let profile = fs::read_to_string(&file).context("callgrind wrote no profile")?;
        let count = instructions(&profile).filter(|count| *count > 0);
        count
            .with_context(|| format!("callgrind counted nothing in {case}; was {PATTERN} inlined?\n{errors}"))
    }
}

fn parse(line: &str) -> Option<Case> {
    let (name, operations) = line.split_once(' ')?;
    let operations = operations.parse().ok().filter(|operations| *operations > 0)?;
    Some(Case { name: name.to_owned(), operations })
}

/// The sum of a callgrind profile.
fn instructions(profile: &str) -> Option<u64> {
    let totals = profile.lines().find_map(|line| line.strip_prefix("totals:"))?;
    totals.trim().parse().ok()
}

/// Valgrind's own version.
///
/// # Errors
/// When it is missing.
pub(crate) fn version() -> anyhow::Result<String> {
    let output = Command::new("valgrind").arg("--version").output().context(NO_VALGRIND)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_from_a_profile() {
        let profile = "version: 1\nevents: Ir\nsummary: 9\n\nfn=(1) f\n3 9\n\ntotals: 1234\n";
        assert_eq!(instructions(profile), Some(1_234));
        assert_eq!(instructions("events: Ir\n"), None);
    }

    #[test]
    fn the_list_is_read() {
        assert_eq!(parse("a-b 20"), Some(Case { name: "a-b".into(), operations: 20 }));
        assert!(parse("a-b").is_none() && parse("a-b 0").is_none());
    }
}
