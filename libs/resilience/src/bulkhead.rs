//! The bulkhead: so many calls under way, so many that wait, and no more.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Everything is taken, the places to wait too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many calls are under way or wait")]
pub struct Full;

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    _place: OwnedSemaphorePermit,
    _running: OwnedSemaphorePermit,
}

/// Bounds the calls that are under way and those that wait. Who waits gets a turn in order.
#[derive(Debug, Clone)]
pub struct Bulkhead {
    /// Of those under way and those that wait, together.
    places: Arc<Semaphore>,
    running: Arc<Semaphore>,
}

impl Bulkhead {
    /// At most `running` calls at once, at least 1, and `waiting` more that wait.
    #[must_use]
    pub fn new(running: usize, waiting: usize) -> Self {
        let running = running.max(1);
        Self {
            places: Arc::new(Semaphore::new(running.saturating_add(waiting).min(Semaphore::MAX_PERMITS))),
            running: Arc::new(Semaphore::new(running)),
        }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// At once, when as many wait as may.
    pub async fn enter(&self) -> Result<Permit, Full> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Full)?;
        let running = Arc::clone(&self.running).acquire_owned().await.map_err(|_| Full)?;
        Ok(Permit { _place: place, _running: running })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn beyond_its_places_it_refuses_at_once() {
        let bulkhead = Bulkhead::new(1, 1);
        let Poll::Ready(Ok(running)) = poll(pin!(bulkhead.enter())) else { panic!("the first runs") };
        let mut second = pin!(bulkhead.enter());
        assert!(poll(second.as_mut()).is_pending(), "the second waits");
        assert!(matches!(poll(pin!(bulkhead.enter())), Poll::Ready(Err(Full))), "the third is refused");
        drop(running);
        let Poll::Ready(Ok(_running)) = poll(second.as_mut()) else { panic!("the second has its turn") };
        assert!(poll(pin!(bulkhead.enter())).is_pending(), "there is a place to wait again");
    }

    #[test]
    fn who_stops_waiting_gives_the_place_back() {
        let bulkhead = Bulkhead::new(1, 1);
        let Poll::Ready(Ok(running)) = poll(pin!(bulkhead.enter())) else { panic!("the first runs") };
        for _ in 0..3 {
            let mut waiting = Box::pin(bulkhead.enter());
            assert!(poll(waiting.as_mut()).is_pending());
        }
        drop(running);
        assert!(poll(pin!(bulkhead.enter())).is_ready());
    }
}
