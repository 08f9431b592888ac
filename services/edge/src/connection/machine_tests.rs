use std::{cell::Cell, collections::BTreeMap};

use proptest::prelude::*;
use sanjay_proto::edge::v1::FailureKind;
use sanjay_protocol::{
    command::{Ack, Credit, Hello, Nak, Subscribe, Term, Unsubscribe, Working},
    payload::Payload,
    token::Claims,
};
use sanjay_runtime::namespaces::Publishers;

use super::*;
use crate::verifier::VerifyError;

/// Surroundings in which every token but a few is good, and says its user and capabilities itself.
struct Around {
    session: Cell<u128>,
}

impl Around {
    fn new() -> Self {
        Self { session: Cell::new(0) }
    }
}

struct Verifier;

impl TokenVerifier for Verifier {
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        let caps = match token {
            "refused" => return Err(VerifyError::Refused("the signature is wrong".into())),
            "unavailable" => return Err(VerifyError::Unavailable("no keys yet".into())),
            "reader" => serde_json::from_str(r#"{"*":["subscribe"]}"#).expect("capabilities"),
            _ => Capabilities::everything(),
        };
        let sub = if token == "nameless" { String::new() } else { "bob".to_owned() };
        Ok(Claims { sub, exp: now_s + 60, iat: None, nbf: None, jti: None, caps, channel: None })
    }
}

impl Surroundings for Around {
    fn verifier(&self) -> &dyn TokenVerifier {
        &Verifier
    }
    fn now_s(&self) -> u64 {
        1_000
    }
    fn session_id(&self) -> Uuid {
        self.session.set(self.session.get() + 1);
        Uuid::from_u128(self.session.get())
    }
    fn fraction(&self) -> f64 {
        0.5
    }
    fn intern(&self, capabilities: Capabilities) -> Rc<Capabilities> {
        Rc::new(capabilities)
    }
    fn terms(&self) -> Terms {
        Terms { heartbeat: Duration::from_secs(25), reconnect_spread: Duration::from_secs(5) }
    }
    fn ack_due(&self) -> Tick {
        500
    }
    fn namespace(&self, channel: &str) -> Namespace {
        match sanjay_runtime::namespaces::name_of(channel) {
            "private" => Namespace { private: true, ..Namespace::default() },
            "feed" => Namespace { publish: Publishers::Backends, ..Namespace::default() },
            "log" => Namespace { history_size: 5, ..Namespace::default() },
            "small" => Namespace { max_payload_bytes: 4, ..Namespace::default() },
            _ => Namespace::default(),
        }
    }
}

fn machine() -> Machine {
    Machine::new(None, Rc::from(""))
}

fn on(machine: &mut Machine, input: Input) -> Vec<Effect> {
    let mut effects = Vec::new();
    machine.on(input, &Around::new(), &mut effects);
    effects
}

fn command(id: u64, command: Command) -> Input {
    Input::Command(Envelope { id: Some(id), command })
}

fn hello(token: &str, credit: Option<u32>) -> Input {
    let token = Some(token.to_owned());
    command(1, Command::Hello(Hello { token, credit, ..Hello::default() }))
}

fn page(mark: u64, head: u64) -> InboxPage {
    let messages = (mark + 1..=head).map(|seq| InboxMessage { seq, delivery: 1, ..InboxMessage::default() });
    InboxPage { epoch: 7, mark, head, covers: head, messages: messages.collect(), error: None }
}

fn ready(token: &str) -> Machine {
    let mut machine = machine();
    on(&mut machine, hello(token, None));
    on(&mut machine, Input::SessionOpened(Ok(())));
    on(&mut machine, Input::Page(Ok(page(0, 2))));
    machine
}

fn error_code(effects: &[Effect]) -> Option<ErrorCode> {
    match effects {
        [Effect::Send(EventEnvelope { event: Event::Error(error), .. })] => Some(error.code),
        _ => None,
    }
}

