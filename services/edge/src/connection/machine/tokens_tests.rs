use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use sanjay_protocol::{
    Command, EventEnvelope,
    command::{Envelope, Publish, Subscribe},
    payload::Payload,
};
use sanjay_runtime::Namespace;
use uuid::Uuid;

use super::*;
use crate::{
    connection::machine::{Input, Terms},
    shard::wheel::Tick,
    verifier::TokenVerifier,
};

const CHANNEL: &str = "room:1";

/// Tokens are claims as JSON. A user `later` has a key that is looked up, and found when it is known.
struct Around {
    now_s: AtomicU64,
    known: AtomicBool,
}

impl TokenVerifier for Around {
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        if token.contains("later") && !self.known.load(Relaxed) {
            return Err(VerifyError::LookingUp);
        }
        let claims: Claims =
            serde_json::from_str(token).map_err(|_| VerifyError::Refused("malformed".into()))?;
        if claims.exp <= now_s { Err(VerifyError::Refused("expired".into())) } else { Ok(claims) }
    }

    fn verify_looked_up(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        match self.verify(token, now_s) {
            Err(VerifyError::LookingUp) => Err(VerifyError::Unavailable("no keys".into())),
            other => other,
        }
    }
}

impl Surroundings for Around {
    fn verifier(&self) -> &dyn TokenVerifier {
        self
    }
    fn now_s(&self) -> u64 {
        self.now_s.load(Relaxed)
    }
    fn session_id(&self) -> Uuid {
        Uuid::from_u128(1)
    }
    fn fraction(&self) -> f64 {
        0.5
    }
    fn intern(&self, capabilities: Capabilities) -> Rc<Capabilities> {
        Rc::new(capabilities)
    }
    fn terms(&self) -> Terms {
        Terms {
            heartbeat: std::time::Duration::from_secs(25),
            reconnect_spread: std::time::Duration::from_secs(5),
        }
    }
    fn ack_due(&self) -> Tick {
        500
    }
    fn namespace(&self, channel: &str) -> Namespace {
        Namespace { private: name_of(channel) == "private", ..Namespace::default() }
    }
}

/// A machine with its surroundings.
struct Bench {
    around: Around,
    machine: Machine,
}

