//! What the writer is asked to do with members and publications, and what it answers.

use tokio::sync::oneshot;

use super::super::transaction::Tables;
use crate::store::{
    Appended, Applied, JoinError, Membership, NewMessage, Numbered, Publication, PublicationError,
    StoreError, Turn,
};

/// Something to write, with where its answer goes.
pub(in super::super) enum Work {
    Join {
        channel: String,
        users: Vec<String>,
        most: u64,
        answer: oneshot::Sender<Result<Membership, JoinError>>,
    },
    Leave {
        channel: String,
        users: Vec<String>,
        answer: oneshot::Sender<Result<Membership, StoreError>>,
    },
    Publish {
        publication: Publication,
        answer: oneshot::Sender<Result<Numbered, PublicationError>>,
    },
    Claim {
        now_us: u64,
        until_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Vec<Turn>, StoreError>>,
    },
    Apply {
        turn: Turn,
        until_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Applied, StoreError>>,
    },
}

/// What it gets once the transaction is committed.
pub(in super::super) enum Done {
    Join(Result<Membership, JoinError>),
    Leave(Membership),
    Publish(Result<Numbered, PublicationError>),
    Claim(Vec<Turn>),
    /// With what came into inboxes.
    Apply(Applied, Vec<(NewMessage, Appended)>),
}

impl Done {
    /// What came into inboxes, in ascending seq for each.
    pub(in super::super) fn appended(&self) -> impl Iterator<Item = (&NewMessage, &Appended)> {
        let appended = if let Done::Apply(_, appended) = self { &appended[..] } else { &[] };
        appended.iter().map(|(message, appended)| (message, appended))
    }
}

impl Work {
    /// How many members or publications it touches.
    pub(in super::super) fn items(&self) -> usize {
        match self {
            Work::Join { users, .. } | Work::Leave { users, .. } => users.len(),
            Work::Publish { .. } => 1,
            Work::Claim { limit, .. } | Work::Apply { limit, .. } => *limit,
        }
    }

    pub(in super::super) fn apply(&self, tables: &mut Tables<'_>) -> Result<Done, redb::Error> {
        Ok(match self {
            Work::Join { channel, users, most, .. } => Done::Join(tables.join(channel, users, *most)?),
            Work::Leave { channel, users, .. } => Done::Leave(tables.leave(channel, users)?),
            Work::Publish { publication, .. } => Done::Publish(tables.publish(publication)?),
            Work::Claim { now_us, until_us, limit, .. } => {
                Done::Claim(tables.claim_turns(*now_us, *until_us, *limit)?)
            }
            Work::Apply { turn, until_us, limit, .. } => {
                let (applied, appended) = tables.apply_turn(turn, *until_us, *limit)?;
                Done::Apply(applied, appended)
            }
        })
    }

    /// Answers; who asked may have gone away, which is no concern of the writer.
    pub(in super::super) fn answer(self, done: Done) {
        match (self, done) {
            (Work::Join { answer, .. }, Done::Join(joined)) => drop(answer.send(joined)),
            (Work::Leave { answer, .. }, Done::Leave(left)) => drop(answer.send(Ok(left))),
            (Work::Publish { answer, .. }, Done::Publish(numbered)) => drop(answer.send(numbered)),
            (Work::Claim { answer, .. }, Done::Claim(turns)) => drop(answer.send(Ok(turns))),
            (Work::Apply { answer, .. }, Done::Apply(applied, _)) => drop(answer.send(Ok(applied))),
            _ => {}
        }
    }

    pub(in super::super) fn fail(self, error: &StoreError) {
        let error = error.clone();
        match self {
            Work::Join { answer, .. } => drop(answer.send(Err(error.into()))),
            Work::Leave { answer, .. } => drop(answer.send(Err(error))),
            Work::Publish { answer, .. } => drop(answer.send(Err(error.into()))),
            Work::Claim { answer, .. } => drop(answer.send(Err(error))),
            Work::Apply { answer, .. } => drop(answer.send(Err(error))),
        }
    }
}