#[test]
fn hello_registers_reads_and_welcomes() {
    let mut machine = machine();
    assert_eq!(on(&mut machine, hello("good", Some(3))), [Effect::OpenSession { inbox: true }]);
    assert!(!machine.takes_commands(), "what follows hello waits for welcome");
    let read = Effect::ReadInbox { after: None, limit: 3 };
    assert_eq!(on(&mut machine, Input::SessionOpened(Ok(()))), [read]);
    let effects = on(&mut machine, Input::Page(Ok(page(4, 6))));
    let [Effect::Send(welcome), Effect::PushInbox(first), Effect::PushInbox(second)] = &effects[..] else {
        panic!("{effects:?}");
    };
    let Event::Welcome(body) = &welcome.event else { panic!("{welcome:?}") };
    let inbox = InboxState { epoch: "0000000000000007".into(), mark: 4, head: 6 };
    assert_eq!((welcome.id, body.user.as_str(), &body.inbox), (Some(1), "bob", &Some(inbox)));
    assert_eq!((body.token_ttl_s, body.features.len()), (60, 0));
    assert_eq!((first.seq, second.seq), (5, 6));
    assert!(machine.takes_commands());
}

#[test]
fn without_credit_nothing_is_read() {
    let mut machine = machine();
    assert_eq!(on(&mut machine, hello("good", Some(0))), [Effect::OpenSession { inbox: false }]);
    let effects = on(&mut machine, Input::SessionOpened(Ok(())));
    let [Effect::Send(EventEnvelope { event: Event::Welcome(welcome), .. })] = &effects[..] else {
        panic!("{effects:?}");
    };
    assert_eq!((&welcome.inbox, welcome.features.len()), (&None, 0));
    let ack = Command::Ack(Ack { ranges: vec![(1, 1)], trace: String::new() });
    assert_eq!(error_code(&on(&mut machine, command(2, ack))), Some(ErrorCode::BadRequest));
}

#[test]
fn a_router_that_is_back_is_announced() {
    let mut machine = machine();
    on(&mut machine, hello("good", Some(0)));
    let away = ErrorBody::new(ErrorCode::Unavailable, "away");
    let effects = on(&mut machine, Input::SessionOpened(Err(away)));
    let [Effect::Send(EventEnvelope { event: Event::Welcome(welcome), .. })] = &effects[..] else {
        panic!("{effects:?}");
    };
    assert_eq!(welcome.features, ["channels"]);
    let all_well = Event::Degraded(Degraded { features: Vec::new(), inbox: None });
    let sent = [Effect::Send(EventEnvelope { id: None, event: all_well })];
    assert_eq!(on(&mut machine, Input::SessionOpened(Ok(()))), sent);
    assert_eq!(on(&mut machine, Input::SessionOpened(Ok(()))), []);
}

#[test]
fn what_is_away_is_said_and_tried_again() {
    let mut machine = machine();
    on(&mut machine, hello("good", None));
    let away = || ErrorBody::new(ErrorCode::Unavailable, "away");
    on(&mut machine, Input::SessionOpened(Err(away())));
    let effects = on(&mut machine, Input::Page(Err(away())));
    let [Effect::Send(EventEnvelope { event: Event::Welcome(welcome), .. }), Effect::ArmInbox(_)] =
        &effects[..]
    else {
        panic!("{effects:?}");
    };
    assert_eq!(welcome.features, ["channels", "inbox"]);
    let read = Effect::ReadInbox { after: None, limit: limits::DEFAULT_CREDIT };
    assert_eq!(on(&mut machine, Input::InboxTimer), [read]);
    let effects = on(&mut machine, Input::Page(Ok(page(0, 1))));
    let [Effect::Send(EventEnvelope { event: Event::Degraded(degraded), .. }), Effect::PushInbox(_)] =
        &effects[..]
    else {
        panic!("{effects:?}");
    };
    assert_eq!(
        (&degraded.features[..], degraded.inbox.as_ref().map(|inbox| inbox.head)),
        (&["channels".to_owned()][..], Some(1))
    );
}

