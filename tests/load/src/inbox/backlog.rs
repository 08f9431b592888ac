//! A backlog for users who are away: how long it takes to store, how large it is, and how long some of them take to come
//! back and take everything.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, ensure};
use sanjay_client::protocol::Payload;
use sanjay_testkit::{Cluster, Peer, Role, Token, backend, servers::MongoOptions};
use serde_json::json;
use tokio::task::JoinSet;

use super::{Options, Store, cpu_s};
use crate::report::{line, progress};

/// Users of one call.
const USERS: u32 = 1_000;

/// Calls without an answer: few enough for each to be done within its deadline.
const WINDOW: usize = 2;

/// Bytes of a payload.
const BYTES: usize = 128;

/// Users who are on their way back at once.
const AT_ONCE: u32 = 200;

pub(super) async fn measure(options: &Options, store: Store) -> anyhow::Result<()> {
    // SecantusDB syncs each update of a group by itself, which MongoDB does not: a million of them would measure that.
    let mut cluster = store.cluster_with(1, MongoOptions::default()).start().await;
    let total = options.users / USERS * USERS * options.messages;
    let before = cpu_s(&mut cluster, Role::Delivery)?;
    let began = Instant::now();
    fill(&cluster, options).await?;
    let took = began.elapsed().as_secs_f64();
    let taken = cpu_s(&mut cluster, Role::Delivery)? - before;
    let bytes = size(&mut cluster, store)?;
    line(&format!(
        "backlog {:<5} {total} messages of {BYTES} bytes for {} users: {took:.1} s, {:.0}/s, {:.1} CPU-s of delivery per \
         million, {:.0} bytes each",
        store.name(),
        options.users / USERS * USERS,
        f64::from(total) / took,
        taken / f64::from(total) * 1e6,
        bytes as f64 / f64::from(total),
    ))?;

    let began = Instant::now();
    come_back(&cluster, options).await?;
    let took = began.elapsed().as_secs_f64();
    let drained = options.returning * options.messages;
    line(&format!(
        "backlog {:<5} {} users are back and have acknowledged {drained} messages: {took:.1} s, {:.0}/s",
        store.name(),
        options.returning,
        f64::from(drained) / took,
    ))
}

fn name(user: u32) -> String {
    format!("away-{user}")
}

async fn fill(cluster: &Cluster, options: &Options) -> anyhow::Result<()> {
    let api = backend(&cluster.server()).await;
    let mut stream = api.send_stream();
    let mut waiting = VecDeque::new();
    for message in 0..options.messages {
        for first in (0..options.users / USERS).map(|block| block * USERS) {
            let users: Vec<String> = (first..first + USERS).map(name).collect();
            let users: Vec<&str> = users.iter().map(String::as_str).collect();
            let text = format!("{message} {}", "x".repeat(BYTES - 8));
            waiting.push_back(stream.send(&users, Payload::Text(text), "").await?);
            if waiting.len() >= WINDOW {
                taken(waiting.pop_front()).await?;
            }
        }
        progress(&format!("stored {} of {} messages for each", message + 1, options.messages));
    }
    while !waiting.is_empty() {
        taken(waiting.pop_front()).await?;
    }
    Ok(())
}

async fn taken(
    answer: Option<sanjay_client::PendingReply<Vec<sanjay_client::UserResult>>>,
) -> anyhow::Result<()> {
    for of in answer.context("an answer is awaited")?.wait().await? {
        of.result.map_err(|error| anyhow::anyhow!("a send to {} was refused: {error:?}", of.user))?;
    }
    Ok(())
}

/// What the store takes on the disk.
fn size(cluster: &mut Cluster, store: Store) -> anyhow::Result<u64> {
    match store {
        Store::Redb => Ok(std::fs::metadata(cluster.directory().join("inbox.redb"))?.len()),
        Store::Mongo => directory_bytes(cluster.mongo().data()),
    }
}

fn directory_bytes(path: &Path) -> anyhow::Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { directory_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(sum)
}

/// Connects users and has each take everything; they stay until all have.
async fn come_back(cluster: &Cluster, options: &Options) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..AT_ONCE.min(options.returning) {
        let (next, url) = (next.clone(), cluster.url());
        let (returning, messages) = (options.returning, options.messages);
        tasks.spawn(async move {
            let mut back = Vec::new();
            loop {
                let user = next.fetch_add(1, Ordering::Relaxed);
                if user >= returning {
                    return anyhow::Ok(back);
                }
                back.push(drain(&url, &name(user), messages).await?);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

async fn drain(url: &str, user: &str, messages: u32) -> anyhow::Result<Peer> {
    let hello = json!({ "token": Token::of(user).sign(), "credit": 64 });
    let mut peer = Peer::try_hello(url, hello)
        .await
        .map_err(|end| anyhow::anyhow!("{user} does not come back: {end:?}"))?;
    let messages = u64::from(messages);
    for seq in 1..=messages {
        let message = peer.event("inbox").await;
        ensure!(message["seq"] == seq, "{user} got {message} as message {seq}");
    }
    let answer = peer.call(json!({ "ack": { "ranges": [[1, messages]] } })).await;
    ensure!(answer.get("error").is_none(), "the ack of {user} was refused: {answer}");
    Ok(peer)
}
