//! The handle that an application holds.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sanjay_protocol::{
    Command, Payload, Position,
    command::{Hello, Publish},
    event::{Broadcast, Published, Welcome},
    limits::MAX_CREDIT,
    names,
};
use tokio::{
    sync::{Mutex as FairMutex, Notify, broadcast, mpsc, oneshot, watch},
    task::unconstrained,
    time::timeout,
};

use super::{
    backlog::Backlog,
    driver::Driver,
    error::{ClosedError, ConnectionError, PublishError, StartError, SubscribeError},
    inbox::{self, InboxEvent, InboxStream, Settle, Shared},
    machine::{InboxPort, Machine, NewSubscription, NotPublished, Request},
    options::ClientOptions,
    raw,
    subscription::{Subscription, SubscriptionState},
};
use crate::Jitter;

/// Requests that wait for the task; beyond it handles wait.
const REQUESTS: usize = 64;
/// Broadcasts that wait for the slowest reader.
const BROADCASTS: usize = 64;
/// Batches of acks between the settling task and the connection.
const READY: usize = 4;

/// Where a client stands.
#[derive(Debug, Clone)]
pub enum State {
    /// Without a connection; it tries again after `retry_in`.
    Disconnected {
        /// Why; `None` when the server asked the client to come back later.
        error: Option<Arc<ConnectionError>>,
        /// The delay, from when the state was entered.
        retry_in: Duration,
    },
    /// Connecting.
    Connecting,
    /// Connected, with what the server said.
    Connected(Arc<Welcome>),
    /// Ended for good.
    Closed(ClosedError),
}

/// A user's connection that is kept: it reconnects, subscribes again, and hands each inbox message to the
/// application once. Clones share it. It ends with [`close`](Self::close), or once every clone,
/// [`Subscription`] and [`InboxStream`] is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Inner {
    state: watch::Receiver<State>,
    features: watch::Receiver<Vec<String>>,
    broadcasts: broadcast::Sender<Broadcast>,
    settle: mpsc::Sender<Settle>,
    closing: Arc<Notify>,
    inbox: Mutex<Option<mpsc::Receiver<InboxEvent>>>,
    next_subscription: AtomicU64,
    /// Whose turn it is to hand a publish over.
    publishing: FairMutex<()>,
    buffer: usize,
    request_timeout: Duration,
}

impl Client {
    /// Loads the device's state and starts to connect; [`connected`](Self::connected) waits for the result.
    ///
    /// # Errors
    /// When the address or an option is of no use, or the checkpoint cannot be loaded.
    pub async fn connect(options: ClientOptions) -> Result<Self, StartError> {
        raw::check_url(&options.url).map_err(StartError::Url)?;
        let hello = Hello {
            token: None,
            device: options.device.clone(),
            client: options.client.clone(),
            credit: options.credit,
        };
        Command::Hello(hello).check().map_err(StartError::Option)?;
        let shared = Arc::new(Shared::new(options.checkpoint.load().await?));
        // Credit bounds what is unacked; a few more are for discontinuities between them.
        let room = options.credit.unwrap_or(MAX_CREDIT).clamp(1, MAX_CREDIT) as usize;
        let (inbox_events, inbox) = mpsc::channel(room + 4);
        let (settle, settle_requests) = mpsc::channel(room);
        let (ready, settled) = mpsc::channel(READY);
        let (requests, requested) = mpsc::channel(REQUESTS);
        let (state_sender, state) = watch::channel(State::Connecting);
        let (features_sender, features) = watch::channel(Vec::new());
        let broadcasts = broadcast::Sender::new(BROADCASTS);
        let closing = Arc::new(Notify::new());
        let checkpoint = Arc::clone(&options.checkpoint);
        tokio::spawn(inbox::settle(settle_requests, Arc::clone(&shared), checkpoint, ready));
        let jitter: Jitter = options.jitter.clone();
        let port = InboxPort { shared, settle: settle.clone() };
        let machine =
            Machine::new(port, Backlog::new(inbox_events), jitter, features_sender, broadcasts.clone());
        let (buffer, request_timeout) = (options.buffer.max(1), options.request_timeout);
        let driver = Driver::new(options, state_sender, requested, settled, Arc::clone(&closing), machine);
        tokio::spawn(driver.run());
        let inbox = Mutex::new(Some(inbox));
        let inner = Inner {
            state,
            features,
            broadcasts,
            settle,
            closing,
            inbox,
            next_subscription: AtomicU64::new(0),
            publishing: FairMutex::default(),
            buffer,
            request_timeout,
        };
        Ok(Self { inner: Arc::new(inner), requests })
    }

    /// What back ends say to every client, from now on. Whoever reads too slowly misses some, and hears how many.
    #[must_use]
    pub fn broadcasts(&self) -> broadcast::Receiver<Broadcast> {
        self.inner.broadcasts.subscribe()
    }

    /// Where the client stands now.
    #[must_use]
    pub fn state(&self) -> State {
        self.inner.state.borrow().clone()
    }

