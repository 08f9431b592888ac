//! `sanjay check-config`: reads a configuration as a server would, and says what is wrong with it.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::{
    output,
    serve::settings::{DeliverySettings, EdgeSettings, RouterSettings, StandaloneSettings, layers},
};

/// `sanjay check-config`: check a configuration file and the environment without starting anything
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// TOML file; without one, defaults and SANJAY_… variables are checked
    file: Option<PathBuf>,
    /// Which process it is for; may be given several times
    #[arg(long = "for", value_name = "ROLE", value_enum, default_value = "standalone")]
    roles: Vec<RoleName>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleName {
    Standalone,
    Edge,
    Router,
    Delivery,
}

impl Args {
    /// Checks for each role.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let layers = layers(self.file.as_deref())?;
        for role in self.roles {
            match role {
                RoleName::Standalone => drop(layers.load::<StandaloneSettings>()?),
                RoleName::Edge => drop(layers.load::<EdgeSettings>()?),
                RoleName::Router => drop(layers.load::<RouterSettings>()?),
                RoleName::Delivery => drop(layers.load::<DeliverySettings>()?),
            }
        }
        output::line("the configuration is good")
    }
}
