//! The calls that say what became of messages: the log of receipts, the deliveries of a user, and live events.

use std::sync::Arc;

use futures::{StreamExt, stream};
use sanjay_proto::delivery::v1::{
    DeadReason, DeliveryEvent, DeliveryEventKind, DeliveryState, ListDeliveriesRequest,
    ListDeliveriesResponse, ListedDelivery, Receipt, ReceiptFilter, ReceiptsRequest, ReceiptsResponse,
    WatchDeliveriesRequest, WatchDeliveriesResponse, watch_deliveries_response::Result as Watched,
};
use sanjay_protocol::{ErrorCode, names};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{BackendApi, Refusal, cursor, dead::within, stream::Answers};
use crate::{
    events::{Event, EventKind, Heard, Watcher},
    message::State,
    receipts::{Batch, Filter, IDLE, Reader},
    store::{self, DeliveriesQuery, LogError, LogStart, LoggedReceipt, MAX_DELIVERIES},
};

/// Deliveries of a page when the request does not say.
const DEFAULT_PAGE: usize = 100;

/// Most readers of the log at once: each may hold a page.
const MAX_READERS: usize = 64;

/// Room for those who read the log at once.
pub(crate) fn readers() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_READERS))
}

/// Checks what is to be read, and begins when the answer is read.
pub(super) fn receipts(
    api: &BackendApi,
    request: ReceiptsRequest,
) -> Result<Answers<ReceiptsResponse>, Status> {
    let ReceiptsRequest { cursor, from_now, filter, follow } = request;
    let from = match (cursor.is_empty(), from_now) {
        (true, true) => LogStart::Now,
        (true, false) => LogStart::Oldest,
        (false, false) => LogStart::After(cursor::decode(&cursor)?),
        (false, true) => {
            return Err(Refusal::bad("cursor and from_now are both set; each says where to begin").into());
        }
    };
    let filter = checked_filter(filter.unwrap_or_default())?;
    let permit = api.log_readers.clone().try_acquire_owned().map_err(|_| {
        let text =
            format!("{MAX_READERS} streams of receipts are open at this node, which is its limit; end one");
        Refusal::new(ErrorCode::RateLimited, text)
    })?;
    let reader = Reader::new(api.inbox.store.clone(), api.metrics.clone(), from, filter, follow);
    let reading = Reading { reader, stop: api.stop.clone(), _permit: permit };
    let answers = stream::unfold(Some(reading), |reading| async {
        let mut this = reading?;
        let next = tokio::select! {
            biased;
            () = this.stop.cancelled() => return Some((Err(stopping().into()), None)),
            next = this.reader.next() => next,
        };
        match next? {
            Ok(batch) => Some((Ok(response(batch)), Some(this))),
            Err(error) => Some((Err(status(error)), None)),
        }
    });
    Ok(answers.boxed())
}

