//! Revocations: the back ends' calls, and the stream that tells edges.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use sanjay_proto::{
    delivery::v1::{
        ListRevocationsRequest, ListRevocationsResponse, Revocation, RevokeRequest, RevokeResponse, Subject,
        UnrevokeRequest, UnrevokeResponse, subject,
    },
    edge::v1::{Revoked, WatchRevocationsRequest, WatchRevocationsResponse, revocations_server, revoked},
};
use sanjay_protocol::{ErrorCode, limits::MAX_REASON_BYTES, names};
use tokio::{
    sync::broadcast::{
        Receiver,
        error::{RecvError, TryRecvError},
    },
    time::{Interval, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{Refusal, control::checked_session, stream::Answers};
use crate::{
    revocations::{Change, Revocations, RevokeError},
    store,
};

/// Revocations of a page, unless the caller says how many; and the most that it may say.
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;

/// Most revocations of one message to an edge: names of 200 bytes make 200 KiB.
const BATCH: usize = 1_000;

/// How often an edge hears that nothing changed.
const IDLE: Duration = Duration::from_secs(1);

impl From<RevokeError> for Refusal {
    fn from(error: RevokeError) -> Self {
        match error {
            RevokeError::Store(error) => error.into(),
            RevokeError::TooMany => Self::new(ErrorCode::LimitExceeded, error.to_string()),
            RevokeError::NotFound => Self::new(ErrorCode::NotFound, error.to_string()),
            RevokeError::NotRead => Self::new(ErrorCode::Unavailable, error.to_string()),
        }
    }
}

pub(super) async fn revoke(
    revocations: &Revocations,
    request: RevokeRequest,
    caller: &Arc<str>,
) -> Result<RevokeResponse, Refusal> {
    let subject = checked(request.subject)?;
    names::check_text("reason", &request.reason, MAX_REASON_BYTES)?;
    let kind = kind(&subject);
    let revoked = revocations.revoke(subject, request.reason, caller).await?;
    tracing::info!(caller = &**caller, kind, "a back end revoked tokens");
    Ok(RevokeResponse { revocation: Some(revocation(&revoked)) })
}

pub(super) async fn unrevoke(
    revocations: &Revocations,
    request: UnrevokeRequest,
    caller: &Arc<str>,
) -> Result<UnrevokeResponse, Refusal> {
    let subject = checked(request.subject)?;
    let before = revocations.unrevoke(&subject, caller).await?;
    tracing::info!(caller = &**caller, kind = kind(&subject), "a back end took a revocation back");
    Ok(UnrevokeResponse { revocation: Some(revocation(&before)) })
}

pub(super) fn list(
    revocations: &Revocations,
    request: &ListRevocationsRequest,
) -> Result<ListRevocationsResponse, Refusal> {
    let limit = match request.page_size as usize {
        0 => DEFAULT_PAGE,
        size @ 1..=MAX_PAGE => size,
        size => {
            return Err(Refusal::bad(format!(
                "page_size is {size}; give 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}"
            )));
        }
    };
    let after = match request.page_token.as_str() {
        "" => None,
        token => Some(store::Subject::from_key(token).ok_or_else(|| {
            Refusal::bad("page_token is none; give next_page_token of the page before, or nothing")
        })?),
    };
    let found = revocations.list(after.as_ref(), limit)?;
    let next = found.last().filter(|_| found.len() == limit).map(|last| last.subject.key());
    Ok(ListRevocationsResponse {
        revocations: found.iter().map(|found| revocation(found)).collect(),
        next_page_token: next.unwrap_or_default(),
    })
}

fn checked(subject: Option<Subject>) -> Result<store::Subject, Refusal> {
    match subject.and_then(|subject| subject.subject) {
        Some(subject::Subject::User(user)) => {
            names::check("user", &user)?;
            Ok(store::Subject::User(user))
        }
        Some(subject::Subject::Session(session)) => Ok(store::Subject::Session(checked_session(&session)?)),
        Some(subject::Subject::Jti(jti)) => {
            names::check("jti", &jti)?;
            Ok(store::Subject::Jti(jti))
        }
        None => Err(Refusal::bad("subject is missing; give a user, a session or a jti")),
    }
}

/// For logs, which name nobody.
fn kind(subject: &store::Subject) -> &'static str {
    match subject {
        store::Subject::User(_) => "user",
        store::Subject::Session(_) => "session",
        store::Subject::Jti(_) => "token",
    }
}

fn revocation(known: &store::Revocation) -> Revocation {
    let named = match &known.subject {
        store::Subject::User(user) => subject::Subject::User(user.clone()),
        store::Subject::Session(session) => subject::Subject::Session(session.to_string()),
        store::Subject::Jti(jti) => subject::Subject::Jti(jti.clone()),
    };
    Revocation {
        subject: Some(Subject { subject: Some(named) }),
        revoked_us: known.revoked_us,
        expires_us: known.expires_us,
        reason: known.reason.clone(),
        caller: known.caller.clone(),
    }
}

fn revoked(known: &Change) -> Revoked {
    let subject = match &known.subject {
        store::Subject::User(user) => revoked::Subject::User(user.clone()),
        store::Subject::Session(session) => revoked::Subject::Session(session.as_bytes().to_vec().into()),
        store::Subject::Jti(jti) => revoked::Subject::Jti(jti.clone()),
    };
    Revoked { subject: Some(subject), before_s: known.before_s, lifted: known.lifted }
}

/// `sanjay.edge.v1.Revocations`.
#[derive(Clone)]
pub(crate) struct RevocationsApi {
    pub(crate) revocations: Revocations,
    /// Ends streams on shutdown.
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl revocations_server::Revocations for RevocationsApi {
    type WatchStream = Answers<WatchRevocationsResponse>;

    async fn watch(
        &self,
        request: Request<WatchRevocationsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let edge = request.into_inner().edge_id;
        names::check("edge_id", &edge).map_err(Refusal::from)?;
        let changes = self
            .revocations
            .watch()
            .map_err(|error| Refusal::new(ErrorCode::RateLimited, error.to_string()))?;
        let mut idle = interval(IDLE);
        idle.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let telling = Telling {
            revocations: self.revocations.clone(),
            changes,
            snapshot: None,
            idle,
            lagged: false,
            stop: self.stop.clone(),
        };
        let answers = stream::unfold(Some(telling), |telling| async {
            let mut telling = telling?;
            match telling.next().await {
                Some(Ok(answer)) => Some((Ok(answer), Some(telling))),
                Some(Err(status)) => Some((Err(status), None)),
                None => None,
            }
        });
        Ok(Response::new(answers.boxed()))
    }
}

/// What one edge is told.
struct Telling {
    revocations: Revocations,
    changes: Receiver<Change>,
    /// What of the snapshot is not told yet; `None` before it was taken.
    snapshot: Option<VecDeque<Change>>,
    idle: Interval,
    /// Changes were passed by.
    lagged: bool,
    stop: CancellationToken,
}

impl Telling {
    async fn next(&mut self) -> Option<Result<WatchRevocationsResponse, Status>> {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => Some(Err(Status::unavailable("this node shuts down; ask another"))),
            next = self.tell() => next,
        }
    }

    async fn tell(&mut self) -> Option<Result<WatchRevocationsResponse, Status>> {
        if let Some(part) = self.part().await {
            return Some(Ok(part));
        }
        while !self.lagged {
            let change = tokio::select! {
                change = self.changes.recv() => change,
                // A node that does not see its store says nothing: it does not know whether something changed.
                _ = self.idle.tick() => {
                    if self.revocations.is_fresh() {
                        return Some(Ok(WatchRevocationsResponse::default()));
                    }
                    continue;
                }
            };
            return match change {
                Ok(first) => Some(Ok(self.with_others(&first))),
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => None,
            };
        }
        Some(Err(Status::aborted("the edge reads too slowly; begin anew")))
    }

    /// The next part of the snapshot; `None` when all of it was told. Waits until the node has seen its store.
    async fn part(&mut self) -> Option<WatchRevocationsResponse> {
        if self.snapshot.as_ref().is_some_and(VecDeque::is_empty) {
            return None;
        }
        let left = loop {
            if let Some(left) = &mut self.snapshot {
                break left;
            }
            match self.revocations.snapshot() {
                // One more that says nothing marks the end, also of nothing.
                Some(all) => self.snapshot = Some(all.into()),
                None => drop(self.idle.tick().await),
            }
            if let Some(left) = &self.snapshot
                && left.is_empty()
            {
                return Some(WatchRevocationsResponse { complete: true, ..Default::default() });
            }
        };
        let part: Vec<Change> = left.drain(..left.len().min(BATCH)).collect();
        Some(WatchRevocationsResponse {
            revoked: part.iter().map(revoked).collect(),
            complete: left.is_empty(),
        })
    }

    /// A change, and others that are there.
    fn with_others(&mut self, first: &Change) -> WatchRevocationsResponse {
        let mut changed = vec![revoked(first)];
        while changed.len() < BATCH {
            match self.changes.try_recv() {
                Ok(change) => changed.push(revoked(&change)),
                Err(TryRecvError::Lagged(_)) => {
                    self.lagged = true;
                    break;
                }
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        WatchRevocationsResponse { revoked: changed, complete: false }
    }
}
