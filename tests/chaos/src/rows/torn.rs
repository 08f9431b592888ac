//! Opens a damaged copy of a delivery node's file, and compares what it serves with what was sent.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use sanjay_client::protocol::limits::MAX_CREDIT;
use sanjay_testkit::{Peer, Process, Sanjay, Settings, Token, free_port};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::files::Damage;
use crate::{
    run::{name, number_of, until},
    storm::Storm,
};

/// How long a server may take to open a file, or to give it up.
const OPEN: Duration = Duration::from_secs(40);

/// Most messages of one commit: all that wait for an answer at the load of this row.
const MAX_COMMIT: usize = 64;

/// What had been answered when the copy was made: by user, then by seq, number and id.
pub(crate) type Answered = BTreeMap<String, BTreeMap<u64, (u64, String)>>;

/// Starts a server on `bytes`. What is wrong becomes a complaint.
pub(crate) async fn open(
    storm: &Storm,
    damage: Damage,
    bytes: &[u8],
    answered: &Answered,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("config.toml"), Settings::default().to_toml())?;
    fs::create_dir(directory.path().join("data"))?;
    fs::write(directory.path().join("data/inbox.redb"), bytes)?;
    let (mut server, url) = start(directory.path());
    let ready = directory.path().join("ready.json");
    let decided = until(OPEN, async || ready.exists() || server.ended().is_some()).await;
    anyhow::ensure!(decided, "{damage:?}: the server neither opens the file nor gives it up");
    let log = server.stderr();
    if log.contains("panicked") {
        storm.run.complain(format!("{damage:?}: the server panicked: {}", tail(&log)));
    }
    if server.ended().is_some() {
        if matches!(damage, Damage::None) {
            storm.run.complain(format!("what a killed node leaves is not opened: {}", tail(&log)));
        } else if !["not a readable inbox store", "cannot be opened"].iter().any(|why| log.contains(why)) {
            storm.run.complain(format!("{damage:?}: the server does not say what is wrong: {}", tail(&log)));
        }
        return Ok(());
    }
    let mut taken_back = 0;
    for user in 0..storm.run.load.users {
        let user = name(user);
        let nothing = BTreeMap::new();
        let known = answered.get(&user).unwrap_or(&nothing);
        taken_back += compare(storm, damage, &url, &user, known).await?;
    }
    // A commit of which a part is missing is one that was being written, as far as anybody can tell.
    let limit = if matches!(damage, Damage::None) { 0 } else { MAX_COMMIT };
    if taken_back > limit {
        storm.run.complain(format!("{damage:?}: {taken_back} of the newest accepted messages are gone"));
    }
    Ok(())
}

fn start(directory: &Path) -> (Process, String) {
    let path = |name: &str| directory.join(name).display().to_string();
    let (edge, ready) = (free_port(), path("ready.json"));
    let mut arguments = vec!["standalone".to_owned(), "--config".to_owned(), path("config.toml")];
    arguments.extend(["--data-dir".to_owned(), path("data"), "--ready-file".to_owned(), ready]);
    let ports = [("--listen", edge), ("--delivery-listen", free_port())];
    for (flag, port) in
        ports.into_iter().chain([("--router-listen", free_port()), ("--admin-listen", free_port())])
    {
        arguments.extend([flag.to_owned(), format!("127.0.0.1:{port}")]);
    }
    (Sanjay::new(&arguments).directory(directory).spawn(), format!("ws://127.0.0.1:{edge}/v1/ws"))
}

/// Reads a user's inbox, and compares it with what was sent to him. Says how many of the newest that were accepted it has
/// not.
async fn compare(
    storm: &Storm,
    damage: Damage,
    url: &str,
    user: &str,
    known: &BTreeMap<u64, (u64, String)>,
) -> anyhow::Result<usize> {
    let Some((mark, head, served)) = timeout(OPEN, read(url, user)).await? else {
        // Its store has failed meanwhile, which it says: it serves nothing then.
        if matches!(damage, Damage::None) {
            storm.run.complain(format!("the inbox of {user} is not served"));
        }
        return Ok(0);
    };
    let wrong =
        |why: &str| storm.run.complain(format!("{damage:?}: the inbox of {user}, {mark} to {head}, {why}"));
    for (seq, (number, id)) in &served {
        let expected = known.get(seq).is_none_or(|answered| *answered == (*number, id.clone()));
        if !expected || !storm.run.history().was_sent(user, *number) {
            wrong(&format!("serves another message as seq {seq}"));
        }
    }
    // What is missing was settled, so that it has had its effect.
    let missing = known.range(..=head).filter(|(seq, _)| !served.contains_key(seq));
    let lost = missing.filter(|(_, (number, _))| !storm.run.history().is_applied(user, *number)).count();
    if lost > 0 && served.len() < MAX_CREDIT as usize {
        wrong(&format!("has lost {lost} messages"));
    }
    Ok(known.range(head + 1..).count())
}

type Inbox = (u64, u64, BTreeMap<u64, (u64, String)>);

/// Everything that is unsettled, up to the credit; `None` when the inbox is not served.
async fn read(url: &str, user: &str) -> Option<Inbox> {
    let hello = json!({ "token": Token::of(user).sign(), "credit": MAX_CREDIT });
    let mut peer = Peer::try_hello(url, hello).await.ok()?;
    let inbox = peer.welcome["inbox"].clone();
    let (mark, head) = (inbox["mark"].as_u64()?, inbox["head"].as_u64()?);
    let mut served = BTreeMap::new();
    while !peer.is_quiet().await {
        let message: Value = peer.event("inbox").await;
        let number = message["payload"]["text"].as_str().map_or(0, number_of);
        let id = message["message_id"].as_str()?.to_owned();
        served.insert(message["seq"].as_u64()?, (number, id));
    }
    Some((mark, head, served))
}

/// The end of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(3)..].join(" | ").chars().take(600).collect()
}
