//! `sanjay demo`: small products that run by themselves on a server, so that there is something to see, and that keep
//! books: what the server accepted must arrive.

mod chat;
mod ledger;
mod notifications;
mod rooms;

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Subcommand;
use sanjay_client::{ClientOptions, ClosedError, State, TokenSource, protocol::Payload};
use sanjay_runtime::{OsRandom, random::uuid_v4};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use crate::{commands::token, output, settings::Signer, signals::interrupted};

/// How often a demo says where it stands.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// How long what was accepted may take to arrive after a demo stopped sending. A container has 10 s to end.
const DRAIN: Duration = Duration::from_secs(5);

/// Most messages a second: a demo shows that something happens; `sanjay bench` shows how much can.
const MAX_RATE: f64 = 100.0;

/// Longest run.
const MAX_RUN: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Run a small product on a server: it sends by itself and says whether everything arrives
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    demo: Demo,
}

#[derive(Debug, Subcommand)]
enum Demo {
    Chat(chat::Args),
    Notifications(notifications::Args),
}

impl Args {
    /// Runs the demo until a signal comes or its time is over.
    ///
    /// # Errors
    /// Says what to start or to set, or that something which the server accepted did not arrive.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.demo {
            Demo::Chat(args) => Box::pin(args.run()).await,
            Demo::Notifications(args) => Box::pin(args.run()).await,
        }
    }
}

/// What every demo can be told.
#[derive(Debug, Clone, clap::Args)]
struct RunArgs {
    /// Messages a second, all together
    #[arg(long, value_name = "N", default_value = "2", value_parser = parse_rate)]
    rate: f64,
    /// Stop after this time, such as 30s, 10m or 2h [default: at SIGTERM or Ctrl-C]
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
    lasts: Option<Duration>,
}

impl RunArgs {
    /// Time between two messages.
    fn pause(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.rate)
    }

    /// Waits until the demo is to stop.
    async fn over(&self) {
        match self.lasts {
            Some(lasts) => {
                tokio::select! {
                    () = interrupted() => {}
                    () = tokio::time::sleep(lasts) => {}
                }
            }
            None => interrupted().await,
        }
    }
}

/// The content of a demo's message. The run tells its messages from those of an earlier one, the number from its
/// others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    run: String,
    n: u64,
    from: String,
    text: String,
}

impl Note {
    fn payload(&self) -> anyhow::Result<Payload> {
        Ok(Payload::Json(serde_json::to_string(self)?))
    }

    /// Its number, when it is a message of this run.
    fn number(payload: &Payload, run: &str) -> Option<u64> {
        let Payload::Json(text) = payload else { return None };
        let note: Note = serde_json::from_str(text).ok()?;
        (note.run == run).then_some(note.n)
    }

    /// Repeats of one message have one key, and no other message has it.
    fn dedupe_key(&self) -> String {
        format!("demo-{}-{}", self.run, self.n)
    }
}

/// The name of a run.
fn run_name() -> String {
    uuid_v4(&OsRandom).simple().to_string()[..8].to_owned()
}

/// Says where the demo stands now and then, and ends it when everything arrived or the time for that is over.
struct Reports {
    ticks: tokio::time::Interval,
    /// Told to those who send.
    stop: watch::Sender<bool>,
    drained_by: Option<Instant>,
}

impl Reports {
    fn new() -> (Self, watch::Receiver<bool>) {
        let (stop, stopped) = watch::channel(false);
        let ticks = tokio::time::interval_at(Instant::now() + REPORT_EVERY, REPORT_EVERY);
        (Self { ticks, stop, drained_by: None }, stopped)
    }

    /// Has everybody stop sending; what was accepted may still arrive.
    fn stop(&mut self) {
        let _ = self.stop.send(true);
        self.drained_by = Some(Instant::now() + DRAIN);
    }

    /// Waits for what comes next: a report is due, or the time to drain is over.
    async fn next(&mut self) -> Due {
        let Some(drained_by) = self.drained_by else {
            self.ticks.tick().await;
            return Due::Report;
        };
        tokio::select! {
            _ = self.ticks.tick() => Due::Report,
            () = tokio::time::sleep_until(drained_by) => Due::End,
        }
    }
}

