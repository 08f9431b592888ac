//! What a client may do with channels: its tokens first, then what the channel's namespace says.

use sanjay_protocol::{
    ErrorBody, ErrorCode, Event,
    command::{Publish, Subscribe},
    limits,
    recovery::{History, ReadHistory},
    token::Action,
};
use sanjay_runtime::{
    Namespace,
    namespaces::{Publishers, name_of},
};

use super::{Effect, Machine, Surroundings, reply, send};

/// What an answer with many messages counts as: nothing more is taken before it, so that at most one of them waits for
/// a socket.
const HEAVY: u8 = limits::MAX_OUTSTANDING_COMMANDS as u8;

impl Machine {
    pub(super) fn on_subscribe(
        &mut self,
        id: Option<u64>,
        subscribe: Subscribe,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let Subscribe { channel, recover, token } = subscribe;
        if let Err(error) = self.may_subscribe(token.as_deref(), &channel, around) {
            return send(id, Event::Error(error), effects);
        }
        if usize::from(self.subscriptions) >= limits::MAX_SUBSCRIPTIONS {
            let most = limits::MAX_SUBSCRIPTIONS;
            let why =
                format!("this connection has {most} channels, the most that one may have; unsubscribe first");
            return send(id, Event::Error(ErrorBody::new(ErrorCode::LimitExceeded, why)), effects);
        }
        match (recover, id) {
            (None, _) => {
                self.outstanding += 1;
                effects.push(Effect::Join(id, channel));
            }
            (Some(place), Some(id)) => {
                self.outstanding += HEAVY;
                effects.push(Effect::Recover(id, channel, place));
            }
            (Some(_), None) => return without_id("subscribe with recover", effects),
        }
        self.subscriptions += 1;
    }

    pub(super) fn on_recovered(&mut self, id: u64, result: Result<(), ErrorBody>, effects: &mut Vec<Effect>) {
        self.outstanding = self.outstanding.saturating_sub(HEAVY);
        if let Err(error) = result {
            self.subscriptions = self.subscriptions.saturating_sub(1);
            send(Some(id), Event::Error(error), effects);
        }
    }

    pub(super) fn on_read_history(
        &mut self,
        id: Option<u64>,
        read: ReadHistory,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        if !self.allow(id, Action::History, &read.channel, effects) {
            return;
        }
        if let Err(error) = self.may_see(&read.channel, around) {
            return send(id, Event::Error(error), effects);
        }
        if around.namespace(&read.channel).history_size == 0 {
            let why = format!("channels of the namespace \"{}\" keep no history", name_of(&read.channel));
            return send(id, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
        }
        let Some(id) = id else { return without_id("history", effects) };
        self.outstanding += HEAVY;
        effects.push(Effect::ReadHistory(id, read));
    }

    pub(super) fn on_history(
        &mut self,
        id: u64,
        result: Result<History, ErrorBody>,
        effects: &mut Vec<Effect>,
    ) {
        self.outstanding = self.outstanding.saturating_sub(HEAVY);
        reply(Some(id), result.map(|history| Event::History(Box::new(history))), effects);
    }

    pub(super) fn on_publish(
        &mut self,
        id: Option<u64>,
        publish: Publish,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        if !self.allow(id, Action::Publish, &publish.channel, effects) {
            return;
        }
        if let Err(error) = may_publish(&around.namespace(&publish.channel), &publish) {
            return send(id, Event::Error(error), effects);
        }
        self.outstanding += 1;
        effects.push(Effect::Publish(id, publish));
    }

    pub(super) fn allow(
        &self,
        id: Option<u64>,
        action: Action,
        channel: &str,
        effects: &mut Vec<Effect>,
    ) -> bool {
        match self.allowed(action, channel) {
            Ok(()) => true,
            Err(error) => {
                send(id, Event::Error(error), effects);
                false
            }
        }
    }
}

/// A command whose answer has the messages is of no use without one.
fn without_id(command: &str, effects: &mut Vec<Effect>) {
    let why = format!("{command} needs an id, as the messages are in its answer");
    send(None, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
}

fn may_publish(namespace: &Namespace, publish: &Publish) -> Result<(), ErrorBody> {
    let Publish { channel, payload, .. } = publish;
    if namespace.publish == Publishers::Backends {
        let why = format!(
            "only back ends publish to channels of the namespace \"{}\"; send it to your back end instead",
            name_of(channel)
        );
        return Err(ErrorBody::new(ErrorCode::Forbidden, why));
    }
    if payload.len() > namespace.max_payload_bytes {
        let why = format!(
            "payload has {} bytes; at most {} are allowed in the namespace \"{}\"",
            payload.len(),
            namespace.max_payload_bytes,
            name_of(channel)
        );
        return Err(ErrorBody::new(ErrorCode::PayloadTooLarge, why));
    }
    Ok(())
}
