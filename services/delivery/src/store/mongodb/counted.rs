//! How much the store holds: counted now and then, because that takes long where there is much.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{database::Database, reader};
use crate::store::Stats;

/// A count of everything is used again for at least so long, and for a hundred times as long as it took, so that
/// counting stays below a hundredth of a server's work for each node.
const COUNT_AT_LEAST: Duration = Duration::from_secs(30);
const COUNT_FACTOR: u32 = 100;

/// How much the store held when it was last counted.
#[derive(Default)]
pub(super) struct Counted {
    pub(super) stats: Stats,
    /// Not counted again before.
    pub(super) again: Option<Instant>,
    pub(super) counting: bool,
}

/// Counts, for whoever asks next.
pub(super) async fn count(database: Database, counted: Arc<Mutex<Counted>>) {
    let began = Instant::now();
    let stats = reader::stats(&database).await;
    let pause = COUNT_AT_LEAST.max(began.elapsed() * COUNT_FACTOR);
    let mut counted = counted.lock();
    counted.counting = false;
    counted.again = Some(Instant::now() + pause);
    match stats {
        Ok(stats) => counted.stats = stats,
        Err(error) => tracing::warn!(%error, "inboxes were not counted"),
    }
}