/// What [`Reports`] waits for.
enum Due {
    Report,
    End,
}

/// How a person of a demo connects, with `credit` for the inbox.
fn demo_client(url: &str, user: &str, signer: &Signer, credit: u32) -> ClientOptions {
    let (user, signer) = (user.to_owned(), signer.clone());
    // Asked again when a token has ended, so that a demo may run for weeks.
    let tokens = TokenSource::callback(move || {
        let token = token::mint(&user, &signer);
        async move { Ok(token) }
    });
    let mut options = ClientOptions::new(url, tokens);
    options.client = concat!("sanjay-demo/", env!("CARGO_PKG_VERSION")).to_owned();
    options.credit = Some(credit);
    options
}

/// Waits until a client has ended although nobody closed it.
async fn ended(state: &mut watch::Receiver<State>) -> anyhow::Error {
    let closed = state.wait_for(|state| matches!(state, State::Closed(_))).await.map(|state| state.clone());
    match closed {
        Ok(State::Closed(ClosedError::TokenRefused(error))) => {
            anyhow!("{error}; give it with --token-secret or SANJAY_EDGE__TOKEN_SECRET")
        }
        Ok(State::Closed(error @ ClosedError::Stopped(_))) => anyhow!("{error}"),
        _ => std::future::pending().await,
    }
}

/// Says when a client loses its connection or does not get one, as long as it exists.
async fn tell_outages(mut state: watch::Receiver<State>) {
    let mut said = Said::default();
    loop {
        if let State::Disconnected { error: Some(error), .. } = &*state.borrow_and_update() {
            said.status(format!("{error}; trying again"));
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// Says something once, and again only after it changed.
#[derive(Default)]
struct Said(String);

impl Said {
    fn status(&mut self, text: String) {
        if self.0 != text {
            output::status(&text);
            self.0 = text;
        }
    }
}

fn parse_rate(text: &str) -> anyhow::Result<f64> {
    let rate: Option<f64> = text.parse().ok().filter(|rate| (0.1..=MAX_RATE).contains(rate));
    rate.with_context(|| format!("give a number for each second, from 0.1 to {MAX_RATE:.0}"))
}

fn parse_time(text: &str) -> anyhow::Result<Duration> {
    let help = "give a number with its unit, such as 500ms, 30s, 10m or 2h";
    let at = text.find(|c: char| !c.is_ascii_digit()).context(help)?;
    let number: u64 = text[..at].parse().ok().context(help)?;
    let unit = match &text[at..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => anyhow::bail!(help),
    };
    let time = number.checked_mul(unit).map(Duration::from_millis).filter(|time| *time <= MAX_RUN);
    time.filter(|time| !time.is_zero()).context(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_bounded_and_explained() {
        assert_eq!(parse_time("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_time("2h").unwrap(), Duration::from_secs(7_200));
        for text in ["", "5", "s", "0s", "1d", "-1s", "99999999999999999999s", "9999999h", "1é"] {
            assert!(parse_time(text).unwrap_err().to_string().contains("30s"), "{text}");
        }
        for text in ["0", "-1", "NaN", "inf", "101", ""] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
        assert!((parse_rate("0.5").unwrap() - 0.5).abs() < f64::EPSILON);
    }

    #[test]
    fn a_note_is_known_by_its_run() {
        let note = Note { run: "r1".into(), n: 7, from: "ann".into(), text: "hi".into() };
        let payload = note.payload().unwrap();
        assert_eq!(Note::number(&payload, "r1"), Some(7));
        assert_eq!(Note::number(&payload, "r2"), None);
        assert_eq!(Note::number(&Payload::Text("hi".into()), "r1"), None);
        assert_eq!(Note::number(&Payload::Json("[]".into()), "r1"), None);
        assert_ne!(note.dedupe_key(), Note { n: 8, ..note }.dedupe_key());
    }
}
