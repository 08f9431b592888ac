//! The clients of an inbox bench: each receives its user's messages and acknowledges them.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use sanjay_client::{
    ConnectionError, RawConnection,
    protocol::{CloseCode, Command, Envelope, Event, EventEnvelope, command::Ack, event::Inbox},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use super::Shared;
use crate::{
    commands::bench::{
        edge::{pong, stopped},
        progress,
        stamp::Stamp,
    },
    signals::interrupted,
};

/// Clients that connect at once.
const OPENING: usize = 64;

/// Most messages that one ack of the bench stands for.
const ACK_BATCH: usize = 64;

/// How long the last ack may take.
const ACK_PATIENCE: Duration = Duration::from_secs(10);

/// Connects a client for each user and has it receive.
pub(super) async fn connect(
    shared: &Arc<Shared>,
    stop: &watch::Receiver<bool>,
    clients: &mut JoinSet<HashSet<u64>>,
) -> anyhow::Result<()> {
    let edge = &shared.edge;
    let open = |n: u64| async move {
        let opened = edge.open(&edge.name("user", n), None).await?;
        anyhow::Ok((n, opened.connection))
    };
    let opened = AtomicU64::new(0);
    let all = async {
        let mut connections = stream::iter(0..shared.users).map(open).buffer_unordered(OPENING);
        while let Some((n, connection)) = connections.try_next().await? {
            opened.fetch_add(1, Ordering::Relaxed);
            let (shared, stop) = (Arc::clone(shared), stop.clone());
            clients.spawn(async move { shared.client(n as usize, connection, stop).await });
        }
        anyhow::Ok(())
    };
    let all = async {
        tokio::select! {
            all = all => all,
            () = interrupted() => anyhow::bail!("interrupted before anything was measured"),
        }
    };
    progress::show("connecting", shared.users, || opened.load(Ordering::Relaxed), all).await
}

impl Shared {
    /// The client of user `n`: receives and acknowledges until `stop`. Gives the messages that it got.
    async fn client(
        &self,
        n: usize,
        mut connection: RawConnection,
        mut stop: watch::Receiver<bool>,
    ) -> HashSet<u64> {
        let mut inbox = Received::default();
        tokio::select! {
            error = self.read(n, &mut connection, &mut inbox) => {
                self.disconnected.fetch_add(1, Ordering::Relaxed);
                self.problems.note(error);
            }
            () = stopped(&mut stop) => {
                match timeout(ACK_PATIENCE, settle(&mut connection, inbox.last)).await {
                    Ok(Ok(())) => {
                        self.acked.fetch_add(inbox.messages.len() as u64, Ordering::Relaxed);
                    }
                    Ok(Err(error)) => self.problems.note(format!("the last ack: {error}")),
                    Err(_) => self.problems.note("the last ack had no answer in time"),
                }
                connection.close(CloseCode::Done).await;
            }
        }
        inbox.messages
    }

    async fn read(&self, n: usize, connection: &mut RawConnection, inbox: &mut Received) -> ConnectionError {
        loop {
            let mut next = Some(connection.next().await);
            let mut unacked = None;
            // What came together is acknowledged together.
            for _ in 0..ACK_BATCH {
                let envelope = match next.take() {
                    Some(Ok(envelope)) => envelope,
                    Some(Err(error)) => return error,
                    None => break,
                };
                match envelope.event {
                    Event::Inbox(message) => {
                        let (first, last) = *unacked.get_or_insert((message.seq, message.seq));
                        unacked = Some((first.min(message.seq), last.max(message.seq)));
                        self.take(n, &message, inbox);
                    }
                    Event::Ping => {
                        if let Err(error) = pong(connection).await {
                            return error;
                        }
                    }
                    Event::Error(error) => self.problems.note(error.message),
                    Event::Degraded(degraded) if !degraded.features.is_empty() => {
                        self.problems.note(format!("degraded: {}", degraded.features.join(", ")));
                    }
                    _ => {}
                }
                next = connection.next().now_or_never();
            }
            if let Some(range) = unacked {
                let ack = Envelope {
                    id: None,
                    command: Command::Ack(Ack { ranges: vec![range], trace: String::new() }),
                };
                if let Err(error) = connection.send(ack).await {
                    return error;
                }
            }
        }
    }

    fn take(&self, n: usize, message: &Inbox, inbox: &mut Received) {
        let Some(stamp) = Stamp::read(&message.payload, &self.edge.run) else { return };
        if !inbox.messages.insert(stamp.index) {
            self.repeated.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if message.seq != inbox.last + 1 {
            self.out_of_order.fetch_add(1, Ordering::Relaxed);
        }
        inbox.last = inbox.last.max(message.seq);
        if stamp.measured {
            self.receive.record(n, (self.start + stamp.due).elapsed());
        }
        self.received.add();
    }
}

/// What a client got.
#[derive(Debug, Default)]
struct Received {
    messages: HashSet<u64>,
    /// The newest seq; a user of a run begins with an empty inbox.
    last: u64,
}

/// Acknowledges everything once more, and waits until that is durable.
async fn settle(connection: &mut RawConnection, last: u64) -> Result<(), ConnectionError> {
    if last == 0 {
        return Ok(());
    }
    let ack = Command::Ack(Ack { ranges: vec![(1, last)], trace: String::new() });
    connection.send(Envelope { id: Some(1), command: ack }).await?;
    loop {
        match connection.next().await? {
            EventEnvelope { id: Some(1), event: Event::Ok(_) } => return Ok(()),
            EventEnvelope { id: Some(1), event: Event::Error(error) } => {
                return Err(ConnectionError::Protocol(error.message));
            }
            EventEnvelope { event: Event::Ping, .. } => pong(connection).await?,
            _ => {}
        }
    }
}
