//! `sanjay demo notifications`: a back end that sends to users' inboxes, and the users, of whom every second one comes
//! and goes.

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use sanjay_client::{
    Backend, BackendError, BackendOptions, Client, ClientOptions, InboxEvent, InboxStream, MemoryCheckpoint,
    State,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};

use super::{Due, Note, Reports, RunArgs, Said, demo_client, ended, ledger::Ledger, run_name, tell_outages};
use crate::{
    output,
    settings::{AccessArgs, ServerArgs, Signer, explain},
};

/// Events of all users that wait to be written into the books.
const EVENTS: usize = 1_024;

/// How long a user who comes and goes stays.
const ONLINE: Duration = Duration::from_secs(4);

/// How long such a user stays away.
const AWAY: Duration = Duration::from_secs(6);

/// Most messages that may wait for their users; beyond it the back end pauses.
const MAX_WAITING: u64 = 10_000;

/// Pause between two tries to reach the server for the first time.
const RETRY: Duration = Duration::from_secs(1);

const NEWS: [&str; 5] = [
    "your parcel is on its way",
    "you have a new follower",
    "your table is booked",
    "the lift is repaired",
    "rain at six",
];

/// A back end that sends to inboxes, and users who come and go and acknowledge
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many users; every second one comes and goes
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..=200))]
    users: u16,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// What the books are told.
enum Heard {
    Begins(u64),
    Accepted(u64),
    Failed(u64, String),
    Received(u64),
    Ended(anyhow::Error),
}

impl Args {
    /// Runs until a signal or the given time, and then until everything arrived.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let (url, signer) = self.access.resolve()?;
        let options = self.server.options(&self.access.secret.data_dir)?;
        let run = run_name();
        let (events, mut heard) = mpsc::channel(EVENTS);
        let (waiting, backlog) = watch::channel(0);
        let (mut reports, stopped) = Reports::new();
        for number in 0..self.users {
            let user = User {
                options: options_of(&url, number, &signer),
                leaves: number % 2 == 1,
                first: number == 0,
                run: run.clone(),
                events: events.clone(),
            };
            tokio::spawn(user.live(stopped.clone()));
        }
        let sending = Sending { users: self.users, run, pause: self.run.pause(), events, backlog };
        tokio::spawn(sending.run(options, stopped));

        let mut ledger = Ledger::default();
        let (mut said, mut stopping) = (Said::default(), false);
        let over = self.run.over();
        tokio::pin!(over);
        loop {
            tokio::select! {
                event = heard.recv() => match event {
                    Some(event) => note(&mut ledger, event, &mut said)?,
                    None => break,
                },
                () = &mut over, if !stopping => {
                    stopping = true;
                    reports.stop();
                }
                due = reports.next() => match due {
                    Due::Report => {
                        output::line(&self.line("notifications", &ledger, ledger.lost(Instant::now())))?;
                    }
                    Due::End => break,
                },
            }
            let _ = waiting.send(ledger.waiting());
            if stopping && ledger.is_settled() {
                break;
            }
        }
        let lost = ledger.waiting();
        output::line(&self.line("notifications ended", &ledger, lost))?;
        match lost {
            0 => Ok(()),
            lost => bail!("{lost} messages that the server accepted did not reach their users in time"),
        }
    }

    fn line(&self, what: &str, ledger: &Ledger, lost: u64) -> String {
        let Ledger { accepted, received, repeated, failed, .. } = ledger;
        format!(
            "{what}: {} users, sent={accepted} received={received} waiting={} repeated={repeated} \
             failed={failed} lost={lost}",
            self.users,
            ledger.waiting(),
        )
    }
}

/// The name of a user.
fn name(user: u16) -> String {
    format!("demo-user-{}", user + 1)
}

fn options_of(url: &str, user: u16, signer: &Signer) -> ClientOptions {
    let mut options = demo_client(url, &name(user), signer, 64);
    // Kept from one connection to the next, as an application would on its device: nothing is handed out twice.
    options.checkpoint = Arc::new(MemoryCheckpoint::default());
    options.device = "demo".to_owned();
    options
}

/// Who receives.
struct User {
    options: ClientOptions,
    /// Whether the user comes and goes.
    leaves: bool,
    first: bool,
    run: String,
    events: mpsc::Sender<Heard>,
}

