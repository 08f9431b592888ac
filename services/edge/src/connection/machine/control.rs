//! What back ends and revocations have to do with a connection.

use sanjay_protocol::{event::Unsubscribed, names, token::Claims};

use super::*;
use crate::revocations::Held;

/// What few clients say of themselves, and few tokens of theirs.
#[derive(Debug, Default)]
pub(super) struct More {
    pub(super) device: Box<str>,
    pub(super) client: Box<str>,
    pub(super) jti: Box<str>,
}

impl More {
    /// Nothing costs nothing.
    pub(super) fn new(device: String, client: String, jti: String) -> Option<Box<Self>> {
        let any = !(device.is_empty() && client.is_empty() && jti.is_empty());
        any.then(|| Box::new(Self { device: device.into(), client: client.into(), jti: jti.into() }))
    }
}

impl Machine {
    /// The client's name and version as `hello` has them.
    #[must_use]
    pub fn client(&self) -> &str {
        self.more.as_ref().map_or("", |more| &more.client)
    }

    /// Another token took the place of the one that it had.
    pub(super) fn note_token(&mut self, iat: Option<u64>, jti: Option<String>) {
        self.issued_s = iat.unwrap_or(0);
        match (&mut self.more, jti.unwrap_or_default()) {
            (Some(more), jti) => more.jti = jti.into(),
            (None, jti) => self.more = More::new(String::new(), String::new(), jti),
        }
    }

    /// How many channels it is subscribed to, or about to be.
    #[must_use]
    pub fn subscriptions(&self) -> u16 {
        self.subscriptions
    }

    /// Whether `welcome` was sent, and the connection does not close.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether `welcome` was sent, be it closing or not.
    #[must_use]
    pub fn was_welcomed(&self) -> bool {
        self.opening.is_none()
    }

    /// What may be revoked of it; `None` before hello.
    #[must_use]
    pub fn held(&self) -> Option<Held<'_>> {
        self.is_identified().then(|| Held {
            user: &self.user,
            issued_s: Some(self.issued_s),
            jti: self.more.as_ref().map_or("", |more| &more.jti),
            session: self.session,
        })
    }

    /// A back end subscribes it to another channel; false when it has as many as it may.
    pub fn begin_subscription(&mut self) -> bool {
        let has_room = usize::from(self.subscriptions) < limits::MAX_SUBSCRIPTIONS;
        self.subscriptions += u16::from(has_room);
        has_room
    }

    /// A subscription that a back end made is there, or is not.
    pub(super) fn on_joined_by_server(
        &mut self,
        result: Result<Subscribed, ErrorBody>,
        effects: &mut Vec<Effect>,
    ) {
        match result {
            Ok(subscribed) => send(None, Event::Subscribed(subscribed), effects),
            // The client has not heard of it.
            Err(error) => {
                self.subscriptions = self.subscriptions.saturating_sub(1);
                tracing::debug!(session = %self.session, code = error.code.as_str(), "a back end's subscription failed");
            }
        }
    }

    /// A back end ended a subscription; `cancelled`: the id of its `subscribe`, when that had no answer yet.
    pub(super) fn on_unsubscribed(
        &mut self,
        cancelled: Option<Option<u64>>,
        unsubscribed: Unsubscribed,
        effects: &mut Vec<Effect>,
    ) {
        self.subscriptions = self.subscriptions.saturating_sub(1);
        self.drop_grant(&unsubscribed.channel);
        match cancelled {
            Some(BY_SERVER) => {}
            Some(id) => {
                self.answered();
                let Unsubscribed { code, reason, retryable, .. } = unsubscribed;
                let error = ErrorBody { retryable, ..ErrorBody::new(code, reason) };
                send(id, Event::Error(error), effects);
            }
            None => send(None, Event::Unsubscribed(unsubscribed), effects),
        }
    }
}

