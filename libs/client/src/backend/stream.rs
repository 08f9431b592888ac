//! Pipelined requests on one gRPC stream: many are under way, their answers come in order.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use sanjay_proto::delivery::v1;
use sanjay_protocol::{Payload, event::Published};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::{
    Backend, BackendError, Client, SendOptions, UserResult, error::Failure, publish_request, published,
    send_request, user_results,
};

/// Most requests of a stream without an answer; beyond it the caller waits.
const WINDOW: usize = 1_024;

/// A stream of publishes; publications to a channel keep the order of the calls. Dropped, what is under way
/// is still answered. After an error of the stream itself every later call fails: open another, which goes
/// to the next server.
#[derive(Debug)]
pub struct PublishStream(Pipeline<v1::PublishRequest, Published>);

impl PublishStream {
    pub(super) fn open(backend: &Backend) -> Self {
        let call = |mut client: Client, requests: Requests<_>| -> Call<_> {
            Box::pin(async move { client.publish_stream(requests).await })
        };
        Self(Pipeline::open(backend, call, |reply: v1::PublishStreamResponse| match reply.result {
            Some(v1::publish_stream_response::Result::Published(response)) => Ok(published(response)),
            Some(v1::publish_stream_response::Result::Error(error)) => Err(error.into()),
            None => Err(empty()),
        }))
    }

    /// Publishes; waits only while 1,024 requests are under way.
    ///
    /// # Errors
    /// When the stream has ended.
    pub async fn publish(
        &mut self,
        channel: &str,
        payload: Payload,
        dedupe_key: &str,
    ) -> Result<PendingReply<Published>, BackendError> {
        self.0.ask(publish_request(channel, payload, dedupe_key)).await
    }
}

/// A stream of sends; messages to a user keep the order of the calls. Dropped, what is under way is still
/// answered. After an error of the stream itself every later call fails: open another, which goes
/// to the next server.
#[derive(Debug)]
pub struct SendStream(Pipeline<v1::SendRequest, Vec<UserResult>>);

impl SendStream {
    pub(super) fn open(backend: &Backend) -> Self {
        let call = |mut client: Client, requests: Requests<_>| -> Call<_> {
            Box::pin(async move { client.send_stream(requests).await })
        };
        Self(Pipeline::open(backend, call, |reply: v1::SendStreamResponse| match reply.result {
            Some(v1::send_stream_response::Result::Sent(response)) => Ok(user_results(response)),
            Some(v1::send_stream_response::Result::Error(error)) => Err(error.into()),
            None => Err(empty()),
        }))
    }

    /// Sends; waits only while 1,024 requests are under way.
    ///
    /// # Errors
    /// When the stream has ended.
    pub async fn send(
        &mut self,
        users: &[&str],
        payload: Payload,
        dedupe_key: &str,
    ) -> Result<PendingReply<Vec<UserResult>>, BackendError> {
        self.send_with(users, payload, &SendOptions::dedupe(dedupe_key)).await
    }

    /// Like [`SendStream::send`], with everything that a send may ask for.
    ///
    /// # Errors
    /// When the stream has ended.
    pub async fn send_with(
        &mut self,
        users: &[&str],
        payload: Payload,
        options: &SendOptions,
    ) -> Result<PendingReply<Vec<UserResult>>, BackendError> {
        self.0.ask(send_request(users, payload, options)).await
    }
}

fn empty() -> BackendError {
    BackendError::Broken("the server gave an empty answer".to_owned())
}

/// The answer to a request on a stream.
#[derive(Debug)]
pub struct PendingReply<T> {
    answer: oneshot::Receiver<Result<T, BackendError>>,
    ended: Arc<Ended>,
    within: Duration,
    deadline: Instant,
}

impl<T> PendingReply<T> {
    /// Waits for the answer, at most as long as a call may take.
    ///
    /// # Errors
    /// What the server refused, or that the outcome is unknown.
    pub async fn wait(self) -> Result<T, BackendError> {
        match timeout_at(self.deadline, self.answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(self.ended.error()),
            Err(_) => Err(BackendError::Timeout(self.within)),
        }
    }
}

/// Why a stream ended.
#[derive(Debug, Default)]
struct Ended(Mutex<Option<BackendError>>);

impl Ended {
    fn error(&self) -> BackendError {
        let error = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        error.unwrap_or_else(|| BackendError::Broken("the stream ended before the answer".to_owned()))
    }

    fn set(&self, error: BackendError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Who waits for an answer, with the place in the window that the answer frees.
#[derive(Debug)]
struct Waiting<T>(oneshot::Sender<Result<T, BackendError>>, OwnedSemaphorePermit);

type Queue<T> = Arc<Mutex<VecDeque<Waiting<T>>>>;
type Requests<Q> = tonic::Request<ReceiverStream<Q>>;
type Call<R> = BoxFuture<'static, Result<Response<Streaming<R>>, Status>>;

#[derive(Debug)]
struct Pipeline<Q, T> {
    requests: mpsc::Sender<Q>,
    waiting: Queue<T>,
    window: Arc<Semaphore>,
    ended: Arc<Ended>,
    within: Duration,
}

impl<Q: Send + 'static, T: Send + 'static> Pipeline<Q, T> {
    fn open<R: Send + 'static>(
        backend: &Backend,
        call: impl FnOnce(Client, Requests<Q>) -> Call<R>,
        convert: fn(R) -> Result<T, BackendError>,
    ) -> Self {
        let (requests, receiver) = mpsc::channel(WINDOW);
        let waiting = Queue::default();
        let ended = Arc::new(Ended::default());
        let within = backend.options.timeout;
        let (index, server) = backend.servers.current();
        let endpoint = server.endpoint.clone();
        let call = call(server.client.clone(), backend.authorized(ReceiverStream::new(receiver)));
        let servers = Arc::clone(&backend.servers);
        let (queue, end) = (Arc::clone(&waiting), Arc::clone(&ended));
        tokio::spawn(async move {
            if let Err(status) = read(call, &queue, convert).await {
                let failure = Failure::from_status(&status, &endpoint, within);
                if failure.not_sent || failure.unknown {
                    servers.leave(index);
                }
                end.set(failure.error);
            }
            // Dropping who still waits tells them to look at why the stream ended.
            queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Self { requests, waiting, window: Arc::new(Semaphore::new(WINDOW)), ended, within }
    }

    async fn ask(&mut self, request: Q) -> Result<PendingReply<T>, BackendError> {
        let free = timeout(self.within, Arc::clone(&self.window).acquire_owned()).await;
        let place = free.map_err(|_| BackendError::Timeout(self.within))?.map_err(|_| self.ended.error())?;
        // Room first: nothing waits between noting who asked and asking, so that the orders are the same.
        let room = self.requests.reserve().await.map_err(|_| self.ended.error())?;
        let (who, answer) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(Waiting(who, place));
        room.send(request);
        if self.requests.is_closed() {
            // The reader may have cleared the queue before this was noted in it.
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        let deadline = Instant::now() + self.within;
        Ok(PendingReply { answer, ended: Arc::clone(&self.ended), within: self.within, deadline })
    }
}

async fn read<R, T>(
    call: Call<R>,
    waiting: &Mutex<VecDeque<Waiting<T>>>,
    convert: fn(R) -> Result<T, BackendError>,
) -> Result<(), Status> {
    let mut replies = call.await?.into_inner();
    while let Some(reply) = replies.message().await? {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(Waiting(who, _place)) = next else {
            return Err(Status::internal("the server answered what was not asked"));
        };
        // Whoever stopped waiting does not need the answer.
        let _ = who.send(convert(reply));
    }
    Ok(())
}