impl User {
    /// Receives and acknowledges; once the demo stops, everybody comes back to get what is left.
    async fn live(self, mut stopped: watch::Receiver<bool>) {
        loop {
            let client = match Client::connect(self.options.clone()).await {
                Ok(client) => client,
                Err(error) => return drop(self.events.send(Heard::Ended(error.into())).await),
            };
            let Some(inbox) = client.inbox() else { return };
            if self.first {
                tokio::spawn(tell_outages(client.watch()));
            }
            let stays = async {
                let end = async { drop(stopped.wait_for(|stopped| *stopped).await) };
                let until = Instant::now() + ONLINE;
                if self.leaves && timeout_at(until, end).await.is_err() {
                    return;
                }
                std::future::pending().await
            };
            tokio::select! {
                end = self.receive(inbox, client.watch()) => {
                    if let Some(error) = end {
                        let _ = self.events.send(Heard::Ended(error)).await;
                    }
                    return;
                }
                () = stays => {}
            }
            client.close().await;
            tokio::select! {
                () = sleep(AWAY) => {}
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
        }
    }

    /// Acknowledges what comes. Ends with the books, or with an error when the server does not want this client.
    async fn receive(
        &self,
        mut inbox: InboxStream,
        mut state: watch::Receiver<State>,
    ) -> Option<anyhow::Error> {
        loop {
            let event = tokio::select! {
                event = inbox.next() => event,
                error = ended(&mut state) => return Some(error),
            };
            let delivery = match event {
                Some(InboxEvent::Message(delivery)) => delivery,
                Some(InboxEvent::Discontinuity(_)) => continue,
                // It ends with the client, which says why.
                None => return Some(ended(&mut state).await),
            };
            let number = Note::number(&delivery.message.payload, &self.run);
            if delivery.acker.ack().await.is_err() {
                return Some(ended(&mut state).await);
            }
            if let Some(n) = number {
                self.events.send(Heard::Received(n)).await.ok()?;
            }
        }
    }
}

/// The back end.
struct Sending {
    users: u16,
    run: String,
    pause: Duration,
    events: mpsc::Sender<Heard>,
    /// How many messages wait for their users.
    backlog: watch::Receiver<u64>,
}

impl Sending {
    async fn run(mut self, options: BackendOptions, mut stopped: watch::Receiver<bool>) {
        let connecting = connect(options);
        let backend = tokio::select! {
            backend = connecting => backend,
            _ = stopped.wait_for(|stopped| *stopped) => return,
        };
        let backend = match backend {
            Ok(backend) => backend,
            Err(error) => return drop(self.events.send(Heard::Ended(error)).await),
        };
        let mut ticks = interval(self.pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for n in 0_u64.. {
            let turn = async {
                ticks.tick().await;
                let _ = self.backlog.wait_for(|waiting| *waiting < MAX_WAITING).await;
            };
            tokio::select! {
                () = turn => {}
                _ = stopped.wait_for(|stopped| *stopped) => return,
            }
            let user = name(u16::try_from(n % u64::from(self.users)).unwrap_or(0));
            let text = NEWS[usize::try_from(n).unwrap_or(0) % NEWS.len()].to_owned();
            let note = Note { run: self.run.clone(), n, from: "demo".to_owned(), text };
            let Ok(payload) = note.payload() else { return };
            if self.events.send(Heard::Begins(n)).await.is_err() {
                return;
            }
            let outcome = match backend.send(&[&user], payload, &note.dedupe_key()).await {
                Ok(results) => match results.into_iter().next().map(|result| result.result) {
                    Some(Ok(_)) => Heard::Accepted(n),
                    Some(Err(error)) => Heard::Failed(n, error.message),
                    None => Heard::Failed(n, "the server gave no result".to_owned()),
                },
                Err(error @ BackendError::WrongKey { .. }) => Heard::Ended(explain(error)),
                Err(error) => Heard::Failed(n, error.to_string()),
            };
            if self.events.send(outcome).await.is_err() {
                return;
            }
        }
    }
}

/// Connects to the API; waits for a server that is not there yet, as in a stack that is just being started.
async fn connect(options: BackendOptions) -> anyhow::Result<Backend> {
    let mut said = Said::default();
    loop {
        match Backend::connect(options.clone()).await {
            Ok(backend) => return Ok(backend),
            Err(error @ BackendError::Unreachable { .. }) => said.status(format!("{error}; trying again")),
            Err(error) => return Err(explain(error)),
        }
        sleep(RETRY).await;
    }
}

fn note(ledger: &mut Ledger, event: Heard, said: &mut Said) -> anyhow::Result<()> {
    match event {
        Heard::Begins(n) => ledger.begin(n),
        Heard::Accepted(n) => ledger.accept(n, Instant::now()),
        Heard::Failed(n, why) => {
            ledger.fail(n);
            said.status(format!("a message was not sent: {why}"));
        }
        Heard::Received(n) => ledger.receive(n),
        Heard::Ended(error) => return Err(error),
    }
    Ok(())
}
