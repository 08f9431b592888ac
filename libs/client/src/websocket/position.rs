//! Where a subscription stands in its channel: the newest offset that the application knows of, and what it has to be told
//! when that jumps.

use sanjay_protocol::{
    Position,
    event::{Gap, Message, Subscribed},
};

use super::subscription::ChannelEvent;

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Deliver,
    DeliverAfter(ChannelEvent),
    Repeated,
}

/// Moves to where a new subscription starts; says what was missed since the last one.
pub(crate) fn subscribed(last: &mut Option<Position>, now: &Subscribed) -> Option<ChannelEvent> {
    let before = last.replace(Position { epoch: now.epoch.clone(), offset: now.offset })?;
    if before.epoch != now.epoch || before.offset > now.offset {
        return Some(ChannelEvent::Discontinuity { epoch: now.epoch.clone(), offset: now.offset });
    }
    missing(&now.channel, &now.epoch, before.offset, now.offset + 1)
}

/// Moves to a message; says what is missing before it, which a correct edge announced already.
pub(crate) fn message(last: &mut Option<Position>, message: &Message) -> Verdict {
    let now = Position { epoch: message.epoch.clone(), offset: message.offset };
    match last.as_mut() {
        Some(before) if before.epoch == now.epoch && now.offset <= before.offset => Verdict::Repeated,
        Some(before) if before.epoch == now.epoch => {
            let offset = std::mem::replace(&mut before.offset, now.offset);
            missing(&message.channel, &now.epoch, offset, now.offset)
                .map_or(Verdict::Deliver, Verdict::DeliverAfter)
        }
        before => {
            let known = before.is_some();
            *last = Some(now);
            if !known {
                return Verdict::Deliver;
            }
            let (epoch, offset) = (message.epoch.clone(), message.offset.saturating_sub(1));
            Verdict::DeliverAfter(ChannelEvent::Discontinuity { epoch, offset })
        }
    }
}

/// Moves beyond a gap that the edge announced.
pub(crate) fn gap(last: &mut Option<Position>, gap: Gap) -> Option<ChannelEvent> {
    let now = Position { epoch: gap.epoch.clone(), offset: gap.to };
    match last {
        Some(before) if before.epoch == gap.epoch && gap.from > 0 => {
            let from = gap.from.max(before.offset + 1);
            if from > gap.to {
                return None;
            }
            before.offset = gap.to;
            Some(ChannelEvent::Gap(Gap { from, ..gap }))
        }
        _ => {
            *last = Some(now);
            Some(ChannelEvent::Discontinuity { epoch: gap.epoch, offset: gap.to })
        }
    }
}

/// The gap between `before` and `next`, both exclusive.
fn missing(channel: &str, epoch: &str, before: u64, next: u64) -> Option<ChannelEvent> {
    (before + 1 < next).then(|| {
        let (channel, epoch) = (channel.to_owned(), epoch.to_owned());
        ChannelEvent::Gap(Gap { channel, epoch, from: before + 1, to: next - 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sanjay_protocol::Payload;

    fn at(epoch: &str, offset: u64) -> Message {
        Message {
            channel: "news".into(),
            offset,
            epoch: epoch.into(),
            message_id: String::new(),
            payload: Payload::Text(String::new()),
            publisher: String::new(),
            time_us: 0,
            trace: String::new(),
        }
    }

    fn start(epoch: &str, offset: u64) -> Subscribed {
        Subscribed { channel: "news".into(), epoch: epoch.into(), offset, ..Subscribed::default() }
    }

    proptest! {
        /// Whatever is dropped, repeated or lost with a connection: each offset is delivered once or lies in a gap.
        #[test]
        fn every_offset_is_delivered_once_or_reported(
            steps in prop::collection::vec((0_u64..6, any::<bool>()), 1..60),
        ) {
            let (mut last, mut top) = (None, 0);
            prop_assert_eq!(subscribed(&mut last, &start("e", 0)), None);
            let mut known = 0;
            let note = |event: Option<ChannelEvent>, known: &mut u64| match event {
                Some(ChannelEvent::Gap(gap)) => {
                    assert_eq!(gap.from, *known + 1, "a gap begins after what is known");
                    *known = gap.to;
                }
                None => {}
                other => panic!("{other:?}"),
            };
            for (skip, reconnect) in steps {
                top += skip;
                if reconnect {
                    note(subscribed(&mut last, &start("e", top)), &mut known);
                    prop_assert_eq!(known, top);
                    continue;
                }
                match message(&mut last, &at("e", top)) {
                    Verdict::Repeated => prop_assert!(top <= known),
                    Verdict::Deliver => known += 1,
                    Verdict::DeliverAfter(event) => {
                        note(Some(event), &mut known);
                        known += 1;
                    }
                }
                prop_assert_eq!(known, top);
            }
        }
    }

    #[test]
    fn another_epoch_or_a_lower_offset_is_a_discontinuity() {
        let moved = |epoch: &str, offset| Some(ChannelEvent::Discontinuity { epoch: epoch.into(), offset });
        let mut last = None;
        subscribed(&mut last, &start("a", 7));
        assert_eq!(subscribed(&mut last, &start("b", 7)), moved("b", 7));
        assert_eq!(subscribed(&mut last, &start("b", 3)), moved("b", 3));
        let Verdict::DeliverAfter(event) = message(&mut last, &at("c", 5)) else { panic!("another epoch") };
        assert_eq!(Some(event), moved("c", 4));
        let unknown = Gap { channel: "news".into(), epoch: "d".into(), from: 0, to: 9 };
        assert_eq!(gap(&mut last, unknown), moved("d", 9));
        assert_eq!(message(&mut last, &at("d", 10)), Verdict::Deliver);
    }

    #[test]
    fn an_announced_gap_is_reported_once() {
        let mut last = None;
        subscribed(&mut last, &start("a", 1));
        let dropped = Gap { channel: "news".into(), epoch: "a".into(), from: 2, to: 4 };
        assert_eq!(gap(&mut last, dropped.clone()), Some(ChannelEvent::Gap(dropped.clone())));
        assert_eq!(gap(&mut last, dropped), None);
        assert_eq!(message(&mut last, &at("a", 5)), Verdict::Deliver);
    }
}
