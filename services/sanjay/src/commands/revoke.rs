//! `sanjay revoke`: which tokens are refused although they are good, as a back end.

use sanjay_client::{Revocation, Subject, protocol::names, subject};
use serde_json::json;

use crate::{
    commands::{receipts::clean, when::readable},
    output,
    settings::{ApiArgs, explain},
};

/// Revocations of one call.
const PAGE: u32 = 1_000;

/// Refuse tokens although they are good, and close the connections that were opened with them
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The tokens of a user that were made until now
    User(SubjectArgs),
    /// One session, as `sanjay connections` names it; its client may come back
    Session(SubjectArgs),
    /// One token, by its `jti`
    Token(SubjectArgs),
    /// Print the revocations in force
    List(ListArgs),
}

#[derive(Debug, clap::Args)]
struct SubjectArgs {
    /// The user, the session or the token's `jti`
    name: String,
    /// Why, for whoever lists revocations
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Take the revocation back instead
    #[arg(long, conflicts_with = "reason")]
    undo: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Revokes, takes back or lists.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::User(args) => args.run(Subject::User).await,
            Command::Session(args) => args.run(Subject::Session).await,
            Command::Token(args) => args.run(Subject::Token).await,
            Command::List(args) => args.run().await,
        }
    }
}

impl SubjectArgs {
    async fn run(self, subject: fn(String) -> Subject) -> anyhow::Result<()> {
        names::check("name", &self.name)?;
        let backend = self.api.connect().await?;
        let subject = subject(self.name);
        if self.undo {
            let undone = backend.unrevoke(&subject).await.map_err(explain)?;
            anyhow::ensure!(undone.is_some(), "this is not revoked; `sanjay revoke list` names what is");
            let said =
                if self.json { json!({ "undone": true }).to_string() } else { "not revoked any more".into() };
            return output::line(&said);
        }
        let revoked = backend.revoke(&subject, &self.reason).await.map_err(explain)?;
        output::line(&if self.json {
            as_json(&revoked)
        } else {
            format!("revoked until {}", readable(revoked.expires_us))
        })
    }
}

impl ListArgs {
    async fn run(self) -> anyhow::Result<()> {
        let backend = self.api.connect().await?;
        let mut token = String::new();
        if !self.json {
            output::line("revoked                   until                     kind     name, by, reason")?;
        }
        loop {
            let page = backend.list_revocations(PAGE, &token).await.map_err(explain)?;
            for found in &page.revocations {
                output::line(&if self.json { as_json(found) } else { row(found) })?;
            }
            token = page.next_page_token;
            if token.is_empty() {
                return Ok(());
            }
        }
    }
}

/// Kind and name.
fn named(revocation: &Revocation) -> (&'static str, &str) {
    match revocation.subject.as_ref().and_then(|subject| subject.subject.as_ref()) {
        Some(subject::Subject::User(user)) => ("user", user),
        Some(subject::Subject::Session(session)) => ("session", session),
        Some(subject::Subject::Jti(jti)) => ("token", jti),
        None => ("unknown", ""),
    }
}

fn as_json(revocation: &Revocation) -> String {
    let (kind, name) = named(revocation);
    let Revocation { revoked_us, expires_us, reason, caller, .. } = revocation;
    let json = json!({
        "kind": kind, "name": name, "revoked_us": revoked_us, "expires_us": expires_us, "reason": reason,
        "caller": caller,
    });
    json.to_string()
}

fn row(revocation: &Revocation) -> String {
    let (kind, name) = named(revocation);
    let (revoked, until) = (readable(revocation.revoked_us), readable(revocation.expires_us));
    let texts = [name, &revocation.caller, &revocation.reason].map(clean);
    format!("{revoked:<24}  {until:<24}  {kind:<7}  {}", texts.join(", "))
}
