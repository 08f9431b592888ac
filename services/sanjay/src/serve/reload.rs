//! SIGHUP: reads the configuration again, and takes over what can change while a process runs: the namespaces.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use sanjay_runtime::{
    SharedNamespaces,
    config::{Layers, LoadError},
    namespaces::Change,
};

use super::settings::Settings;

/// Reads the settings of a role.
pub(crate) type Load = fn(&Layers) -> Result<Settings, LoadError>;

/// How often the configuration was read again, by what came of it.
#[derive(Debug, Clone)]
pub(crate) struct ReloadMetrics(Family<Labels, Counter<u64, AtomicU64>>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: &'static str,
}

/// What became of one reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Applied,
    Unchanged,
    Refused,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Applied, Self::Unchanged, Self::Refused];

    fn labels(self) -> Labels {
        let outcome = match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        };
        Labels { outcome }
    }
}

impl ReloadMetrics {
    /// Registers them.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let reloads = Family::default();
        for outcome in Outcome::ALL {
            drop(reloads.get_or_create(&outcome.labels()));
        }
        let help = "Times that SIGHUP had the configuration read again: it changed something (applied), it was as before \
                    (unchanged), or it was wrong and what held before stays (refused)";
        registry.register("config_reloads", help, reloads.clone());
        Self(reloads)
    }
}

/// What SIGHUP does.
pub(crate) struct Reload {
    layers: Layers,
    load: Load,
    namespaces: SharedNamespaces,
    metrics: ReloadMetrics,
}

impl Reload {
    pub(crate) fn new(
        layers: Layers,
        load: Load,
        namespaces: SharedNamespaces,
        metrics: ReloadMetrics,
    ) -> Self {
        Self { layers, load, namespaces, metrics }
    }

    /// Reads everything again: the file as it is now, variables and flags as they were at the start. What is wrong
    /// changes nothing.
    pub(crate) fn run(&self) {
        let outcome = self.apply();
        self.metrics.0.get_or_create(&outcome.labels()).inc();
    }

    fn apply(&self) -> Outcome {
        let settings = match (self.load)(&self.layers) {
            Ok(settings) => settings,
            Err(error) => {
                tracing::error!(%error, "SIGHUP: the configuration is wrong, so what held before stays; mend it and send SIGHUP again");
                return Outcome::Refused;
            }
        };
        match self.namespaces.replace(settings.namespaces) {
            Change::None => {
                tracing::info!(
                    "SIGHUP: no namespace has changed; every other setting counts from the next start"
                );
                Outcome::Unchanged
            }
            Change::Some(changes) => {
                tracing::info!(
                    namespaces = changes.join(" "),
                    "SIGHUP: namespaces have changed (+ new, - gone, ~ other settings)"
                );
                Outcome::Applied
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::settings::RouterSettings, *};

    #[test]
    fn what_is_right_is_taken_over_and_what_is_wrong_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sanjay.toml");
        let write = |namespaces: &str| {
            fs::write(&path, format!("[cluster]\nkey = \"0123456789abcdef\"\n{namespaces}")).unwrap();
        };
        write("");
        let variables = [("SANJAY_NAMESPACES__CHAT__HISTORY_TTL_S".to_owned(), "9".to_owned())];
        let load: Load = |layers| layers.load::<RouterSettings>().map(|RouterSettings(settings)| settings);
        let layers = Layers::new().file(&path).variables(variables);
        let namespaces = SharedNamespaces::new(load(&layers).unwrap().namespaces);
        let metrics = ReloadMetrics::register(&mut Registry::default());
        let reload = Reload::new(layers, load, namespaces.clone(), metrics.clone());
        let counts = || Outcome::ALL.map(|outcome| metrics.0.get_or_create(&outcome.labels()).get());
        let chat = || (namespaces.of("chat:1").history_size, namespaces.of("chat:1").history_ttl_s);
        reload.run();
        assert_eq!((chat(), counts()), ((0, 9), [0, 1, 0]));
        write("[namespaces.chat]\nhistory_size = 5");
        reload.run();
        assert_eq!((chat(), counts()), ((5, 9), [1, 1, 0]), "a variable stays above the file");
        for wrong in ["[namespaces.chat]\nhistory_size = 10001", "[namespaces.chat", "[router]\nlease_ms = 1"]
        {
            write(wrong);
            reload.run();
            assert_eq!(chat(), (5, 9), "{wrong}");
        }
        fs::remove_file(&path).unwrap();
        reload.run();
        assert_eq!((chat(), counts()), ((5, 9), [1, 1, 4]));
    }
}