/// The log on its way to a back end.
struct Reading {
    reader: Reader,
    stop: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

fn stopping() -> Refusal {
    Refusal::new(ErrorCode::Unavailable, "this server shuts down; go on at another, or when it is back")
}

fn status(error: LogError) -> Status {
    match error {
        LogError::Gone => Status::out_of_range(error.to_string()),
        LogError::Foreign => Refusal::bad(error.to_string()).into(),
        LogError::Store(error) => Refusal::from(error).into(),
    }
}

fn response(batch: Batch) -> ReceiptsResponse {
    let Batch { receipts, next, tail } = batch;
    let receipts = receipts.into_iter().map(Receipt::from).collect();
    ReceiptsResponse { receipts, cursor: cursor::encode(&next), tail }
}

impl From<LoggedReceipt> for Receipt {
    fn from(logged: LoggedReceipt) -> Self {
        let store::Receipt { seq, state, accepted_us, settled_us } = logged.receipt;
        Self {
            user: logged.user,
            message_id: logged.message_id.to_string(),
            seq,
            state: delivery_state(state).into(),
            caller: logged.caller,
            accepted_us,
            settled_us,
            reason: dead_reason(logged.reason).into(),
        }
    }
}

fn delivery_state(state: State) -> DeliveryState {
    DeliveryState::try_from(state.number()).unwrap_or_default()
}

fn dead_reason(reason: Option<store::DeadReason>) -> DeadReason {
    reason.and_then(|reason| DeadReason::try_from(reason.number()).ok()).unwrap_or_default()
}

fn checked_filter(filter: ReceiptFilter) -> Result<Filter, Refusal> {
    let ReceiptFilter { user, caller, states } = filter;
    names::check_optional("filter.user", &user)?;
    names::check_optional("filter.caller", &caller)?;
    let states = checked_states("filter.states", &states, State::is_terminal)?;
    let given = |text: String| (!text.is_empty()).then_some(text);
    Ok(Filter { user: given(user), caller: given(caller), states })
}

/// Reads states, of which only some are allowed.
fn checked_states(field: &str, states: &[i32], allowed: fn(State) -> bool) -> Result<Vec<State>, Refusal> {
    let known = |number: &i32| {
        State::from_number(*number).filter(|state| allowed(*state)).ok_or_else(|| {
            let named = |state: State| {
                let name = delivery_state(state).as_str_name().trim_start_matches("DELIVERY_STATE_");
                format!("{name} ({})", state.number())
            };
            let all: Vec<String> = State::all().filter(|state| allowed(*state)).map(named).collect();
            Refusal::bad(format!("{field} has {number}; it may have {}", all.join(", ")))
        })
    };
    states.iter().map(known).collect()
}

/// A page of a user's deliveries.
pub(super) async fn list(
    api: &BackendApi,
    request: ListDeliveriesRequest,
) -> Result<ListDeliveriesResponse, Refusal> {
    let print = cursor::fingerprint(&ListDeliveriesRequest {
        page_size: 0,
        page_token: String::new(),
        ..request.clone()
    });
    let ListDeliveriesRequest { user, states, caller, page_size, page_token } = request;
    names::check("user", &user)?;
    names::check_optional("caller", &caller)?;
    let limit = match page_size as usize {
        0 => DEFAULT_PAGE,
        size if size > MAX_DELIVERIES => {
            return Err(Refusal::bad(format!(
                "page_size is {size}; 1 to {MAX_DELIVERIES} are allowed, and 0 is {DEFAULT_PAGE}"
            )));
        }
        size => size,
    };
    let query = DeliveriesQuery {
        user,
        states: checked_states("states", &states, |_| true)?,
        caller: (!caller.is_empty()).then_some(caller),
        before: cursor::decode_page(&page_token, print)?,
        limit,
    };
    let page = within(api, api.inbox.store.deliveries(query)).await??;
    let next = page.next.map(|next| cursor::encode_page(next, print));
    let deliveries = page.deliveries.into_iter().map(ListedDelivery::from).collect();
    Ok(ListDeliveriesResponse { deliveries, next_page_token: next.unwrap_or_default() })
}

impl From<store::ListedDelivery> for ListedDelivery {
    fn from(listed: store::ListedDelivery) -> Self {
        let store::Receipt { seq, state, accepted_us, settled_us } = listed.receipt;
        Self {
            message_id: listed.message_id.to_string(),
            seq,
            state: delivery_state(state).into(),
            caller: listed.caller,
            accepted_us,
            settled_us,
            deliver_at_us: listed.deliver_us,
            reason: dead_reason(listed.reason).into(),
        }
    }
}

/// Which events somebody wants to hear of.
struct Wanted {
    user: String,
    caller: String,
    kinds: Vec<i32>,
}

impl Wanted {
    fn matches(&self, event: &Event) -> bool {
        (self.user.is_empty() || self.user == event.user)
            && (self.caller.is_empty() || self.caller == event.caller)
            && (self.kinds.is_empty() || self.kinds.contains(&(event.kind as i32)))
    }
}

/// Checks what is to be heard of; it is heard of from this call on.
pub(super) fn watch(
    api: &BackendApi,
    request: WatchDeliveriesRequest,
) -> Result<Answers<WatchDeliveriesResponse>, Refusal> {
    let WatchDeliveriesRequest { user, caller, kinds } = request;
    names::check_optional("user", &user)?;
    names::check_optional("caller", &caller)?;
    let known = |kind: i32| DeliveryEventKind::try_from(kind).is_ok_and(|kind| kind as i32 != 0);
    if let Some(kind) = kinds.iter().find(|kind| !known(**kind)) {
        let last = EventKind::InboxFilling as i32;
        return Err(Refusal::bad(format!(
            "kinds has {kind}; 1 (ACCEPTED) to {last} (INBOX_FILLING) are known"
        )));
    }
    let watcher = api.inbox.events.watch();
    let watcher = watcher.map_err(|error| Refusal::new(ErrorCode::RateLimited, error.to_string()))?;
    let watching = (watcher, Wanted { user, caller, kinds }, api.stop.clone());
    let answers = stream::unfold(Some(watching), |watching| async {
        let (mut watcher, wanted, stop) = watching?;
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => return Some((Err(stopping().into()), None)),
            heard = tokio::time::timeout(IDLE, hear(&mut watcher, &wanted)) => match heard {
                Ok(heard) => Some(heard?),
                Err(_) => None,
            },
        };
        Some((Ok(WatchDeliveriesResponse { result }), Some((watcher, wanted, stop))))
    });
    Ok(answers.boxed())
}

