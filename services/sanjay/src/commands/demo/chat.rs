//! `sanjay demo chat`: people who talk in a few rooms, each over a WebSocket of their own.

use std::time::Duration;

use anyhow::{anyhow, bail};
use sanjay_client::{
    ChannelEvent, Client, State, Subscription,
    protocol::event::{Gap, Published},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Due, Note, Reports, RunArgs, Said, demo_client, ended,
    rooms::{Position, Rooms},
    run_name, tell_outages,
};
use crate::{output, settings::AccessArgs};

/// Events of all people that wait to be written into the books.
const EVENTS: usize = 1_024;

const NAMES: [&str; 8] = ["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal"];
const LINES: [&str; 6] =
    ["good morning", "who has the tickets?", "on my way", "see you at eight", "coffee?", "done, have a look"];

/// People who talk in a few rooms over WebSocket, and count what they hear
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many people
    #[arg(long, value_name = "N", default_value = "6", value_parser = clap::value_parser!(u16).range(1..=200))]
    people: u16,
    /// In how many rooms; each person is in one
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(1..=50))]
    rooms: u16,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    edge: AccessArgs,
}

/// What the books are told.
enum Heard {
    Begins { n: u64, room: usize },
    Accepted { n: u64, at: Position },
    Failed { n: u64, why: String },
    Received { person: usize, n: u64 },
    Told { person: usize, at: Position },
    Ended(anyhow::Error),
}

impl Args {
    /// Runs until a signal or the given time, and then until everything arrived.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let (url, signer) = self.edge.resolve()?;
        let run = run_name();
        let room = |person: usize| person % usize::from(self.rooms);
        let (events, mut heard) = mpsc::channel(EVENTS);
        let (mut reports, stopped) = Reports::new();
        let mut clients = Vec::new();
        for person in 0..usize::from(self.people) {
            let client = Client::connect(demo_client(&url, &name(person), &signer, 0)).await?;
            let subscription = client.subscribe(&channel(room(person))).await?;
            tokio::spawn(listen(person, run.clone(), subscription, client.watch(), events.clone()));
            if person == 0 {
                tokio::spawn(tell_outages(client.watch()));
            }
            clients.push(client);
        }
        let people: Vec<(Client, usize)> =
            clients.iter().cloned().zip((0..clients.len()).map(room)).collect();
        tokio::spawn(talk(people, run, self.run.pause(), stopped, events));

        let mut rooms = Rooms::new((0..clients.len()).map(room));
        let (mut said, mut stopping) = (Said::default(), false);
        let over = self.run.over();
        tokio::pin!(over);
        loop {
            tokio::select! {
                event = heard.recv() => match event {
                    Some(event) => note(&mut rooms, event, &mut said)?,
                    None => break,
                },
                () = &mut over, if !stopping => {
                    stopping = true;
                    reports.stop();
                }
                due = reports.next() => match due {
                    Due::Report => output::line(&self.line("chat", &rooms))?,
                    Due::End => break,
                },
            }
            rooms.settle(Instant::now());
            if stopping && rooms.is_settled() {
                break;
            }
        }
        rooms.end(|person| matches!(clients[person].state(), State::Connected(_)));
        for client in clients {
            client.close().await;
        }
        output::line(&self.line("chat ended", &rooms))?;
        match rooms.lost {
            0 => Ok(()),
            lost => bail!("{lost} receptions of accepted messages are missing, and nobody was told of a gap"),
        }
    }

    fn line(&self, what: &str, rooms: &Rooms) -> String {
        let Rooms { accepted, received, missed, lost, failed, .. } = rooms;
        format!(
            "{what}: {} of {} people in {} rooms, sent={accepted} received={received} missed={missed} \
             failed={failed} lost={lost}",
            rooms.present(),
            self.people,
            self.rooms,
        )
    }
}

/// The name of a room's channel.
fn channel(room: usize) -> String {
    format!("demo:room-{}", room + 1)
}

/// The name of a person.
fn name(person: usize) -> String {
    match person / NAMES.len() {
        0 => format!("demo-{}", NAMES[person]),
        round => format!("demo-{}-{}", NAMES[person % NAMES.len()], round + 1),
    }
}

/// Writes down what a person hears, until the client ends.
async fn listen(
    person: usize,
    run: String,
    mut subscription: Subscription,
    mut state: watch::Receiver<State>,
    events: mpsc::Sender<Heard>,
) {
    loop {
        let event = tokio::select! {
            event = subscription.next() => event,
            closed = ended(&mut state) => {
                let _ = events.send(Heard::Ended(closed)).await;
                return;
            }
        };
        let heard = match event {
            Some(ChannelEvent::Message(message)) => {
                Note::number(&message.payload, &run).map(|n| Heard::Received { person, n })
            }
            Some(
                ChannelEvent::Subscribed { epoch, offset } | ChannelEvent::Discontinuity { epoch, offset },
            ) => Some(Heard::Told { person, at: Position { epoch, offset } }),
            Some(ChannelEvent::Gap(Gap { epoch, to, .. })) => {
                Some(Heard::Told { person, at: Position { epoch, offset: to } })
            }
            Some(ChannelEvent::Unsubscribed(error)) => Some(Heard::Ended(anyhow!("{}", error.message))),
            // It ends with the client, which says why.
            None => Some(Heard::Ended(ended(&mut state).await)),
        };
        if let Some(heard) = heard
            && events.send(heard).await.is_err()
        {
            return;
        }
    }
}

/// Has one person after the other say something, until it is told to stop.
async fn talk(
    people: Vec<(Client, usize)>,
    run: String,
    pause: Duration,
    mut stopped: watch::Receiver<bool>,
    events: mpsc::Sender<Heard>,
) {
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for n in 0_u64.. {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        let index = usize::try_from(n).unwrap_or(0) % people.len();
        let (client, room) = &people[index];
        // Nobody talks before there is a connection.
        tokio::select! {
            connected = client.connected() => if connected.is_err() { return },
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        let text = LINES[usize::try_from(n).unwrap_or(0) % LINES.len()].to_owned();
        let note = Note { run: run.clone(), n, from: name(index), text };
        let Ok(payload) = note.payload() else { return };
        if events.send(Heard::Begins { n, room: *room }).await.is_err() {
            return;
        }
        let outcome = match client.publish(&channel(*room), payload, &note.dedupe_key()).await {
            Ok(Published { epoch, offset, .. }) => Heard::Accepted { n, at: Position { epoch, offset } },
            Err(error) => Heard::Failed { n, why: error.to_string() },
        };
        if events.send(outcome).await.is_err() {
            return;
        }
    }
}

fn note(rooms: &mut Rooms, event: Heard, said: &mut Said) -> anyhow::Result<()> {
    match event {
        Heard::Begins { n, room } => rooms.begin(n, room),
        Heard::Accepted { n, at } => rooms.accept(n, at, Instant::now()),
        Heard::Failed { n, why } => {
            rooms.fail(n);
            said.status(format!("a message was not published: {why}"));
        }
        Heard::Received { person, n } => rooms.receive(person, n),
        Heard::Told { person, at } => rooms.told(person, at),
        Heard::Ended(error) => return Err(error),
    }
    Ok(())
}