#[test]
fn a_change_of_what_is_reduced_is_told_once() {
    let mut machine = ready("good");
    let told = |effects: &[Effect]| match effects {
        [Effect::Send(EventEnvelope { event: Event::Degraded(degraded), .. }), ..] => {
            Some(degraded.features.clone())
        }
        _ => None,
    };
    let away = || ErrorBody::new(ErrorCode::Unavailable, "away");
    assert_eq!(told(&on(&mut machine, Input::SessionOpened(Err(away())))), Some(vec!["channels".into()]));
    assert_eq!(on(&mut machine, Input::SessionOpened(Err(away()))), []);
    on(&mut machine, Input::Resync);
    let effects = on(&mut machine, Input::Page(Err(away())));
    assert_eq!(told(&effects), Some(vec!["channels".into(), "inbox".into()]));
    on(&mut machine, Input::InboxTimer);
    assert_eq!(told(&on(&mut machine, Input::Page(Ok(page(2, 2))))), Some(vec!["channels".into()]));
    let effects = on(&mut machine, Input::SessionOpened(Ok(())));
    assert_eq!(
        (told(&effects), effects.len()),
        (Some(vec![]), 2),
        "all is well, and the inbox is read again"
    );
}

#[test]
fn hello_is_first_and_once() {
    let subscribe =
        || command(1, Command::Subscribe(Subscribe { channel: "a".into(), ..Subscribe::default() }));
    let effects = on(&mut machine(), subscribe());
    assert!(matches!(effects[..], [Effect::Close(CloseCode::BadFrame, _)]), "{effects:?}");
    let refused = Refused::Command { id: None, error: ErrorBody::new(ErrorCode::BadRequest, "no") };
    let effects = on(&mut machine(), Input::Refused(refused));
    assert!(matches!(effects[..], [Effect::Close(CloseCode::BadFrame, _)]), "{effects:?}");
    let mut machine = ready("good");
    assert_eq!(error_code(&on(&mut machine, hello("good", None))), Some(ErrorCode::BadRequest));
}

#[test]
fn a_token_that_is_no_good_closes() {
    let closes = |input| match &on(&mut machine(), input)[..] {
        [Effect::Close(code, _)] => *code,
        effects => panic!("{effects:?}"),
    };
    assert_eq!(closes(hello("refused", None)), CloseCode::Unauthorized);
    assert_eq!(closes(hello("nameless", None)), CloseCode::Unauthorized);
    assert_eq!(closes(hello("unavailable", None)), CloseCode::TryAgainLater);
    assert_eq!(closes(command(1, Command::Hello(Hello::default()))), CloseCode::Unauthorized);
    assert_eq!(closes(Input::Refused(Refused::Malformed("x".into()))), CloseCode::BadFrame);
}

#[test]
fn the_token_of_the_handshake_serves_when_hello_has_none() {
    let mut machine = Machine::new(Some("good".into()), Rc::from(""));
    let effects = on(&mut machine, command(1, Command::Hello(Hello::default())));
    assert_eq!(effects, [Effect::OpenSession { inbox: true }]);
}

#[test]
fn what_the_token_does_not_allow_is_forbidden() {
    let mut machine = ready("reader");
    let publish = Command::Publish(Publish {
        channel: "a".into(),
        payload: Payload::Text("x".into()),
        dedupe: String::new(),
    });
    assert_eq!(error_code(&on(&mut machine, command(2, publish))), Some(ErrorCode::Forbidden));
    let subscribe = Command::Subscribe(Subscribe { channel: "a".into(), ..Subscribe::default() });
    assert_eq!(on(&mut machine, command(3, subscribe)), [Effect::Join(Some(3), "a".into())]);
}

