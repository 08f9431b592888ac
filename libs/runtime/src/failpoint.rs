//! Places at which a test can end the process, to see what the others make of it. Only in builds with debug
//! assertions: elsewhere [`hit`] is nothing.
//!
//! `SANJAY_FAILPOINT=delivery.before_relay=abort` ends a delivery node, as abruptly as SIGKILL does, when it is about
//! to relay what it has just committed.

/// The environment variable that names a place and what happens there.
#[cfg(debug_assertions)]
const VARIABLE: &str = "SANJAY_FAILPOINT";

/// Says that the process is at the place `name`.
#[inline]
pub fn hit(name: &str) {
    #[cfg(debug_assertions)]
    {
        static SET: std::sync::LazyLock<Option<String>> =
            std::sync::LazyLock::new(|| std::env::var(VARIABLE).ok());
        if SET.as_deref().is_some_and(|set| aborts(set, name)) {
            tracing::error!(name, "a fail point ends the process, as {VARIABLE} demands");
            std::process::abort();
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
fn aborts(set: &str, name: &str) -> bool {
    set.rsplit_once('=').is_some_and(|(place, action)| place == name && action == "abort")
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_place_aborts() {
        assert!(aborts("delivery.before_relay=abort", "delivery.before_relay"));
        for set in ["delivery.before_relay", "delivery.before_relay=", "delivery.before=abort", "=abort", ""]
        {
            assert!(!aborts(set, "delivery.before_relay"), "{set}");
        }
        hit("a place that no variable names");
    }
}
