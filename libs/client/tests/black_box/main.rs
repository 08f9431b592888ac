//! The clients against small servers that speak the protocols and do what a test says.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in what its servers check too")]

mod backend;
mod backpressure;
mod close_codes;
mod inbox;
mod publish;
mod reconnect;
mod server;
mod tokens;

use std::time::Duration;

/// Long enough for a loaded machine; what hangs fails here.
const LIMIT: Duration = Duration::from_secs(20);

/// Awaits what has to happen soon.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("within the limit of a test")
}
