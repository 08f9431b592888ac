//! Tokens after `hello`: looking up their keys, `refresh`, the grace after the end of one, and subscription tokens.

use std::rc::Rc;

use sanjay_protocol::{
    CloseCode, ErrorBody, ErrorCode, Event,
    command::{Hello, Refresh},
    event::{Refreshed, TokenExpired, Unsubscribed},
    limits,
    token::{Action, Capabilities, Claims},
};
use sanjay_runtime::namespaces::name_of;

use super::{
    Effect, Machine, Phase, Surroundings,
    control::{More, unusable},
    send,
};
use crate::{inbox::Cursor, verifier::VerifyError};

/// When a client may try again whose token's key is not at hand, in milliseconds: a look-up usually takes less.
const LOOK_UP_MS: u32 = 1_000;

/// What a subscription token grants, until it ends: the channel, in place of the connection's capabilities.
pub(super) struct Grant {
    channel: Box<str>,
    capabilities: Rc<Capabilities>,
    expires_s: u64,
}

impl Machine {
    /// Whether `hello` waits for the key of its token.
    #[must_use]
    pub fn is_looking_up(&self) -> bool {
        self.phase == Phase::LookingUp
    }

    /// Whether the token has ended, and its client was told so.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.expired
    }

    /// When the first of the subscription tokens ends, in Unix seconds.
    #[must_use]
    pub fn first_grant_ends_s(&self) -> Option<u64> {
        self.grants.as_ref()?.iter().map(|grant| grant.expires_s).min()
    }

    /// What a checked token says of the connection.
    pub(super) fn identify(
        &mut self,
        verified: Result<Claims, VerifyError>,
        token: String,
        hello: Hello,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let claims = match verified {
            Ok(claims) => claims,
            Err(VerifyError::Refused(why)) => return self.close(CloseCode::Unauthorized, why, effects),
            Err(VerifyError::Unavailable(why)) => return self.close(CloseCode::TryAgainLater, why, effects),
            Err(VerifyError::LookingUp) => return self.look_up(token, hello, effects),
        };
        if let Some((code, why)) = unfit(&claims) {
            return self.close(code, why, effects);
        }
        if let Some(why) = unusable(&claims, uuid::Uuid::nil(), around) {
            return self.close(CloseCode::Unauthorized, why, effects);
        }
        let Claims { sub, exp, iat, jti, caps, .. } = claims;
        self.user = sub.into();
        self.expires_s = exp;
        self.issued_s = iat.unwrap_or(0);
        self.capabilities = Some(around.intern(caps));
        self.session = around.session_id();
        tracing::debug!(session = %self.session, client = hello.client, "hello");
        self.more = More::new(hello.device, hello.client, jti.unwrap_or_default());
        let credit = hello.credit.unwrap_or(limits::DEFAULT_CREDIT);
        self.inbox = (credit > 0).then(|| Box::new(Cursor::new(credit)));
        self.phase = Phase::Registering;
        effects.push(Effect::OpenSession { inbox: credit > 0 });
    }

    /// The key of a token is not at hand: `hello` waits until it was looked up.
    fn look_up(&mut self, token: String, hello: Hello, effects: &mut Vec<Effect>) {
        let opening = self.opening.get_or_insert_default();
        opening.token = Some(token);
        opening.hello = Some(hello);
        self.phase = Phase::LookingUp;
        effects.push(Effect::AwaitKeys);
    }

    /// Keys were looked up, well or not.
    pub(super) fn on_keys_looked_up(&mut self, around: &dyn Surroundings, effects: &mut Vec<Effect>) {
        if self.phase != Phase::LookingUp {
            return;
        }
        let opening = self.opening.get_or_insert_default();
        if let (Some(token), Some(hello)) = (opening.token.take(), opening.hello.take()) {
            let verified = around.verifier().verify_looked_up(&token, around.now_s());
            self.identify(verified, token, hello, around, effects);
        }
    }

    /// The token of an established connection has ended.
    pub(super) fn on_token_ended(&mut self, close_in_s: u64, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Ready && !self.expired {
            self.expired = true;
            let close_in_ms = close_in_s.saturating_mul(1_000);
            send(None, Event::TokenExpired(TokenExpired { close_in_ms }), effects);
        }
    }

    pub(super) fn on_refresh(
        &mut self,
        id: Option<u64>,
        Refresh { token, channel }: Refresh,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let refreshed = match &channel {
            Some(channel) => self.renew_grant(&token, channel, around),
            None => self.renew(&token, around),
        };
        match refreshed {
            Ok(expires_s) => {
                let token_ttl_s = expires_s.saturating_sub(around.now_s());
                if channel.is_none() {
                    effects.push(Effect::ListChannels);
                }
                effects.push(Effect::Refreshed);
                if id.is_some() {
                    send(id, Event::Refreshed(Refreshed { token_ttl_s, channel }), effects);
                }
            }
            // The connection goes on with the token that it has.
            Err(error) => send(id, Event::Error(error), effects),
        }
    }

    /// Takes another token for the connection; returns when it ends.
    fn renew(&mut self, token: &str, around: &dyn Surroundings) -> Result<u64, ErrorBody> {
        let claims = self.own_claims(token, around)?;
        if let Some(channel) = claims.channel {
            return Err(forbidden(format!(
                "this token is for the subscription of \"{channel}\"; name that channel in refresh, or send the \
                 connection's token"
            )));
        }
        self.expires_s = claims.exp;
        self.expired = false;
        self.capabilities = Some(around.intern(claims.caps));
        self.note_token(claims.iat, claims.jti);
        Ok(claims.exp)
    }

    fn renew_grant(
        &mut self,
        token: &str,
        channel: &str,
        around: &dyn Surroundings,
    ) -> Result<u64, ErrorBody> {
        if self.grant_of(channel).is_none() {
            let why = format!("the subscription of \"{channel}\" has no token; subscribe with one");
            return Err(ErrorBody::new(ErrorCode::NotSubscribed, why));
        }
        let grant = self.checked_grant(token, channel, around)?;
        let expires_s = grant.expires_s;
        self.keep_grant(grant);
        Ok(expires_s)
    }

    /// Whether a subscription is allowed; with a token that is about what the token grants.
    pub(super) fn may_subscribe(
        &mut self,
        token: Option<&str>,
        channel: &str,
        around: &dyn Surroundings,
    ) -> Result<(), ErrorBody> {
        let Some(token) = token else { return self.may_be_in(channel, around) };
        if self.expired {
            return Err(expired());
        }
        let grant = self.checked_grant(token, channel, around)?;
        self.keep_grant(grant);
        Ok(())
    }

    fn checked_grant(
        &self,
        token: &str,
        channel: &str,
        around: &dyn Surroundings,
    ) -> Result<Grant, ErrorBody> {
        let claims = self.own_claims(token, around)?;
        match claims.channel {
            Some(granted) if granted == channel => {}
            Some(granted) => {
                let why = format!("this token is for \"{granted}\", not for \"{channel}\"");
                return Err(forbidden(why));
            }
            None => {
                return Err(forbidden(format!(
                    "this is no subscription token; it needs the claim `channel`, here \"{channel}\""
                )));
            }
        }
        let mut capabilities = claims.caps;
        if capabilities.is_empty() {
            capabilities = [(channel.to_owned(), vec![Action::Subscribe])].into_iter().collect();
        }
        if !capabilities.allow(Action::Subscribe, channel) {
            let why = "the `caps` of this subscription token do not allow to subscribe; leave them out for that alone";
            return Err(forbidden(why));
        }
        let capabilities = around.intern(capabilities);
        Ok(Grant { channel: channel.into(), capabilities, expires_s: claims.exp })
    }

    /// The claims of a token that is good and this user's.
    fn own_claims(&self, token: &str, around: &dyn Surroundings) -> Result<Claims, ErrorBody> {
        let claims = around.verifier().verify(token, around.now_s()).map_err(|error| match error {
            VerifyError::Refused(why) => forbidden(why),
            VerifyError::Unavailable(_) | VerifyError::LookingUp => ErrorBody {
                retry_after_ms: Some(LOOK_UP_MS),
                ..ErrorBody::new(ErrorCode::Unavailable, error.to_string())
            },
        })?;
        if *claims.sub != *self.user {
            let why =
                "the token is another user's; a connection keeps its user, so connect anew for another one";
            return Err(forbidden(why));
        }
        match unusable(&claims, self.session, around) {
            Some(why) => Err(forbidden(why)),
            None => Ok(claims),
        }
    }

    fn grant_of(&self, channel: &str) -> Option<&Grant> {
        self.grants.as_ref()?.iter().find(|grant| *grant.channel == *channel)
    }

    fn keep_grant(&mut self, grant: Grant) {
        let grants = self.grants.get_or_insert_default();
        match grants.iter_mut().find(|other| other.channel == grant.channel) {
            Some(other) => *other = grant,
            None => {
                // A subscription that fails leaves its grant behind, so that there may be more than subscriptions.
                if grants.len() >= 2 * limits::MAX_SUBSCRIPTIONS {
                    grants.remove(0);
                }
                grants.push(grant);
            }
        }
    }

    pub(super) fn drop_grant(&mut self, channel: &str) {
        if let Some(grants) = &mut self.grants {
            grants.retain(|grant| *grant.channel != *channel);
            if grants.is_empty() {
                self.grants = None;
            }
        }
    }

    /// Subscription tokens may have ended: so do their subscriptions.
    pub(super) fn on_grants_ended(&mut self, around: &dyn Surroundings, effects: &mut Vec<Effect>) {
        let now_s = around.now_s();
        let ended =
            self.grants.iter().flat_map(|grants| grants.iter()).filter(|grant| grant.expires_s <= now_s);
        let ended: Vec<String> = ended.map(|grant| grant.channel.to_string()).collect();
        for channel in ended {
            self.drop_grant(&channel);
            let why = "the subscription's token has expired; subscribe with a new one";
            effects.push(Effect::EndSubscription(channel, ErrorBody::new(ErrorCode::TokenExpired, why)));
        }
    }

    /// The channels of this connection, after its capabilities changed: what they do not allow any more ends.
    pub(super) fn on_channels(
        &mut self,
        channels: &[Rc<str>],
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        for channel in channels {
            if let Err(error) = self.may_be_in(channel, around) {
                effects.push(Effect::EndSubscription(channel.to_string(), error));
            }
        }
    }

    /// The edge ended a subscription.
    pub(super) fn on_ended(&mut self, channel: String, error: ErrorBody, effects: &mut Vec<Effect>) {
        self.subscriptions = self.subscriptions.saturating_sub(1);
        self.drop_grant(&channel);
        let ErrorBody { code, message: reason, retryable, .. } = error;
        send(None, Event::Unsubscribed(Unsubscribed { channel, code, reason, retryable }), effects);
    }

    /// Whether a subscription without a token of its own, or with the one that it has, is allowed.
    fn may_be_in(&self, channel: &str, around: &dyn Surroundings) -> Result<(), ErrorBody> {
        self.allowed(Action::Subscribe, channel)?;
        self.may_see(channel, around)
    }

    /// Whether what is in a channel may be known here: of a private one with a token for it alone.
    pub(super) fn may_see(&self, channel: &str, around: &dyn Surroundings) -> Result<(), ErrorBody> {
        if self.grant_of(channel).is_none() && around.namespace(channel).private {
            return Err(forbidden(format!(
                "channels of the namespace \"{}\" are private: a capability is not enough for \"{channel}\", subscribe \
                 with a subscription token for it",
                name_of(channel)
            )));
        }
        Ok(())
    }

    /// Whether the token, or the channel's own one, allows `action`.
    pub(super) fn allowed(&self, action: Action, channel: &str) -> Result<(), ErrorBody> {
        if self.expired {
            return Err(expired());
        }
        let capabilities = match self.grant_of(channel) {
            Some(grant) => Some(&grant.capabilities),
            None => self.capabilities.as_ref(),
        };
        if capabilities.is_some_and(|capabilities| capabilities.allow(action, channel)) {
            return Ok(());
        }
        let verb = match action {
            Action::Publish => "publish to",
            Action::History => "read the history of",
            _ => "subscribe to",
        };
        Err(forbidden(format!(
            "the token does not allow to {verb} \"{channel}\"; its caps must name the channel"
        )))
    }
}

/// Why a token that is good cannot open a connection, if it cannot.
pub(super) fn unfit(claims: &Claims) -> Option<(CloseCode, String)> {
    let refused = |why: String| Some((CloseCode::Unauthorized, why));
    if let Err(error) = sanjay_protocol::names::check("sub", &claims.sub) {
        return refused(format!("token: {error}"));
    }
    match &claims.channel {
        Some(_) => refused(
            "this token is for a subscription; hello needs one without the claim `channel`".to_owned(),
        ),
        None => None,
    }
}

fn forbidden(why: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorCode::Forbidden, why)
}

fn expired() -> ErrorBody {
    ErrorBody::new(ErrorCode::TokenExpired, "the connection's token has expired; send refresh with a new one")
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
