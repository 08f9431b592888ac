//! Configuration files of servers under test.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::TcpListener,
    sync::atomic::{AtomicU32, Ordering},
};

/// The secret of every server under test.
pub const TOKEN_SECRET: &str = "a secret that is known to every test and to nobody else";

/// An API key of every server under test, beside the one that `standalone` makes.
pub const API_KEY: &str = "test-api-key";
const API_KEY_SHA256: &str = "4c806362b613f7496abf284146efd31da90e4b16169fe001841ca17290f427c4";

/// Another back end's key.
pub const OTHER_API_KEY: &str = "other-api-key";
const OTHER_API_KEY_SHA256: &str = "e4c0d6a96d89f0f2ca26312d2715555bd8e470eb47ce309f3125a120a63f7de1";

const CLUSTER_KEY: &str = "a cluster key for tests alone";

/// A configuration: sections of keys with TOML values. The defaults keep a server small and its clients quick to
/// come back.
#[derive(Debug, Clone)]
pub struct Settings(BTreeMap<String, BTreeMap<String, String>>);

impl Default for Settings {
    fn default() -> Self {
        let keys = format!(
            r#"[{{ name = "tests", sha256 = "{API_KEY_SHA256}" }}, {{ name = "others", sha256 = "{OTHER_API_KEY_SHA256}" }}]"#
        );
        Self(BTreeMap::new())
            .set("cluster.key", format!("{CLUSTER_KEY:?}"))
            .set("edge.token_secret", format!("{TOKEN_SECRET:?}"))
            .set("edge.shards", 1)
            .set("edge.reconnect_spread_ms", 50)
            .set("delivery.api_keys", keys)
    }
}

impl Settings {
    /// Sets `section.key` to a TOML value.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        let (section, key) = key.split_once('.').expect("a key has a section");
        self.0.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets `section.key` to a TOML value where it has none.
    #[must_use]
    pub(crate) fn set_default(mut self, key: &str, value: impl ToString) -> Self {
        let (section, key) = key.split_once('.').expect("a key has a section");
        self.0.entry(section.to_owned()).or_default().entry(key.to_owned()).or_insert(value.to_string());
        self
    }

    /// Leaves `section.key` out.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        let (section, key) = key.split_once('.').expect("a key has a section");
        if let Some(section) = self.0.get_mut(section) {
            section.remove(key);
        }
        self
    }

    /// The file's text.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for (section, keys) in &self.0 {
            writeln!(text, "[{section}]").expect("writing to a string does not fail");
            for (key, value) in keys {
                writeln!(text, "{key} = {value}").expect("writing to a string does not fail");
            }
        }
        text
    }
}

/// Below what the system gives to outgoing connections and to port 0, so that nobody takes a port while its
/// server restarts.
const PORTS: std::ops::Range<u32> = 12_000..32_000;

/// A port of 127.0.0.1 on which nobody listens, and that no other call of this process gives.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let size = PORTS.end - PORTS.start;
    // Test binaries that run at once begin at different places.
    let begin = std::process::id().wrapping_mul(131) % size;
    for _ in 0..size {
        let port = PORTS.start + (begin + NEXT.fetch_add(1, Ordering::Relaxed)) % size;
        let port = u16::try_from(port).expect("the range holds ports");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port in {PORTS:?}");
}