/// The next that is wanted; `None` when the node is gone.
async fn hear(watcher: &mut Watcher, wanted: &Wanted) -> Option<Watched> {
    loop {
        match watcher.next().await? {
            Heard::Missed(count) => return Some(Watched::Missed(count)),
            Heard::Event(event) if wanted.matches(&event) => return Some(Watched::Event(told(&event))),
            Heard::Event(_) => {}
        }
    }
}

fn told(event: &Event) -> DeliveryEvent {
    let Event { kind, time_us, user, message_id, seq, caller, detail } = event.clone();
    let message_id = message_id.map(|id| id.to_string()).unwrap_or_default();
    DeliveryEvent { kind: kind as i32, time_us, user, message_id, seq, caller, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_states_that_are_allowed_here() {
        let ends = |states: &[i32]| checked_states("filter.states", states, State::is_terminal);
        assert_eq!(ends(&[2, 5]), Ok(vec![State::Acked, State::Dead]));
        for wrong in [0, 1, 6, 99] {
            let why = ends(&[2, wrong]).unwrap_err().message;
            let expected = "ACKED (2), EXPIRED (3), SUPERSEDED (4), DEAD (5)";
            assert_eq!(why, format!("filter.states has {wrong}; it may have {expected}"));
        }
        let any = |states: &[i32]| checked_states("states", states, |_| true);
        assert_eq!(any(&[1, 6]), Ok(vec![State::Accepted, State::Scheduled]));
        assert!(any(&[7]).unwrap_err().message.contains("SCHEDULED (6), ACCEPTED (1)"));
    }

    #[test]
    fn kinds_are_those_of_the_api() {
        use EventKind::*;
        let all = [
            Accepted,
            Scheduled,
            Relayed,
            Written,
            Failing,
            Acked,
            Expired,
            Superseded,
            Dead,
            Exhausted,
            InboxFilling,
        ];
        for kind in all {
            let api = DeliveryEventKind::try_from(kind as i32).unwrap();
            let name = api.as_str_name().trim_start_matches("DELIVERY_EVENT_KIND_").replace('_', "");
            assert_eq!(name, format!("{kind:?}").to_uppercase());
        }
        assert!(DeliveryEventKind::try_from(all.len() as i32 + 1).is_err());
    }
}