#[test]
fn channels_of_a_connection_are_bounded() {
    let mut machine = ready("good");
    let subscribe = |n: usize| {
        command(n as u64, Command::Subscribe(Subscribe { channel: n.to_string(), ..Subscribe::default() }))
    };
    let confirmed = |n: usize| {
        let subscribed =
            Subscribed { channel: n.to_string(), epoch: "e".into(), offset: 0, ..Subscribed::default() };
        Input::Joined(Some(n as u64), Ok(subscribed))
    };
    for n in 0..limits::MAX_SUBSCRIPTIONS {
        assert!(matches!(on(&mut machine, subscribe(n))[..], [Effect::Join(..)]));
        on(&mut machine, confirmed(n));
    }
    assert_eq!(error_code(&on(&mut machine, subscribe(999))), Some(ErrorCode::LimitExceeded));
    on(&mut machine, command(1, Command::Unsubscribe(Unsubscribe { channel: "0".into() })));
    on(&mut machine, Input::Left(Some(1), Ok(())));
    assert!(matches!(on(&mut machine, subscribe(999))[..], [Effect::Join(..)]));
}

#[test]
fn an_ack_settles_what_was_pushed() {
    let mut machine = ready("good");
    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let traced = |id, from, to, trace: &str| {
        let ack = Command::Ack(Ack { ranges: vec![(from, to)], trace: trace.to_owned() });
        Input::Command(Envelope { id, command: ack })
    };
    let ack = |id, from, to| traced(id, from, to, "");
    let expected = Effect::Ack { id: None, epoch: 7, ranges: vec![(1, 2)], trace: TRACE.into() };
    assert_eq!(on(&mut machine, traced(None, 1, 900, TRACE)), [expected]);
    for useless in ["x", &TRACE.replace("-01", "-00"), &format!("{TRACE}-{}", "y".repeat(9_000))] {
        let expected = Effect::Ack { id: Some(5), epoch: 7, ranges: vec![(2, 2)], trace: String::new() };
        assert_eq!(on(&mut machine, traced(Some(5), 2, 2, useless)), [expected]);
    }
    let acked = on(&mut machine, Input::Acked(Some(5), Ok(())));
    assert_eq!(acked, [Effect::Send(EventEnvelope { id: Some(5), event: Event::Ok(Empty {}) })]);
    assert_eq!(on(&mut machine, ack(None, 3, 3)), [], "nothing that was pushed");
    assert_eq!(error_code(&on(&mut machine, ack(Some(6), 3, 3))), Some(ErrorCode::BadRequest));
}

/// A machine that was sent two messages, whose deadlines end at tick 400.
fn sent() -> Machine {
    let mut machine = ready("good");
    machine.inbox_mut().expect("an inbox").on_handed(2, crate::in_flight::Written::Until(400));
    machine
}

fn error_text(effects: &[Effect]) -> &str {
    match effects {
        [Effect::Send(EventEnvelope { event: Event::Error(error), .. })] => &error.message,
        _ => panic!("{effects:?}"),
    }
}

#[test]
fn nak_and_term_give_a_delivery_back() {
    let mut machine = sent();
    let nak = |seq, delivery| Command::Nak(Nak { seq, delivery, delay_ms: 70, reason: "busy".into() });
    let attempt = |seq, kind: FailureKind, delay_ms| FailedAttempt {
        seq,
        delivery: 1,
        kind: kind.into(),
        delay_ms,
        reason: "busy".into(),
    };
    let failed = attempt(1, FailureKind::Nak, 70);
    assert_eq!(on(&mut machine, command(5, nak(1, 1))), [Effect::Fail { id: Some(5), epoch: 7, failed }]);
    let ok = [Effect::Send(EventEnvelope { id: Some(5), event: Event::Ok(Empty {}) })];
    assert_eq!(on(&mut machine, Input::Acked(Some(5), Ok(()))), ok);
    let term = Command::Term(Term { seq: 2, delivery: 1, reason: "busy".into() });
    let failed = attempt(2, FailureKind::Term, 0);
    let term = Input::Command(Envelope { id: None, command: term });
    assert_eq!(on(&mut machine, term), [Effect::Fail { id: None, epoch: 7, failed }]);
}

