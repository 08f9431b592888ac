//! The calls for dead letters: any API key may manage those of all senders, since any may send to anybody.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use sanjay_proto::delivery::v1::{
    DeadLetter, DeadLetterFilter, DeadReason, DeliveryFailure, GetDeadLetterRequest, ListDeadLettersRequest,
    ListDeadLettersResponse, PurgeDeadLettersRequest, PurgeDeadLettersResponse, RedriveDeadLettersRequest,
    RedriveDeadLettersResponse,
};
use sanjay_protocol::{ErrorCode, names};
use tokio::time::{Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{BackendApi, Refusal, backend::checked_message_id, stream::Answers, token};
use crate::{
    dead::{MAX_PAGE, Purged},
    redrive::{Progress, Redrive, RedriveError, Select, Shared},
    store::{self, DeadFilter},
};

/// Letters of a page when the request does not say.
const DEFAULT_PAGE: usize = 100;

/// Letters a second of a redrive when the request does not say, and the most that it may say.
const DEFAULT_RATE: u32 = 100;
const MAX_RATE: u32 = 10_000;

/// How often a redrive says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn list(
    api: &BackendApi,
    request: ListDeadLettersRequest,
) -> Result<ListDeadLettersResponse, Refusal> {
    let ListDeadLettersRequest { filter, page_size, page_token } = request;
    let filter = filter.unwrap_or_default();
    let limit = match page_size as usize {
        0 => DEFAULT_PAGE,
        size if size > MAX_PAGE => {
            return Err(Refusal::bad(format!(
                "page_size is {size}; 1 to {MAX_PAGE} are allowed, and 0 is {DEFAULT_PAGE}"
            )));
        }
        size => size,
    };
    let wanted = checked_filter(&filter)?;
    let after = token::decode(&page_token, &filter)?;
    let page = within(api, api.dead_letters.list(wanted, after, limit)).await??;
    Ok(ListDeadLettersResponse {
        next_page_token: page.next.map(|next| token::encode(next, &filter)).unwrap_or_default(),
        dead_letters: page.letters.into_iter().map(DeadLetter::from).collect(),
    })
}

pub(super) async fn get(api: &BackendApi, request: GetDeadLetterRequest) -> Result<DeadLetter, Refusal> {
    let GetDeadLetterRequest { user, message_id } = request;
    names::check("user", &user)?;
    let id = checked_message_id(&message_id)?;
    let letter = within(api, api.dead_letters.get(user.clone(), id)).await??;
    Ok(letter.ok_or(RedriveError::NotFound(user, id))?.into())
}

/// Checks what is to be sent again, and begins when the answer is read.
pub(super) fn redrive(
    api: &BackendApi,
    request: RedriveDeadLettersRequest,
    caller: Arc<str>,
) -> Result<Answers<RedriveDeadLettersResponse>, Refusal> {
    let RedriveDeadLettersRequest { filter, message_id, rate, dry_run } = request;
    let select = checked_selection(filter.unwrap_or_default(), &message_id)?;
    let rate = match rate {
        0 => DEFAULT_RATE,
        rate if rate > MAX_RATE => {
            return Err(Refusal::bad(format!(
                "rate is {rate} messages a second; 1 to {MAX_RATE} are allowed, and 0 is {DEFAULT_RATE}"
            )));
        }
        rate => rate,
    };
    let redrive = Redrive { caller, select, rate, dry_run };
    let (progress, letters) = (Shared::default(), api.dead_letters.clone());
    let noted = progress.clone();
    let work = async move { letters.redrive(redrive, noted).await }.boxed();
    Ok(answers(work, progress, api.stop.clone()))
}

pub(super) async fn purge(
    api: &BackendApi,
    request: PurgeDeadLettersRequest,
    caller: &str,
) -> Result<PurgeDeadLettersResponse, Refusal> {
    let PurgeDeadLettersRequest { filter, message_id, dry_run } = request;
    let letters = &api.dead_letters;
    let purged = match checked_selection(filter.unwrap_or_default(), &message_id)? {
        Select::One(user, id) => within(api, letters.purge_one(user, id, dry_run)).await??,
        Select::All(DeadFilter { user: None, reason: None, from_us: None, to_us: None, .. }) => {
            return Err(Refusal::bad(
                "filter is empty; say which dead letters to remove: by user, reason, from_us or to_us. All of them are those with to_us set to now",
            ));
        }
        // Half of the time is for its last page.
        Select::All(filter) => within(api, letters.purge(filter, dry_run, api.deadline / 2)).await??,
    };
    let Purged { count, more } = purged;
    if !dry_run {
        tracing::info!(caller, purged = count, more, "dead letters were purged");
    }
    Ok(PurgeDeadLettersResponse { purged: count, more })
}

