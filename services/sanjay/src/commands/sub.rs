//! `sanjay sub`: receives as a user and prints each message as a line of JSON.

use std::{num::NonZeroU64, path::PathBuf, sync::Arc};

use anyhow::{anyhow, bail};
use futures::{StreamExt, stream::SelectAll};
use sanjay_client::{
    ChannelEvent, Client, ClientOptions, ClosedError, ConnectionError, FileCheckpoint, InboxEvent, State,
    Subscription,
    protocol::{Event, EventEnvelope, event::Welcome, json, names},
};
use tokio::sync::watch;

use crate::{commands::token, output, settings::SocketArgs, signals::interrupted};

/// Receive messages and print each as a line of JSON; inbox messages are acked once they are printed
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Channels to subscribe to
    #[arg(required_unless_present = "inbox")]
    channels: Vec<String>,
    /// Receive the user's inbox
    #[arg(long)]
    inbox: bool,
    /// Stop after so many messages
    #[arg(long, value_name = "N")]
    count: Option<NonZeroU64>,
    /// Be this user, with a token made with the server's secret, instead of the token's user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Remember in this file what was printed, so that not even a crash before the ack repeats it
    #[arg(long, value_name = "FILE", requires = "inbox")]
    checkpoint: Option<PathBuf>,
    #[command(flatten)]
    socket: SocketArgs,
}

impl Args {
    /// Prints until the count is reached, a signal comes or the server refuses.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        if let Some(user) = &self.user {
            names::check("user", user)?;
        }
        for channel in &self.channels {
            names::check("channel", channel)?;
        }
        let mint = self.user.map(|user| move |signer| token::mint(&user, &signer));
        let (url, token) = self.socket.resolve(mint)?;
        let mut options = ClientOptions::new(url, token);
        options.client = concat!("sanjay-cli/", env!("CARGO_PKG_VERSION")).to_owned();
        options.credit = (!self.inbox).then_some(0);
        if let Some(path) = self.checkpoint {
            options.checkpoint = Arc::new(FileCheckpoint::new(path));
        }
        let client = Client::connect(options).await?;
        let received = receive(&client, &self.channels, self.inbox, self.count).await;
        client.close().await;
        received
    }
}

async fn receive(
    client: &Client,
    channels: &[String],
    inbox: bool,
    count: Option<NonZeroU64>,
) -> anyhow::Result<()> {
    let mut state = client.watch();
    let welcome = first_connection(&mut state).await?;
    output::status(&format!("connected as {}", welcome.user));
    let mut subscriptions = SelectAll::new();
    for channel in channels {
        let subscription: Subscription = client.subscribe(channel).await?;
        let channel = channel.clone();
        subscriptions.push(Box::pin(subscription.map(move |event| (channel.clone(), event))));
    }
    let mut inbox = if inbox { client.inbox() } else { None };
    let mut left = count.map(NonZeroU64::get);
    let interrupted = interrupted();
    tokio::pin!(interrupted);
    while left != Some(0) {
        let printed = tokio::select! {
            Some((channel, event)) = subscriptions.next() => on_channel(&channel, event)?,
            Some(event) = async { inbox.as_mut()?.next().await } => on_inbox(event).await?,
            changed = state.changed() => {
                changed.map_err(|_| anyhow!("the client ended"))?;
                on_state(&state.borrow_and_update().clone())?;
                false
            }
            () = &mut interrupted => return Ok(()),
        };
        if printed {
            left = left.map(|left| left - 1);
        }
    }
    Ok(())
}

/// Waits for the first connection. Unlike later, a failure ends the command: its user is there to mend it.
async fn first_connection(state: &mut watch::Receiver<State>) -> anyhow::Result<Arc<Welcome>> {
    loop {
        match state.borrow_and_update().clone() {
            State::Connected(welcome) => return Ok(welcome),
            State::Closed(error) => return Err(explain(error)),
            State::Disconnected { error: Some(error), .. } => match &*error {
                ConnectionError::Unreachable { .. } => {
                    bail!("{error}; start one with `sanjay standalone`, or give its address with --url")
                }
                _ => bail!("{error}"),
            },
            State::Disconnected { .. } | State::Connecting => {}
        }
        state.changed().await?;
    }
}

fn explain(error: ClosedError) -> anyhow::Error {
    match error {
        ClosedError::TokenRefused(_) => {
            anyhow!("{error} with `sanjay token USER` and give it with --token or SANJAY_TOKEN")
        }
        other => other.into(),
    }
}

fn on_state(state: &State) -> anyhow::Result<()> {
    match state {
        State::Disconnected { error, retry_in } => {
            let reason =
                error.as_ref().map_or("the server asked to come back later".to_owned(), ToString::to_string);
            output::status(&format!("{reason}; trying again in {:.1} s", retry_in.as_secs_f64()));
        }
        State::Connecting => {}
        State::Connected(_) => output::status("connected again"),
        State::Closed(error) => return Err(explain(error.clone())),
    }
    Ok(())
}

/// Says whether a message was printed.
fn on_channel(channel: &str, event: ChannelEvent) -> anyhow::Result<bool> {
    match event {
        ChannelEvent::Message(message) => {
            print(Event::Message(message))?;
            return Ok(true);
        }
        ChannelEvent::Subscribed { epoch, offset } => {
            output::status(&format!("subscribed to {channel}: epoch {epoch}, offset {offset}"));
        }
        ChannelEvent::Gap(gap) => {
            output::status(&format!("{channel}: messages {} to {} were missed", gap.from, gap.to));
        }
        ChannelEvent::Discontinuity { epoch, offset } => {
            output::status(&format!("{channel}: the numbering began anew: epoch {epoch}, offset {offset}"));
        }
        ChannelEvent::Unsubscribed(error) => bail!("{channel}: {}", error.message),
    }
    Ok(false)
}

async fn on_inbox(event: InboxEvent) -> anyhow::Result<bool> {
    match event {
        InboxEvent::Message(delivery) => {
            print(Event::Inbox(Box::new(delivery.message)))?;
            delivery.acker.ack().await?;
            Ok(true)
        }
        InboxEvent::Discontinuity(discontinuity) => {
            output::status(&discontinuity.to_string());
            Ok(false)
        }
    }
}

fn print(event: Event) -> anyhow::Result<()> {
    let mut line = Vec::new();
    json::encode(&EventEnvelope { id: None, event }, &mut line);
    output::line(&String::from_utf8(line)?)
}