#[test]
fn a_stale_delivery_is_ignored_and_explained_to_who_asks() {
    let mut machine = sent();
    let nak = |seq, delivery| Command::Nak(Nak { seq, delivery, delay_ms: 0, reason: String::new() });
    let working = |seq, delivery| Command::Working(Working { seq, delivery });
    let silent = Input::Command(Envelope { id: None, command: nak(1, 2) });
    assert_eq!(on(&mut machine, silent), []);
    let says = |machine: &mut Machine, asked| error_text(&on(machine, command(6, asked))).to_owned();
    assert!(says(&mut machine, nak(1, 2)).contains("the one in flight, which is 1"));
    assert!(says(&mut machine, nak(3, 1)).contains("seq 3 was not sent on this connection"));
    on(&mut machine, command(7, nak(1, 1)));
    assert!(says(&mut machine, nak(1, 1)).contains("delivery 1 failed already"));
    assert!(says(&mut machine, working(1, 1)).contains("delivery 1 failed already"));
    assert!(says(&mut machine, nak(1, 2)).contains("delivery 2 of seq 1 was not sent on this connection"));
    on(&mut machine, command(8, Command::Ack(Ack { ranges: vec![(1, 1)], trace: String::new() })));
    assert!(says(&mut machine, nak(1, 1)).contains("it was acknowledged or settled"));
    let mut without = self::machine();
    on(&mut without, hello("good", Some(0)));
    on(&mut without, Input::SessionOpened(Ok(())));
    assert!(says(&mut without, nak(1, 1)).contains("no inbox (credit 0)"));
    assert!(says(&mut without, working(1, 1)).contains("no inbox (credit 0)"));
}

#[test]
fn what_a_living_client_lets_pass_has_failed() {
    let mut machine = sent();
    let working = Command::Working(Working { seq: 2, delivery: 1 });
    let ok = [Effect::Send(EventEnvelope { id: Some(5), event: Event::Ok(Empty {}) })];
    assert_eq!(on(&mut machine, command(5, working)), ok);
    assert_eq!(on(&mut machine, Input::Alive(399)), []);
    let overdue = |seq| {
        let failed = vec![FailedAttempt {
            seq,
            delivery: 1,
            kind: FailureKind::Deadline.into(),
            ..FailedAttempt::default()
        }];
        [Effect::Overdue { epoch: 7, failed }]
    };
    assert_eq!(on(&mut machine, Input::Alive(400)), overdue(1));
    assert_eq!(on(&mut machine, Input::Alive(499)), []);
    assert_eq!(on(&mut machine, Input::Alive(500)), overdue(2));
    let again = InboxMessage { seq: 1, delivery: 2, ..InboxMessage::default() };
    assert_eq!(on(&mut machine, Input::Hint(7, again.clone())), [Effect::PushInbox(again)]);
}

#[test]
fn only_a_ping_with_an_id_is_answered() {
    let mut machine = ready("good");
    let ping = |id| Input::Command(Envelope { id, command: Command::Ping });
    assert_eq!(on(&mut machine, ping(None)), []);
    assert_eq!(
        on(&mut machine, ping(Some(4))),
        [Effect::Send(EventEnvelope { id: Some(4), event: Event::Ping })]
    );
}

