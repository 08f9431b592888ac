//! What several parts say to one question of a back end, as one answer: shards of an edge, edges of a router, routers.

use std::collections::BTreeMap;

use sanjay_proto::edge::v1::{Answer, ChannelCount, Question, question};

/// Most connections of one answer: more than a user has, and well below a gRPC message.
pub const MAX_CONNECTIONS: usize = 1_000;

/// Most channels of one answer; names of 200 bytes are 200 KiB then.
pub const MAX_CHANNELS: usize = 1_000;

/// Adds up what the parts say, in any order; `None` is a part that did not answer.
///
/// Of channels each part names its first ones, so that the first ones of all are among them, with every part's count.
#[must_use]
pub fn total(question: &Question, parts: impl IntoIterator<Item = Option<Answer>>) -> Answer {
    let mut total = Answer { complete: true, ..Answer::default() };
    let mut channels: BTreeMap<String, u64> = BTreeMap::new();
    for part in parts {
        let Some(part) = part else {
            total.complete = false;
            continue;
        };
        total.complete &= part.complete;
        total.more |= part.more;
        total.sessions += part.sessions;
        total.changed += part.changed;
        total.refused += part.refused;
        total.connections.extend(part.connections);
        total.edges.extend(part.edges);
        for ChannelCount { channel, subscribers } in part.channels {
            *channels.entry(channel).or_default() += subscribers;
        }
    }
    total.connections.sort_by(|a, b| (a.since_us, &a.session).cmp(&(b.since_us, &b.session)));
    total.more |= total.connections.len() > MAX_CONNECTIONS;
    total.connections.truncate(MAX_CONNECTIONS);
    let limit = limit_of(question);
    total.more |= channels.len() > limit;
    let count = |(channel, subscribers)| ChannelCount { channel, subscribers };
    total.channels = channels.into_iter().take(limit).map(count).collect();
    total
}

/// How many channels an answer may have.
#[must_use]
pub fn limit_of(question: &Question) -> usize {
    match &question.question {
        Some(question::Question::ListChannels(list)) => (list.limit as usize).clamp(1, MAX_CHANNELS),
        _ => MAX_CHANNELS,
    }
}

#[cfg(test)]
mod tests {
    use sanjay_proto::edge::v1::{Connection, ListChannels};

    use super::*;

    fn counts(channels: &[(&str, u64)], more: bool) -> Option<Answer> {
        let count =
            |&(channel, subscribers): &(&str, u64)| ChannelCount { channel: channel.into(), subscribers };
        let channels = channels.iter().map(count).collect();
        Some(Answer { complete: true, channels, more, ..Answer::default() })
    }

    fn first(limit: u32) -> Question {
        let list = ListChannels { limit, ..ListChannels::default() };
        Question { question: Some(question::Question::ListChannels(list)) }
    }

    #[test]
    fn counts_are_added_up_and_a_page_is_the_first_of_all() {
        let parts = [counts(&[("a", 1), ("c", 2)], true), counts(&[("b", 5), ("c", 1)], false)];
        let answer = total(&first(2), parts.clone());
        assert_eq!(
            (answer.channels, answer.more),
            (counts(&[("a", 1), ("b", 5)], true).unwrap().channels, true)
        );
        let answer = total(&first(9), parts);
        assert_eq!(answer.channels, counts(&[("a", 1), ("b", 5), ("c", 3)], false).unwrap().channels);
        assert!(answer.complete && answer.more, "a part had more than it said");
    }

    #[test]
    fn who_did_not_answer_is_no_zero() {
        let some = Some(Answer { complete: true, sessions: 2, changed: 1, ..Answer::default() });
        let answer = total(&first(1), [some.clone(), some.clone()]);
        assert_eq!((answer.sessions, answer.changed, answer.complete), (4, 2, true));
        assert!(!total(&first(1), [some.clone(), None]).complete);
        let part = Some(Answer { complete: false, ..Answer::default() });
        assert!(!total(&first(1), [some, part]).complete);
    }

    #[test]
    fn lists_are_bounded_and_say_so() {
        let at = |since_us: u64| Connection { since_us, ..Connection::default() };
        let many = |from: u64| {
            let connections = (from..from + 600).rev().map(at).collect();
            Some(Answer { complete: true, connections, ..Answer::default() })
        };
        let answer = total(&first(1), [many(1_000), many(0)]);
        assert_eq!((answer.connections.len(), answer.more), (MAX_CONNECTIONS, true));
        assert!(answer.connections.iter().map(|one| one.since_us).eq((0..600).chain(1_000..1_400)));
    }
}