    /// Observes where the client stands.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
    }

    /// Observes what the server says is reduced: `inbox`, `channels`.
    #[must_use]
    pub fn features(&self) -> watch::Receiver<Vec<String>> {
        self.inner.features.clone()
    }

    /// Waits until the client is connected; as long as servers are away this waits for them.
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn connected(&self) -> Result<Arc<Welcome>, ClosedError> {
        let mut state = self.watch();
        match state.wait_for(|state| matches!(state, State::Connected(_) | State::Closed(_))).await.as_deref()
        {
            Ok(State::Connected(welcome)) => Ok(Arc::clone(welcome)),
            Ok(State::Closed(error)) => Err(error.clone()),
            _ => Err(ClosedError::ByApplication),
        }
    }

    fn closed(&self) -> ClosedError {
        match self.state() {
            State::Closed(error) => error,
            _ => ClosedError::ByApplication,
        }
    }

    /// Subscribes to a channel now and after every reconnect. Returns at once; the subscription tells when it
    /// is in force.
    ///
    /// # Errors
    /// When the name is not one, this client has a subscription to the channel or too many, or has ended.
    pub async fn subscribe(&self, channel: &str) -> Result<Subscription, SubscribeError> {
        self.subscribe_at(channel, None).await
    }

    /// The same, for an application that has seen the channel up to `position` already: what it missed since comes first,
    /// where the channel keeps it; otherwise a gap or a discontinuity says that it does not come.
    ///
    /// # Errors
    /// As for [`Self::subscribe`], and when the position cannot be one.
    pub async fn subscribe_from(
        &self,
        channel: &str,
        position: Position,
    ) -> Result<Subscription, SubscribeError> {
        position.check("position").map_err(SubscribeError::Refused)?;
        self.subscribe_at(channel, Some(position)).await
    }

    async fn subscribe_at(
        &self,
        channel: &str,
        position: Option<Position>,
    ) -> Result<Subscription, SubscribeError> {
        names::check("channel", channel).map_err(|error| SubscribeError::Refused(error.into()))?;
        let channel = channel.to_owned();
        let (events_sender, events) = mpsc::channel(self.inner.buffer);
        let (state_sender, state) = watch::channel(SubscriptionState::Subscribing);
        let (accepted, acceptance) = oneshot::channel();
        let id = self.inner.next_subscription.fetch_add(1, Ordering::Relaxed);
        let new = NewSubscription {
            id,
            channel: channel.clone(),
            events: events_sender,
            state: state_sender,
            accepted,
            position,
        };
        self.requests.send(Request::Subscribe(new)).await.map_err(|_| self.closed())?;
        acceptance.await.unwrap_or_else(|_| Err(self.closed().into()))?;
        Ok(Subscription { id, channel, events, state, requests: self.requests.clone() })
    }

    /// Ends the channel's subscription, if there is one; its events end.
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn unsubscribe(&self, channel: &str) -> Result<(), ClosedError> {
        let request = Request::Unsubscribe { channel: channel.to_owned(), id: None };
        self.requests.send(request).await.map_err(|_| self.closed())
    }

    /// Publishes to a channel; waits for a connection if there is none. With a `dedupe` key (at most 200 bytes,
    /// may be empty) it is repeated after a lost connection, without doubling the message. Publishes that are
    /// started in order by one task keep their order.
    ///
    /// # Errors
    /// When the edge refuses it, no answer comes within the request timeout, or the client has ended.
    pub async fn publish(
        &self,
        channel: &str,
        payload: Payload,
        dedupe: &str,
    ) -> Result<Published, PublishError> {
        names::check("channel", channel).map_err(|error| PublishError::Refused(error.into()))?;
        names::check_optional("dedupe", dedupe).map_err(|error| PublishError::Refused(error.into()))?;
        // Also checks that the JSON of a payload is JSON, on which the codec relies.
        let payload = Payload::from_backend(Some(payload.into()));
        let payload = payload.map_err(|error| PublishError::Refused(error.into()))?;
        let publish = Publish { channel: channel.to_owned(), payload, dedupe: dedupe.to_owned() };
        let within = self.inner.request_timeout;
        timeout(within, self.publish_until_answered(publish))
            .await
            .unwrap_or(Err(PublishError::Timeout(within)))
    }

    async fn publish_until_answered(&self, publish: Publish) -> Result<Published, PublishError> {
        loop {
            let (answer, answered) = oneshot::channel();
            let request = Request::Publish(publish.clone(), answer);
            // Turns are given in the order in which publishes were first polled, which the runtime's budget must
            // not change; the waits below would be over in any order.
            let turn = unconstrained(self.inner.publishing.lock()).await;
            self.connected().await?;
            self.requests.send(request).await.map_err(|_| self.closed())?;
            drop(turn);
            match answered.await {
                Ok(Ok(published)) => return Ok(published),
                Ok(Err(NotPublished::Offline)) => {}
                Ok(Err(NotPublished::Failed(PublishError::Disconnected))) if !publish.dedupe.is_empty() => {}
                Ok(Err(NotPublished::Failed(error))) => return Err(error),
                Err(_) => return Err(self.closed().into()),
            }
        }
    }

    /// The user's inbox; `None` when it was taken before, as there is one stream for a client.
    #[must_use]
    pub fn inbox(&self) -> Option<InboxStream> {
        let events = self.inner.inbox.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(InboxStream { events, _requests: self.requests.clone() })
    }

    /// Ends the client: stores and sends the acks that were given, waits up to 5 s until the server has them
    /// durable, and closes the connection.
    pub async fn close(&self) {
        let (done, flushed) = oneshot::channel();
        if self.inner.settle.send(Settle::Flush(done)).await.is_ok() {
            // Without an answer the settling task has ended, and with it the client.
            let _ = flushed.await;
        }
        self.inner.closing.notify_one();
        let _ = self.watch().wait_for(|state| matches!(state, State::Closed(_))).await;
    }
}