fn token(sub: &str, exp: u64, caps: &str, channel: Option<&str>) -> String {
    let channel = channel.map_or(String::new(), |channel| format!(r#","channel":"{channel}""#));
    format!(r#"{{"sub":"{sub}","exp":{exp},"caps":{caps}{channel}}}"#)
}

impl Bench {
    fn new() -> Self {
        let around = Around { now_s: AtomicU64::new(1_000), known: AtomicBool::new(true) };
        Self { around, machine: Machine::new(None, Rc::from("")) }
    }

    /// Bob, until 1,100, with these capabilities.
    fn ready(caps: &str) -> Self {
        let mut bench = Self::new();
        bench.hello(&token("bob", 1_100, caps, None));
        bench.on(Input::SessionOpened(Ok(())));
        bench
    }

    fn on(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.machine.on(input, &self.around, &mut effects);
        effects
    }

    fn command(&mut self, command: Command) -> Vec<Effect> {
        self.on(Input::Command(Envelope { id: Some(7), command }))
    }

    fn hello(&mut self, token: &str) -> Vec<Effect> {
        self.command(Command::Hello(Hello {
            token: Some(token.to_owned()),
            credit: Some(0),
            ..Hello::default()
        }))
    }

    fn subscribe(&mut self, channel: &str, token: Option<String>) -> Vec<Effect> {
        self.command(Command::Subscribe(Subscribe {
            channel: channel.to_owned(),
            token,
            ..Subscribe::default()
        }))
    }

    fn publish(&mut self, channel: &str) -> Vec<Effect> {
        let payload = Payload::Text("hi".to_owned());
        let publish = Publish { channel: channel.to_owned(), payload, dedupe: String::new() };
        self.command(Command::Publish(publish))
    }

    fn refresh(&mut self, token: String, channel: Option<&str>) -> Vec<Effect> {
        self.command(Command::Refresh(Refresh { token, channel: channel.map(str::to_owned) }))
    }
}

fn error(effects: &[Effect]) -> Option<(ErrorCode, &str)> {
    match effects {
        [Effect::Send(EventEnvelope { id: Some(7), event: Event::Error(error) })] => {
            Some((error.code, &error.message))
        }
        _ => None,
    }
}

fn is_error(effects: &[Effect], code: ErrorCode, part: &str) -> bool {
    error(effects).is_some_and(|(found, message)| found == code && message.contains(part))
}

fn push(event: Event) -> Effect {
    Effect::Send(EventEnvelope { id: None, event })
}

#[test]
fn a_hello_whose_key_is_looked_up_waits_and_goes_on() {
    let mut bench = Bench::new();
    bench.around.known.store(false, Relaxed);
    assert_eq!(bench.hello(&token("later", 1_100, "{}", None)), [Effect::AwaitKeys]);
    assert!(bench.machine.is_looking_up() && !bench.machine.is_identified());
    assert!(!bench.machine.takes_commands(), "what follows hello waits");
    bench.around.known.store(true, Relaxed);
    assert_eq!(bench.on(Input::KeysLookedUp), [Effect::OpenSession { inbox: false }]);
    assert_eq!(&**bench.machine.user(), "later");
    assert_eq!(bench.on(Input::KeysLookedUp), []);
}

#[test]
fn a_hello_whose_key_is_not_found_is_told_to_come_back() {
    for input in [Input::KeysLookedUp, Input::NoRoomToWait] {
        let mut bench = Bench::new();
        bench.around.known.store(false, Relaxed);
        bench.hello(&token("later", 1_100, "{}", None));
        let effects = bench.on(input);
        assert!(matches!(effects[..], [Effect::Close(CloseCode::TryAgainLater, _)]), "{effects:?}");
    }
}

#[test]
fn a_subscription_token_opens_no_connection() {
    let mut bench = Bench::new();
    let effects = bench.hello(&token("bob", 1_100, "{}", Some(CHANNEL)));
    assert!(matches!(effects[..], [Effect::Close(CloseCode::Unauthorized, _)]), "{effects:?}");
}

#[test]
fn after_its_end_only_another_token_is_waited_for() {
    let mut bench = Bench::ready(r#"{"*":["subscribe","publish"]}"#);
    bench.around.now_s.store(1_100, Relaxed);
    let told = push(Event::TokenExpired(TokenExpired { close_in_ms: 25_000 }));
    assert_eq!(bench.on(Input::TokenEnded { close_in_s: 25 }), [told]);
    assert_eq!(bench.on(Input::TokenEnded { close_in_s: 24 }), [], "once");
    assert!(is_error(&bench.subscribe("a", None), ErrorCode::TokenExpired, "refresh"));
    assert!(is_error(&bench.publish("a"), ErrorCode::TokenExpired, "refresh"));
    let grant = token("bob", 1_200, "{}", Some("a"));
    assert!(is_error(&bench.subscribe("a", Some(grant)), ErrorCode::TokenExpired, "refresh"));
    let leave = Command::Unsubscribe(sanjay_protocol::command::Unsubscribe { channel: "a".into() });
    assert!(matches!(bench.command(leave)[..], [Effect::Leave(..)]), "what only ends something is taken");
    let answer =
        EventEnvelope { id: Some(7), event: Event::Refreshed(Refreshed { token_ttl_s: 100, channel: None }) };
    let again = token("bob", 1_200, r#"{"*":["publish"]}"#, None);
    let effects = bench.refresh(again, None);
    assert_eq!(effects, [Effect::ListChannels, Effect::Refreshed, Effect::Send(answer)]);
    assert_eq!(bench.machine.expires_s(), 1_200);
    assert!(matches!(bench.publish("a")[..], [Effect::Publish(..)]));
    assert!(is_error(&bench.subscribe("a", None), ErrorCode::Forbidden, "subscribe"));
}

#[test]
fn a_refresh_that_is_refused_changes_nothing() {
    let mut bench = Bench::ready(r#"{"a":["subscribe"]}"#);
    let all = r#"{"*":["subscribe"]}"#;
    assert!(is_error(&bench.refresh(token("eve", 2_000, all, None), None), ErrorCode::Forbidden, "user"));
    assert!(is_error(&bench.refresh(token("bob", 900, all, None), None), ErrorCode::Forbidden, "expired"));
    assert!(is_error(&bench.refresh("x".into(), None), ErrorCode::Forbidden, "malformed"));
    let subscription = token("bob", 2_000, all, Some("a"));
    assert!(is_error(&bench.refresh(subscription.clone(), None), ErrorCode::Forbidden, "subscription"));
    assert!(is_error(&bench.refresh(subscription, Some("a")), ErrorCode::NotSubscribed, "subscribe"));
    bench.around.known.store(false, Relaxed);
    let effects = bench.refresh(token("later", 2_000, all, None), None);
    assert!(is_error(&effects, ErrorCode::Unavailable, "looked up"));
    assert_eq!((bench.machine.expires_s(), bench.machine.is_expired()), (1_100, false));
    assert!(is_error(&bench.subscribe("b", None), ErrorCode::Forbidden, "caps"));
}

#[test]
fn what_new_capabilities_do_not_allow_ends() {
    let mut bench = Bench::ready(r#"{"*":["subscribe"]}"#);
    for channel in ["a", "b"] {
        bench.subscribe(channel, None);
    }
    bench.subscribe(CHANNEL, Some(token("bob", 2_000, "{}", Some(CHANNEL))));
    bench.refresh(token("bob", 1_200, r#"{"a":["subscribe"]}"#, None), None);
    let effects = bench.on(Input::Channels(vec!["a".into(), "b".into(), CHANNEL.into()]));
    let [Effect::EndSubscription(channel, error)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((channel.as_str(), error.code), ("b", ErrorCode::Forbidden));
    let effects = bench.on(Input::Ended(channel.clone(), error.clone()));
    let [Effect::Send(EventEnvelope { id: None, event: Event::Unsubscribed(told) })] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!((told.channel.as_str(), told.code, told.retryable), ("b", ErrorCode::Forbidden, false));
}

#[test]
fn a_subscription_token_is_for_one_user_and_one_channel() {
    let mut bench = Bench::ready("{}");
    let mut refused = |token: String, part: &str| {
        let effects = bench.subscribe(CHANNEL, Some(token));
        assert!(is_error(&effects, ErrorCode::Forbidden, part), "{part}: {effects:?}");
    };
    refused(token("eve", 2_000, "{}", Some(CHANNEL)), "another user's");
    refused(token("bob", 2_000, "{}", Some("room:2")), "room:2");
    refused(token("bob", 1_000, "{}", Some(CHANNEL)), "expired");
    refused(token("bob", 2_000, r#"{"*":["subscribe"]}"#, None), "claim `channel`");
    refused(token("bob", 2_000, r#"{"room:1":["publish"]}"#, Some(CHANNEL)), "do not allow");
    assert!(is_error(&bench.subscribe(CHANNEL, None), ErrorCode::Forbidden, "caps"));
    let good = token("bob", 2_000, "{}", Some(CHANNEL));
    assert!(matches!(bench.subscribe(CHANNEL, Some(good))[..], [Effect::Join(..)]));
    assert!(is_error(&bench.publish(CHANNEL), ErrorCode::Forbidden, "publish"), "subscribing alone");
}

#[test]
fn a_subscription_token_takes_the_place_of_capabilities_until_it_ends() {
    let mut bench = Bench::ready(r#"{"*":["subscribe","publish"]}"#);
    bench.subscribe(CHANNEL, Some(token("bob", 1_050, r#"{"room:*":["subscribe"]}"#, Some(CHANNEL))));
    assert!(is_error(&bench.publish(CHANNEL), ErrorCode::Forbidden, "publish"), "it grants less");
    assert!(matches!(bench.publish("room:2")[..], [Effect::Publish(..)]), "other channels are not its");
    assert_eq!(bench.machine.first_grant_ends_s(), Some(1_050));
    let renewed = token("bob", 1_080, r#"{"room:1":["subscribe","publish"]}"#, Some(CHANNEL));
    let effects = bench.refresh(renewed, Some(CHANNEL));
    assert!(matches!(effects[..], [Effect::Refreshed, Effect::Send(_)]), "{effects:?}");
    assert!(matches!(bench.publish(CHANNEL)[..], [Effect::Publish(..)]));
    bench.around.now_s.store(1_079, Relaxed);
    assert_eq!(bench.on(Input::GrantsEnded), []);
    bench.around.now_s.store(1_080, Relaxed);
    let effects = bench.on(Input::GrantsEnded);
    let [Effect::EndSubscription(channel, error)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((channel.as_str(), error.code, error.retryable), (CHANNEL, ErrorCode::TokenExpired, true));
    assert_eq!(bench.machine.first_grant_ends_s(), None);
}

#[test]
fn grants_are_bounded_and_end_with_their_subscription() {
    let mut bench = Bench::ready("{}");
    for n in 0..3 * limits::MAX_SUBSCRIPTIONS {
        let channel = format!("c{n}");
        bench.subscribe(&channel, Some(token("bob", 2_000, "{}", Some(&channel))));
        bench.on(Input::Joined(None, Err(forbidden("no"))));
    }
    let most = 2 * limits::MAX_SUBSCRIPTIONS;
    assert_eq!(bench.machine.grants.as_ref().map(|grants| grants.len()), Some(most));
    bench.machine.drop_grant("c767");
    assert_eq!(bench.machine.grants.as_ref().map(|grants| grants.len()), Some(most - 1));
}

#[test]
fn a_private_channel_takes_a_token_of_its_own() {
    let mut bench = Bench::ready(r#"{"*":["subscribe","publish"]}"#);
    assert!(is_error(&bench.subscribe("private:1", None), ErrorCode::Forbidden, "are private"));
    for token in [token("eve", 2_000, "{}", Some("private:1")), token("bob", 2_000, "{}", Some("private:2"))]
    {
        assert!(is_error(&bench.subscribe("private:1", Some(token)), ErrorCode::Forbidden, ""));
    }
    let good = token("bob", 2_000, "{}", Some("private:1"));
    assert!(matches!(bench.subscribe("private:1", Some(good))[..], [Effect::Join(..)]));
    // What was private all along stays; a channel that became private since ends with the next look.
    let effects = bench.on(Input::Channels(vec!["private:1".into(), "private:3".into(), "a".into()]));
    assert!(
        matches!(&effects[..], [Effect::EndSubscription(channel, _)] if channel == "private:3"),
        "{effects:?}"
    );
}