#[derive(Debug, Clone)]
enum Op {
    Command(Command),
    Refused,
    Answer(bool),
    Hint(u64, u32),
    Resync,
    Timer,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let channel = || (0..4u8).prop_map(|n| n.to_string());
    let publish = |channel| Publish { channel, payload: Payload::Text("x".into()), dedupe: String::new() };
    let op = prop_oneof![
        2 => Just(Op::Command(Command::Hello(Hello { token: Some("good".into()), ..Hello::default() }))),
        1 => Just(Op::Command(Command::Ping)),
        4 => channel().prop_map(|channel| Op::Command(Command::Subscribe(Subscribe { channel, ..Subscribe::default() }))),
        2 => channel().prop_map(|channel| Op::Command(Command::Unsubscribe(Unsubscribe { channel }))),
        4 => channel().prop_map(move |channel| Op::Command(Command::Publish(publish(channel)))),
        3 => (1..9u64).prop_map(|to| Op::Command(Command::Ack(Ack { ranges: vec![(1, to)], trace: String::new() }))),
        3 => ((1..9u64), 1..3u32).prop_map(|(seq, delivery)| {
            Op::Command(Command::Nak(Nak { seq, delivery, delay_ms: 0, reason: String::new() }))
        }),
        1 => ((1..9u64), 1..3u32).prop_map(|(seq, delivery)| {
            Op::Command(Command::Working(Working { seq, delivery }))
        }),
        1 => (1..9u32).prop_map(|n| Op::Command(Command::Credit(Credit { n }))),
        1 => Just(Op::Refused),
        8 => prop::bool::weighted(0.8).prop_map(Op::Answer),
        4 => (1..9u64, 1..3u32).prop_map(|(seq, delivery)| Op::Hint(seq, delivery)),
        1 => Just(Op::Resync),
        1 => Just(Op::Timer),
    ];
    prop::collection::vec(op, 0..120)
}

/// Runs operations as a shard would, and checks what must hold whatever comes.
struct Driver {
    machine: Machine,
    around: Around,
    /// Effects that wait for an answer.
    asked: Vec<Effect>,
    /// How many replies each id got.
    replies: BTreeMap<u64, u32>,
    next_id: u64,
    welcomed: bool,
    closed: bool,
    head: u64,
}

impl Driver {
    fn input(&mut self, input: Input) {
        let mut effects = Vec::new();
        self.machine.on(input, &self.around, &mut effects);
        assert!(!self.closed || effects.is_empty(), "something happens after the end: {effects:?}");
        for effect in effects {
            match &effect {
                Effect::Send(EventEnvelope { id, event }) => {
                    self.welcomed |= matches!(event, Event::Welcome(_));
                    assert!(self.welcomed || matches!(event, Event::Ping), "{event:?} before welcome");
                    if let Some(id) = id {
                        *self.replies.entry(*id).or_default() += 1;
                    }
                }
                Effect::PushInbox(_) => assert!(self.welcomed, "a message before welcome"),
                Effect::Close(..) => self.closed = true,
                Effect::ArmInbox(_) => {}
                _ => self.asked.push(effect),
            }
        }
        let waiting = self.asked.iter().filter(|effect| !matches!(effect, Effect::ReadInbox { .. })).count();
        assert!(waiting <= limits::MAX_OUTSTANDING_COMMANDS + 8, "{waiting} commands wait");
    }

    fn answer(&mut self, well: bool) {
        if self.asked.is_empty() {
            return;
        }
        let away = || ErrorBody::new(ErrorCode::Unavailable, "away");
        let answer = match self.asked.remove(0) {
            Effect::OpenSession { .. } => Input::SessionOpened(if well { Ok(()) } else { Err(away()) }),
            Effect::ReadInbox { after, .. } => {
                let after = after.unwrap_or(0).min(self.head);
                Input::Page(if well { Ok(page(after, self.head)) } else { Err(away()) })
            }
            Effect::Join(id, channel) => {
                let subscribed =
                    Subscribed { channel, epoch: "e".into(), offset: 0, ..Subscribed::default() };
                Input::Joined(id, if well { Ok(subscribed) } else { Err(away()) })
            }
            Effect::Leave(id, _) => Input::Left(id, if well { Ok(()) } else { Err(away()) }),
            Effect::Publish(id, _) => {
                let published = Published { message_id: "m".into(), epoch: "e".into(), offset: 1 };
                Input::Published(id, if well { Ok(published) } else { Err(away()) })
            }
            Effect::Ack { id, .. } | Effect::Fail { id, .. } => {
                Input::Acked(id, if well { Ok(()) } else { Err(away()) })
            }
            _ => return,
        };
        self.input(answer);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Command(_) | Op::Refused if !self.machine.takes_commands() => {}
            Op::Command(command) => {
                self.next_id += 1;
                self.replies.insert(self.next_id, 0);
                self.input(Input::Command(Envelope { id: Some(self.next_id), command }));
            }
            Op::Refused => {
                let error = ErrorBody::new(ErrorCode::BadRequest, "no");
                self.input(Input::Refused(Refused::Command { id: None, error }));
            }
            Op::Answer(well) => self.answer(well),
            Op::Hint(seq, delivery) => {
                self.head = self.head.max(seq);
                self.input(Input::Hint(7, InboxMessage { seq, delivery, ..InboxMessage::default() }));
            }
            Op::Resync => self.input(Input::Resync),
            Op::Timer => self.input(Input::InboxTimer),
        }
    }
}

