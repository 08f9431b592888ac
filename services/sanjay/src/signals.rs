//! The signals that end a client command.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for an interrupt or a request to end.
pub(crate) async fn interrupted() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
