//! Pipelined calls over one stream: requests are submitted in their order, up to a window of them at once, and
//! results leave in the same order.

use std::pin::Pin;

use futures::{FutureExt, Stream, StreamExt, future};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Most requests of one stream that were taken and not answered.
const WINDOW: usize = 256;

/// The answers of a stream.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers every request with what `submit` makes of it. `submit` is called in the requests' order, and must
/// hand the request on before it returns; the future that it returns only waits. An error of the inbound stream
/// ends the outbound one, after the answers to what came before it. So does `stop`, without an error.
pub(super) fn pipelined<I, O, F>(
    inbound: impl Stream<Item = Result<I, Status>> + Send + 'static,
    stop: CancellationToken,
    mut submit: impl FnMut(I) -> F + Send + 'static,
) -> Answers<O>
where
    I: Send + 'static,
    O: Send + 'static,
    F: Future<Output = O> + Send + 'static,
{
    let answers = inbound
        .take_until(stop.cancelled_owned())
        .map(move |request| match request {
            Ok(request) => submit(request).map(Ok).left_future(),
            Err(status) => future::ready(Err(status)).right_future(),
        })
        .buffered(WINDOW);
    Box::pin(answers)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn slow_items_keep_their_place_and_the_window_is_bounded() {
        let submitted = Arc::new(AtomicUsize::new(0));
        let count = submitted.clone();
        let inbound = futures::stream::iter((0..1_000_u64).map(Ok));
        let mut answers = pipelined(inbound, CancellationToken::new(), move |n| {
            assert_eq!(count.fetch_add(1, Ordering::Relaxed) as u64, n);
            async move {
                let late = std::time::Duration::from_millis(1_000 - n);
                tokio::time::sleep(late).await;
                n
            }
        });
        let mut expected = 0;
        while let Some(answer) = answers.next().await {
            assert_eq!(answer.unwrap(), expected);
            expected += 1;
            assert!(submitted.load(Ordering::Relaxed) as u64 <= expected + WINDOW as u64);
        }
        assert_eq!(expected, 1_000);
    }

    #[tokio::test]
    async fn an_error_ends_it_after_the_answers_before_it() {
        let inbound = futures::stream::iter([Ok(1), Err(Status::aborted("cut"))]);
        let mut answers = pipelined(inbound, CancellationToken::new(), |n: u32| async move { n });
        assert_eq!(answers.next().await.unwrap().unwrap(), 1);
        assert_eq!(answers.next().await.unwrap().unwrap_err().code(), tonic::Code::Aborted);
        assert!(answers.next().await.is_none());
    }
}