proptest! {
    #[test]
    fn every_command_is_answered_once(ops in ops()) {
        let mut driver = Driver {
            machine: machine(), around: Around::new(), asked: Vec::new(), replies: BTreeMap::new(),
            next_id: 0, welcomed: false, closed: false, head: 0,
        };
        ops.into_iter().for_each(|op| driver.apply(op));
        for _ in 0..200 {
            driver.answer(true);
        }
        if !driver.closed {
            for (id, replies) in &driver.replies {
                prop_assert_eq!(*replies, 1, "command {} got {} replies", id, replies);
            }
        }
    }
}

#[test]
fn a_client_hears_of_what_was_settled_elsewhere() {
    let mut machine = ready("good");
    let settled = Event::Settled(sanjay_protocol::event::Settled {
        epoch: "0000000000000007".into(),
        ranges: vec![(1, 2)],
    });
    let told = [Effect::Send(EventEnvelope { id: None, event: settled })];
    assert_eq!(on(&mut machine, Input::Settled(7, vec![(1, 9)])), told);
    assert_eq!(on(&mut machine, Input::Settled(7, vec![(1, 9)])), [], "there is nothing left to tell");
    let nak = Command::Nak(Nak { seq: 1, delivery: 1, delay_ms: 0, reason: String::new() });
    assert_eq!(error_code(&on(&mut machine, command(5, nak))), Some(ErrorCode::BadRequest));
    // Its ack does no harm.
    let ack = Command::Ack(Ack { ranges: vec![(1, 1)], trace: String::new() });
    assert!(matches!(&on(&mut machine, command(6, ack))[..], [Effect::Ack { .. }]));
}

#[test]
fn a_device_for_which_there_is_no_room_is_told_and_closed() {
    let mut machine = machine();
    on(&mut machine, hello("good", None));
    on(&mut machine, Input::SessionOpened(Ok(())));
    let error = ErrorBody::new(ErrorCode::LimitExceeded, "too many");
    let close = Effect::Close(CloseCode::Forbidden, "too many".into());
    assert_eq!(on(&mut machine, Input::Page(Err(error))), [close]);
    assert_eq!(on(&mut machine, Input::Resync), []);
}

#[test]
fn a_namespace_denies_what_a_capability_allows() {
    let mut machine = ready("good");
    let publish = |channel: &str, text: &str| {
        let payload = Payload::Text(text.into());
        command(2, Command::Publish(Publish { channel: channel.into(), payload, dedupe: String::new() }))
    };
    let subscribe = |channel: &str| {
        command(3, Command::Subscribe(Subscribe { channel: channel.into(), ..Subscribe::default() }))
    };
    let cases = [
        (subscribe("private:1"), ErrorCode::Forbidden, "channels of the namespace \"private\" are private"),
        (
            publish("feed:1", "x"),
            ErrorCode::Forbidden,
            "only back ends publish to channels of the namespace \"feed\"",
        ),
        (
            publish("small:1", "fünf"),
            ErrorCode::PayloadTooLarge,
            "payload has 5 bytes; at most 4 are allowed in the namespace",
        ),
    ];
    for (input, code, text) in cases {
        let effects = on(&mut machine, input);
        assert_eq!(error_code(&effects), Some(code), "{effects:?}");
        assert!(format!("{effects:?}").contains(&text.replace('"', "\\\"")), "{effects:?}");
    }
    for allowed in [subscribe("feed:1"), publish("private:1", "x"), publish("small:1", "four")] {
        let effects = on(&mut machine, allowed);
        assert!(matches!(&effects[..], [Effect::Join(..) | Effect::Publish(..)]), "{effects:?}");
    }
    // Without the capability the namespace is not even looked at.
    let mut reader = ready("reader");
    let effects = on(&mut reader, publish("feed:1", "x"));
    assert!(format!("{effects:?}").contains("the token does not allow"), "{effects:?}");
}

