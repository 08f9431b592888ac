//! The Rust clients as tests use them: quick to come back, with randomness that a seed repeats.

use std::{env, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use sanjay_client::{Backend, BackendOptions, ClientOptions, Jitter};

use crate::{settings::API_KEY, tokens::Token};

/// The seed of a test's random choices: `SANJAY_SEED`, or a new one. It is printed, so that a failed run can be
/// repeated.
#[must_use]
pub fn seed() -> u64 {
    let given = env::var("SANJAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| StdRng::from_os_rng().random());
    #[expect(clippy::print_stderr, reason = "for whoever repeats a failed test")]
    {
        eprintln!("SANJAY_SEED={seed}");
    }
    seed
}

/// Delays a tenth as long as usual.
fn quick(seed: u64) -> Jitter {
    let jitter = Jitter::seeded(seed);
    Jitter::from_source(move || jitter.fraction() / 10.0)
}

/// A user's client that may do everything.
#[must_use]
pub fn client_options(url: &str, user: &str, seed: u64) -> ClientOptions {
    let mut options = ClientOptions::new(url, Token::of(user).sign());
    options.jitter = quick(seed);
    options
}

/// A back end with the tests' key.
///
/// # Panics
/// When nobody listens.
pub async fn backend(server: &str) -> Backend {
    backend_with(server, API_KEY).await
}

/// A back end with this key.
///
/// # Panics
/// When nobody listens.
pub async fn backend_with(server: &str, key: &str) -> Backend {
    let mut options = BackendOptions::new(server, key);
    options.jitter = quick(0);
    options.timeout = Duration::from_secs(10);
    Backend::connect(options).await.expect("the server listens")
}
