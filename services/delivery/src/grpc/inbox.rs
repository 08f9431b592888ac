//! `sanjay.edge.v1.Inbox`: what edges ask of a delivery node.

use std::time::Duration;

use sanjay_proto::{
    client::v1::SeqRange,
    edge::v1::{
        AckRequest, AckResponse, FailedAttempt, FailureKind as Kind, InboxError, InboxPage, ReadInboxRequest,
        ReadInboxResponse, Rewritten, UserAck, UserAckResult, inbox_server::Inbox as InboxService,
    },
};
use sanjay_protocol::{
    ErrorCode,
    limits::{MAX_ACK_RANGES, MAX_NAK_DELAY_MS, MAX_REASON_BYTES},
    names,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::Refusal;
use crate::{
    inbox::Inbox,
    spans::AckTrace,
    store::{
        Acked, Failure, FailureKind, InboxQuery, MAX_SETTLED_RANGES, Page, RegisterError, Settle, StoreError,
    },
};

/// Most queries or acks of one call.
const MAX_ENTRIES: usize = 500;

/// Most redeliveries, and most failed attempts, of one entry.
const MAX_ATTEMPTS: usize = 256;

/// The edges' API.
#[derive(Clone)]
pub(crate) struct EdgeApi {
    pub(crate) inbox: Inbox,
    /// How long one call may take.
    pub(crate) deadline: Duration,
    /// Whether every device has to ack a message.
    pub(crate) every_device: bool,
}

#[tonic::async_trait]
impl InboxService for EdgeApi {
    async fn read_inbox(
        &self,
        request: Request<ReadInboxRequest>,
    ) -> Result<Response<ReadInboxResponse>, Status> {
        let queries = request.into_inner().queries;
        check_count("queries", queries.len())?;
        for query in &queries {
            names::check("user", &query.user).map_err(Refusal::from)?;
            names::check_optional("device", &query.device).map_err(Refusal::from)?;
        }
        let queries = queries
            .into_iter()
            .map(|query| InboxQuery {
                user: query.user,
                after: query.after,
                limit: query.limit as usize,
                only: Vec::new(),
                // One without a name is one device more.
                device: self.every_device.then_some(query.device),
            })
            .collect();
        let pages = tokio::time::timeout(self.deadline, self.inbox.read(queries)).await;
        let pages = pages.map_err(|_| Refusal::late(self.deadline))?;
        Ok(Response::new(ReadInboxResponse { pages: pages.into_iter().map(page).collect() }))
    }

    async fn ack(&self, request: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        let AckRequest { acks, edge } = request.into_inner();
        check_count("acks", acks.len())?;
        names::check_optional("edge", &edge).map_err(Refusal::from)?;
        // Next attempts are due by the store's clock.
        let now_us = self.inbox.store.clock().now_us();
        let mut reported = Vec::new();
        let mut settles = Vec::with_capacity(acks.len());
        let mut traces = Vec::with_capacity(acks.len());
        let shared = acks.iter().map(|ack| ack.shared).collect();
        for mut ack in acks {
            check_ack(&ack)?;
            let session = checked_session(&ack.session)?;
            let failed = std::mem::take(&mut ack.failed).into_iter();
            let failed = failed.map(|failed| checked_failure(failed, &edge, session, now_us));
            let failed = failed.collect::<Result<_, _>>()?;
            reported.append(&mut ack.milestones);
            let seq = ack.acked.iter().map(|range| range.to).max().unwrap_or_default();
            traces.push(AckTrace { seq, trace: std::mem::take(&mut ack.trace) });
            settles.push(Settle {
                user: ack.user,
                epoch: ack.epoch,
                ranges: ack.acked,
                written: ack.written,
                rewritten: ack
                    .rewritten
                    .into_iter()
                    .map(|Rewritten { seq, delivery }| (seq, delivery))
                    .collect(),
                failed,
                device: self.every_device.then_some(ack.device),
            });
        }
        let results =
            tokio::time::timeout(self.deadline, self.inbox.ack(settles, traces, shared, reported)).await;
        let results = results.map_err(|_| Refusal::late(self.deadline))?;
        Ok(Response::new(AckResponse { results: results.into_iter().map(ack_result).collect() }))
    }
}

fn check_count(field: &str, count: usize) -> Result<(), Refusal> {
    if count > MAX_ENTRIES {
        return Err(Refusal::bad(format!("{field} has {count} entries; at most {MAX_ENTRIES} are allowed")));
    }
    Ok(())
}

fn check_ack(ack: &UserAck) -> Result<(), Refusal> {
    names::check("user", &ack.user)?;
    names::check_optional("device", &ack.device)?;
    if ack.acked.len() > MAX_ACK_RANGES {
        let count = ack.acked.len();
        return Err(Refusal::bad(format!("acked has {count} ranges; at most {MAX_ACK_RANGES} are allowed")));
    }
    for (field, count) in [("rewritten", ack.rewritten.len()), ("failed", ack.failed.len())] {
        if count > MAX_ATTEMPTS {
            return Err(Refusal::bad(format!(
                "{field} has {count} entries; at most {MAX_ATTEMPTS} are allowed for a user"
            )));
        }
    }
    for Rewritten { seq, delivery } in &ack.rewritten {
        check_delivery("rewritten", *seq, *delivery)?;
    }
    match ack.acked.iter().find(|range| range.from == 0 || range.from > range.to) {
        Some(SeqRange { from, to }) => Err(Refusal::bad(format!(
            "acked has the range {from} to {to}; a range begins at 1 or above and ends no lower"
        ))),
        None => Ok(()),
    }
}

fn check_delivery(field: &str, seq: u64, delivery: u32) -> Result<(), Refusal> {
    if seq == 0 || delivery == 0 {
        return Err(Refusal::bad(format!("{field} has seq {seq}, delivery {delivery}; both count from 1")));
    }
    Ok(())
}

fn checked_session(session: &[u8]) -> Result<Option<Uuid>, Refusal> {
    if session.is_empty() {
        return Ok(None);
    }
    Uuid::from_slice(session).map(Some).map_err(|_| {
        Refusal::bad(format!("session has {} bytes; it is the 16 bytes of a UUID, or empty", session.len()))
    })
}

fn checked_failure(
    failed: FailedAttempt,
    edge: &str,
    session: Option<Uuid>,
    time_us: u64,
) -> Result<Failure, Refusal> {
    let kind = failed.kind();
    let FailedAttempt { seq, delivery, delay_ms, reason, .. } = failed;
    check_delivery("failed", seq, delivery)?;
    if delay_ms > MAX_NAK_DELAY_MS {
        return Err(Refusal::bad(format!(
            "failed has the delay_ms {delay_ms}; at most {MAX_NAK_DELAY_MS} are allowed"
        )));
    }
    if reason.len() > MAX_REASON_BYTES || reason.contains(char::is_control) {
        return Err(Refusal::bad(format!(
            "failed has a reason of {} bytes; at most {MAX_REASON_BYTES} without control characters are allowed",
            reason.len()
        )));
    }
    let kind = match kind {
        Kind::Nak => FailureKind::Nak(Duration::from_millis(delay_ms.into())),
        Kind::Deadline => FailureKind::Deadline,
        Kind::Term => FailureKind::Term,
        Kind::Unspecified => {
            return Err(Refusal::bad("failed has no kind that is known here; NAK, DEADLINE and TERM are"));
        }
    };
    Ok(Failure { seq, delivery, kind, time_us, edge: edge.to_owned(), session, reason })
}

fn page(page: Result<Page, RegisterError>) -> InboxPage {
    match page {
        Ok(Page { epoch, mark, head, covers, messages, .. }) => {
            InboxPage { epoch, mark, head, covers, messages, error: None }
        }
        Err(error) => {
            let refusal = Refusal::new(error.code(), error.to_string());
            InboxPage { error: Some(inbox_error(refusal)), ..InboxPage::default() }
        }
    }
}

fn ack_result(result: Result<Acked, StoreError>) -> UserAckResult {
    match result {
        Ok(acked) if acked.refused > 0 => {
            let message = format!(
                "{} ranges were not settled: the inbox has {MAX_SETTLED_RANGES} settled ranges above its mark; ack the oldest unsettled messages first",
                acked.refused
            );
            let error = Refusal::new(ErrorCode::LimitExceeded, message);
            UserAckResult { mark: acked.mark, error: Some(inbox_error(error)) }
        }
        Ok(acked) => UserAckResult { mark: acked.mark, error: None },
        Err(error) => UserAckResult { mark: 0, error: Some(inbox_error(error.into())) },
    }
}

fn inbox_error(refusal: Refusal) -> InboxError {
    InboxError { code: refusal.code.as_str().to_owned(), message: refusal.message }
}