#[test]
fn an_answer_with_many_messages_comes_alone() {
    let place = || sanjay_protocol::Position { epoch: "e".into(), offset: 3 };
    let mut machine = ready("good");
    let recover = |id| {
        Command::Subscribe(Subscribe { channel: "log:1".into(), recover: Some(place()), token: None })
            .envelope(id)
    };
    let read = |channel: &str| ReadHistory { channel: channel.into(), since: None, limit: 5 };
    let effects = on(&mut machine, recover(Some(2)));
    assert_eq!(effects, [Effect::Recover(2, "log:1".into(), place())]);
    assert!(!machine.takes_commands(), "nothing more is taken before it");
    assert_eq!(on(&mut machine, Input::Recovered(2, Ok(()))), [], "the shard has sent the answer");
    assert!(machine.takes_commands());
    let effects = on(&mut machine, command(3, Command::History(read("log:1"))));
    assert_eq!(effects, [Effect::ReadHistory(3, read("log:1"))]);
    assert!(!machine.takes_commands());
    let effects = on(&mut machine, Input::History(3, Ok(History::default())));
    assert!(matches!(&effects[..], [Effect::Send(EventEnvelope { id: Some(3), event: Event::History(_) })]));
    assert!(machine.takes_commands());
    // A failure is told, and gives the subscription's place back.
    on(&mut machine, recover(Some(4)));
    let error = ErrorBody::new(ErrorCode::Unavailable, "away");
    assert_eq!(error_code(&on(&mut machine, Input::Recovered(4, Err(error)))), Some(ErrorCode::Unavailable));
    assert!(machine.takes_commands() && machine.subscriptions == 1);
}

#[test]
fn what_would_be_answered_to_nobody_or_from_nothing_is_refused() {
    let mut machine = ready("good");
    let read =
        |channel: &str| Command::History(ReadHistory { channel: channel.into(), since: None, limit: 5 });
    let place = Some(sanjay_protocol::Position { epoch: "e".into(), offset: 3 });
    let recover = Command::Subscribe(Subscribe { channel: "log:1".into(), recover: place, token: None });
    for (input, text) in [
        (recover.envelope(None), "subscribe with recover needs an id"),
        (read("log:1").envelope(None), "history needs an id"),
        (read("news").envelope(Some(2)), "keep no history"),
    ] {
        let effects = on(&mut machine, input);
        assert_eq!(error_code(&effects), Some(ErrorCode::BadRequest), "{effects:?}");
        assert!(format!("{effects:?}").contains(text), "{effects:?}");
    }
    assert!(machine.takes_commands() && machine.subscriptions == 0);
    let mut reader = ready("reader");
    let effects = on(&mut reader, read("log:1").envelope(Some(2)));
    assert_eq!(error_code(&effects), Some(ErrorCode::Forbidden));
    assert!(format!("{effects:?}").contains("does not allow to read the history of"), "{effects:?}");
}

trait Enveloped {
    fn envelope(self, id: Option<u64>) -> Input;
}

impl Enveloped for Command {
    fn envelope(self, id: Option<u64>) -> Input {
        Input::Command(Envelope { id, command: self })
    }
}