/// Why a token that is good is of no use to this connection, if it is not: what could be revoked of it has a bad name, or
/// was revoked. `session` is nil before there is one.
pub(super) fn unusable(
    claims: &Claims,
    session: Uuid,
    around: &dyn Surroundings,
) -> Option<Cow<'static, str>> {
    let jti = claims.jti.as_deref().unwrap_or_default();
    if let Err(error) = names::check_optional("jti", jti) {
        return Some(format!("token: {error}").into());
    }
    let held = Held { user: &claims.sub, issued_s: claims.iat, jti, session };
    around.revoked(&held).map(Cow::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verifier::VerifyError;

    /// Takes any token for bob's, and refuses those of which `revoked` says so.
    struct Around {
        revoked: Option<&'static str>,
    }

    impl TokenVerifier for Around {
        fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
            let caps = Capabilities::default();
            let jti = Some(token.to_owned());
            Ok(Claims {
                sub: "bob".into(),
                exp: now_s + 60,
                iat: Some(7),
                nbf: None,
                jti,
                caps,
                channel: None,
            })
        }
    }

    impl Surroundings for Around {
        fn verifier(&self) -> &dyn TokenVerifier {
            self
        }
        fn now_s(&self) -> u64 {
            1_000
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
            Terms { heartbeat: Duration::from_secs(25), reconnect_spread: Duration::from_secs(5) }
        }
        fn ack_due(&self) -> Tick {
            500
        }
        fn revoked(&self, held: &Held<'_>) -> Option<&'static str> {
            assert_eq!((held.user, held.issued_s), ("bob", Some(7)));
            self.revoked.filter(|revoked| *revoked == held.jti)
        }

        fn namespace(&self, _: &str) -> Namespace {
            Namespace::default()
        }
    }

    fn after(machine: &mut Machine, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        machine.on(input, &Around { revoked: None }, &mut effects);
        effects
    }

    fn hello(token: &str, around: &Around) -> (Machine, Vec<Effect>) {
        let (mut machine, mut effects) = (Machine::new(None, Rc::from("")), Vec::new());
        let hello = Hello {
            token: Some(token.to_owned()),
            client: "demo/1".to_owned(),
            credit: Some(0),
            ..Hello::default()
        };
        let envelope = Envelope { id: Some(1), command: Command::Hello(hello) };
        machine.on(Input::Command(envelope), around, &mut effects);
        (machine, effects)
    }

    fn welcomed() -> Machine {
        let (mut machine, _) = hello("t1", &Around { revoked: None });
        assert!(!machine.is_ready());
        after(&mut machine, Input::SessionOpened(Ok(())));
        assert!(machine.is_ready());
        machine
    }

    fn ended(cancelled: Option<Option<u64>>) -> Input {
        let (channel, reason) = ("news".to_owned(), "closed".to_owned());
        let code = ErrorCode::Forbidden;
        Input::Unsubscribed(cancelled, Unsubscribed { channel, code, reason, retryable: true })
    }

    #[test]
    fn a_revoked_token_is_refused_at_hello() {
        let (machine, effects) = hello("t1", &Around { revoked: Some("t1") });
        assert_eq!(effects, [Effect::Close(CloseCode::Unauthorized, "t1".into())]);
        assert!(machine.held().is_none());
        let (machine, effects) = hello("t2", &Around { revoked: Some("t1") });
        assert!(matches!(effects[..], [Effect::OpenSession { .. }]), "{effects:?}");
        let held = machine.held().unwrap();
        assert_eq!((held.user, held.issued_s, held.jti), ("bob", Some(7), "t2"));
        assert_eq!((machine.client(), machine.device()), ("demo/1", ""));
        let (_, effects) = hello(&"x".repeat(201), &Around { revoked: None });
        let [Effect::Close(CloseCode::Unauthorized, why)] = &effects[..] else { panic!("{effects:?}") };
        assert!(why.contains("jti has 201 bytes"), "{why}");
    }

    #[test]
    fn what_a_back_end_subscribes_counts_and_its_place_comes_back() {
        let mut machine = welcomed();
        for _ in 0..limits::MAX_SUBSCRIPTIONS {
            assert!(machine.begin_subscription());
        }
        assert!(!machine.begin_subscription());
        let subscribed =
            Subscribed { channel: "news".into(), epoch: "e".into(), offset: 3, ..Subscribed::default() };
        let effects = after(&mut machine, Input::Joined(BY_SERVER, Ok(subscribed.clone())));
        let told = EventEnvelope { id: None, event: Event::Subscribed(subscribed) };
        assert_eq!(effects, [Effect::Send(told)]);
        let failed = ErrorBody::new(ErrorCode::Unavailable, "away");
        assert_eq!(after(&mut machine, Input::Joined(BY_SERVER, Err(failed))), []);
        assert!(machine.begin_subscription() && !machine.begin_subscription());
        let effects = after(&mut machine, ended(None));
        let [Effect::Send(EventEnvelope { id: None, event: Event::Unsubscribed(told) })] = &effects[..]
        else {
            panic!("{effects:?}");
        };
        assert_eq!((&*told.channel, told.retryable), ("news", true));
        assert!(machine.begin_subscription() && !machine.begin_subscription());
        assert_eq!(after(&mut machine, ended(Some(BY_SERVER))), [], "the client had not heard of it");
        let effects = after(&mut machine, ended(Some(Some(9))));
        let [Effect::Send(EventEnvelope { id: Some(9), event: Event::Error(error) })] = &effects[..] else {
            panic!("{effects:?}");
        };
        assert_eq!((error.code, error.retryable), (ErrorCode::Forbidden, true));
        assert_eq!(machine.subscriptions(), limits::MAX_SUBSCRIPTIONS as u16 - 2);
    }
}
