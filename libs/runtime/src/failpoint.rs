//! Places at which a test can end the process, to see what the others make of it. Only in builds with debug
//! assertions: elsewhere [`hit`] is nothing.
//!
//! `SANJAY_FAILPOINT=delivery.before_relay=abort` ends a delivery node, as abruptly as SIGKILL does, when it is about
//! to relay what it has just committed; `delivery.before_relay=abort@500` when it is there for the 500th time. With
//! `delivery.before_ack` it ends when an edge's acks have arrived and none of them is stored, with `delivery.fan_out` when a
//! step of a durable publication is done, with `delivery.fan_out_noted` when its messages are in MongoDB and that is about
//! to be noted.

/// The environment variable that names a place and what happens there.
#[cfg(debug_assertions)]
const VARIABLE: &str = "SANJAY_FAILPOINT";

/// Says that the process is at the place `name`.
#[inline]
pub fn hit(name: &str) {
    #[cfg(debug_assertions)]
    {
        use std::sync::{
            LazyLock,
            atomic::{AtomicU64, Ordering},
        };
        static SET: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(VARIABLE).ok());
        static HITS: AtomicU64 = AtomicU64::new(0);
        let time = SET.as_deref().and_then(|set| aborts(set, name));
        if time.is_some_and(|time| HITS.fetch_add(1, Ordering::Relaxed) + 1 >= time) {
            tracing::error!(name, "a fail point ends the process, as {VARIABLE} demands");
            std::process::abort();
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// At which of its visits to `name`, from 1, the process is to end; `None` when it is not.
#[cfg(debug_assertions)]
fn aborts(set: &str, name: &str) -> Option<u64> {
    let (place, action) = set.rsplit_once('=')?;
    match action.strip_prefix("abort")? {
        "" if place == name => Some(1),
        time if place == name => time.strip_prefix('@')?.parse().ok().filter(|time| *time > 0),
        _ => None,
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_place_aborts() {
        let place = "delivery.before_relay";
        assert_eq!(aborts("delivery.before_relay=abort", place), Some(1));
        assert_eq!(aborts("delivery.before_relay=abort@500", place), Some(500));
        for set in ["delivery.before_relay", "delivery.before_relay=", "delivery.before=abort", "=abort", ""]
        {
            assert_eq!(aborts(set, place), None, "{set}");
        }
        for action in ["abort@", "abort@0", "abort@-1", "abort@x", "abort500", "aborts"] {
            assert_eq!(aborts(&format!("{place}={action}"), place), None, "{action}");
        }
        hit("a place that no variable names");
    }
}
