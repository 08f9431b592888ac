//! The signals that end a client command.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for an interrupt or a request to end. Both are caught from this call on, not from the first poll of what it
/// returns.
pub(crate) fn interrupted() -> impl Future<Output = ()> {
    let caught = signal(SignalKind::terminate()).and_then(|end| Ok((end, signal(SignalKind::interrupt())?)));
    async move {
        let Ok((mut end, mut interrupt)) = caught else { return std::future::pending().await };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = end.recv() => {}
        }
    }
}
