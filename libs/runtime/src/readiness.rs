//! Whether a process can serve: each part raises its own flag, and the process is ready when all are up.

use std::sync::Arc;

use tokio::sync::watch;

/// The flags of a process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<watch::Sender<Vec<(&'static str, bool)>>>);

impl Readiness {
    /// No flags yet; without any, the process counts as ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a flag, which starts down. Two flags may have the same name.
    #[must_use = "the process is not ready until the flag is set"]
    pub fn register(&self, name: &'static str) -> ReadinessFlag {
        let mut index = 0;
        self.0.send_modify(|flags| {
            index = flags.len();
            flags.push((name, false));
        });
        ReadinessFlag { readiness: self.clone(), index }
    }

    /// Whether every flag is up.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        all_up(&self.0.borrow())
    }

    /// The names of the flags that are down.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        self.0.borrow().iter().filter(|(_, up)| !up).map(|(name, _)| *name).collect()
    }

    /// Waits until every flag that is then registered is up.
    pub async fn wait_ready(&self) {
        let mut changes = self.0.subscribe();
        changes.wait_for(|flags| all_up(flags)).await.expect("`self` holds the sender");
    }
}

fn all_up(flags: &[(&'static str, bool)]) -> bool {
    flags.iter().all(|(_, up)| *up)
}

/// One part's say in readiness. Clones are the same flag.
#[derive(Debug, Clone)]
pub struct ReadinessFlag {
    readiness: Readiness,
    index: usize,
}

impl ReadinessFlag {
    /// Raises or lowers the flag.
    pub fn set(&self, up: bool) {
        self.readiness.0.send_if_modified(|flags| {
            let flag = &mut flags[self.index].1;
            std::mem::replace(flag, up) != up
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_is_when_every_flag_is_up() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let (store, bus) = (readiness.register("store"), readiness.register("bus"));
        store.set(true);
        assert!(!readiness.is_ready());
        assert_eq!(readiness.missing(), ["bus"]);
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.wait_ready().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        bus.set(true);
        waiting.await.unwrap();
        store.set(false);
        assert_eq!(readiness.missing(), ["store"]);
    }
}