/// Waits for an answer as long as a call may take.
pub(super) async fn within<T>(api: &BackendApi, answer: impl Future<Output = T>) -> Result<T, Refusal> {
    let late = |_| {
        let text = format!("no answer within {:?}; repeat the call, which does no harm", api.deadline);
        Refusal::new(ErrorCode::Unavailable, text)
    };
    tokio::time::timeout(api.deadline, answer).await.map_err(late)
}

/// A redrive as a stream of answers. It goes on while somebody reads them.
struct Answering {
    work: BoxFuture<'static, Result<(), RedriveError>>,
    progress: Shared,
    ticks: Interval,
    stop: CancellationToken,
}

fn answers(
    work: BoxFuture<'static, Result<(), RedriveError>>,
    progress: Shared,
    stop: CancellationToken,
) -> Answers<RedriveDeadLettersResponse> {
    let mut ticks = interval_at(tokio::time::Instant::now() + PROGRESS_EVERY, PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let answering = Answering { work, progress, ticks, stop };
    let answers = stream::unfold(Some(answering), |answering| async {
        let mut this = answering?;
        let result = tokio::select! {
            biased;
            result = &mut this.work => result.map_err(Refusal::from),
            () = this.stop.cancelled() => Err(Refusal::new(
                ErrorCode::Unavailable,
                "this server shuts down before the redrive is done",
            )),
            _ = this.ticks.tick() => {
                let answer = answer(&this.progress.lock(), false);
                return Some((Ok(answer), Some(this)));
            }
        };
        let last = answer(&this.progress.lock(), true);
        Some((result.map(|()| last).map_err(Status::from), None))
    });
    answers.boxed()
}

fn answer(progress: &Progress, done: bool) -> RedriveDeadLettersResponse {
    let Progress { total, examined, redriven, failed, problem } = progress.clone();
    RedriveDeadLettersResponse { examined, redriven, failed, problem, done, total }
}

fn checked_selection(filter: DeadLetterFilter, message_id: &str) -> Result<Select, Refusal> {
    let wanted = checked_filter(&filter)?;
    if message_id.is_empty() {
        return Ok(Select::All(wanted));
    }
    let id = checked_message_id(message_id)?;
    match wanted {
        DeadFilter { user: Some(user), reason: None, from_us: None, to_us: None, .. } => {
            Ok(Select::One(user, id))
        }
        DeadFilter { user: None, .. } => {
            Err(Refusal::bad("message_id is set, and filter.user is not; name the user of that message"))
        }
        _ => Err(Refusal::bad(
            "message_id names one dead letter; leave reason, from_us and to_us of the filter unset",
        )),
    }
}

fn checked_filter(filter: &DeadLetterFilter) -> Result<DeadFilter, Refusal> {
    let DeadLetterFilter { user, reason, from_us, to_us, redriven } = filter;
    names::check_optional("filter.user", user)?;
    let known = store::DeadReason::from_number(*reason);
    if *reason != 0 && known.is_none() {
        return Err(Refusal::bad(format!(
            "filter.reason is {reason}; 1 (max_attempts), 2 (terminated), 3 (queue_full) and 4 (expired) are known, and 0 is any"
        )));
    }
    if *to_us != 0 && from_us >= to_us {
        return Err(Refusal::bad(format!(
            "filter.from_us is {from_us} and filter.to_us is {to_us}, which no time is between; from_us is the earlier one"
        )));
    }
    let bound = |us: u64| (us != 0).then_some(us);
    Ok(DeadFilter {
        user: (!user.is_empty()).then(|| user.clone()),
        reason: known,
        from_us: bound(*from_us),
        to_us: bound(*to_us),
        redriven: *redriven,
    })
}

impl From<store::DeadLetter> for DeadLetter {
    fn from(letter: store::DeadLetter) -> Self {
        let failure = |failure: store::Failure| DeliveryFailure {
            time_us: failure.time_us,
            delivery: failure.delivery,
            kind: failure.kind.as_str().to_owned(),
            edge: failure.edge,
            session: failure.session.map(|session| session.to_string()).unwrap_or_default(),
            reason: failure.reason,
        };
        Self {
            message_id: letter.message_id.to_string(),
            user: letter.user,
            seq: letter.seq,
            caller: letter.caller,
            reason: DeadReason::try_from(letter.reason.number()).unwrap_or_default().into(),
            accepted_us: letter.accepted_us,
            died_us: letter.died_us,
            failures: letter.failures.into_iter().map(failure).collect(),
            trace: letter.trace,
            payload: letter.payload.map(|payload| (*payload).clone()),
            payload_bytes: letter.payload_bytes,
            redriven_as: letter.redriven_as.map(|id| id.to_string()).unwrap_or_default(),
        }
    }
}
