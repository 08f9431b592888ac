//! Histories: random publishes, reads, changes of what is kept, losses and new epochs, against the plainest model.

use std::{collections::VecDeque, sync::Arc};

use futures::future::BoxFuture;
use proptest::{
    prelude::*,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use sanjay_runtime::{Namespace, Namespaces, SharedNamespaces};

use super::{Top, publication};
use crate::registry::{HistoryPage, HistoryQuery, Registry};

/// An empty registry, and how a channel of it loses what it keeps (`false`) or goes on in a new epoch (`true`).
pub(crate) type Subject = (Arc<dyn Registry>, Box<dyn Fn(Arc<str>, bool) -> BoxFuture<'static, ()>>);

/// A bound that no history of a test reaches.
const PLENTY: usize = 1 << 20;

/// One step of a random run.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Publish {
        channel: u8,
        keys: Vec<Option<u8>>,
    },
    /// The newest, or what is behind an offset so far below the top (or above it).
    Read {
        channel: u8,
        back: Option<i8>,
        foreign: bool,
        limit: u8,
        small: bool,
    },
    Resize {
        channel: u8,
        size: u8,
    },
    Lose {
        channel: u8,
        epoch: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let channel = || 0..3_u8;
    prop_oneof![
        6 => (channel(), prop::collection::vec(prop::option::weighted(0.2, 0..3_u8), 1..5))
            .prop_map(|(channel, keys)| Op::Publish { channel, keys }),
        6 => (channel(), prop::option::weighted(0.8, -2..9_i8), prop::bool::weighted(0.1), 1..8_u8, prop::bool::weighted(0.2))
            .prop_map(|(channel, back, foreign, limit, small)| Op::Read { channel, back, foreign, limit, small }),
        1 => (channel(), 0..7_u8).prop_map(|(channel, size)| Op::Resize { channel, size }),
        1 => (channel(), prop::bool::weighted(0.4)).prop_map(|(channel, epoch)| Op::Lose { channel, epoch }),
    ]
}

/// Sequences of steps, the same ones in every run with the same configuration.
pub(crate) fn cases(count: u32, length: usize) -> Vec<Vec<Op>> {
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(op(), length);
    (0..count).map(|_| strategy.new_tree(&mut runner).expect("no filters").current()).collect()
}

/// Runs the sequences, each on an empty registry.
pub(crate) async fn run(make: impl Fn(SharedNamespaces) -> Subject, cases: Vec<Vec<Op>>) {
    let (mut recovered, mut lost) = (0, 0);
    for ops in cases {
        let namespaces = SharedNamespaces::default();
        let (registry, disturb) = make(namespaces.clone());
        let mut model =
            Model { registry, disturb, namespaces, channels: Default::default(), recovered, lost };
        (0..3).for_each(|channel| model.resize(channel, [0, 3, 6][usize::from(channel)]));
        for op in &ops {
            model.step(op).await;
        }
        (recovered, lost) = (model.recovered, model.lost);
    }
    assert!(
        recovered > 50 && lost > 50,
        "too little was tried: {recovered} positions went on, {lost} were lost"
    );
}

struct Model {
    registry: Arc<dyn Registry>,
    disturb: Box<dyn Fn(Arc<str>, bool) -> BoxFuture<'static, ()>>,
    namespaces: SharedNamespaces,
    channels: [Channel; 3],
    recovered: usize,
    lost: usize,
}

#[derive(Default)]
struct Channel {
    epoch: Option<Arc<str>>,
    former: Option<Arc<str>>,
    top: u64,
    /// Offset and message id of what is kept.
    kept: VecDeque<(u64, Vec<u8>)>,
    size: usize,
    keys: Vec<u8>,
}

fn name(channel: u8) -> Arc<str> {
    format!("c{channel}:x").into()
}

impl Model {
    fn resize(&mut self, channel: u8, size: u8) {
        self.channels[usize::from(channel)].size = size.into();
        let sizes = self.channels.iter().enumerate();
        let sizes = sizes.map(|(at, channel)| {
            let settings = Namespace { history_size: channel.size as u32, ..Namespace::default() };
            (format!("c{at}"), settings)
        });
        self.namespaces.replace(sizes.collect::<Namespaces>());
    }

    async fn step(&mut self, op: &Op) {
        match *op {
            Op::Publish { channel, ref keys } => self.publish(channel, keys).await,
            Op::Resize { channel, size } => self.resize(channel, size),
            Op::Lose { channel, epoch } => {
                (self.disturb)(name(channel), epoch).await;
                let channel = &mut self.channels[usize::from(channel)];
                channel.kept.clear();
                if epoch && channel.epoch.is_some() {
                    channel.former = channel.epoch.take();
                    channel.top = 0;
                    channel.keys.clear();
                }
            }
            Op::Read { channel, back, foreign, limit, small } => {
                let held = &self.channels[usize::from(channel)];
                let epoch = match (&held.epoch, &held.former) {
                    (_, Some(former)) if foreign => Arc::clone(former),
                    (Some(epoch), _) if !foreign => Arc::clone(epoch),
                    _ => "0123456789abcdef".into(),
                };
                let since = back.map(|back| {
                    let offset = i64::try_from(held.top).unwrap().saturating_sub(back.into());
                    Top { epoch, offset: u64::try_from(offset).unwrap_or(0) }
                });
                let bytes = if small { 1 } else { PLENTY };
                self.read(
                    channel,
                    HistoryQuery { channel: name(channel), since, limit: limit.into(), bytes },
                )
                .await;
            }
        }
    }

    async fn publish(&mut self, number: u8, keys: &[Option<u8>]) {
        let key = |key: &Option<u8>| key.map(|key| format!("k{key}")).unwrap_or_default();
        let batch: Vec<_> = keys.iter().map(|k| publication(&name(number), &key(k))).collect();
        let ids: Vec<_> = batch.iter().map(|new| new.message_id.to_vec()).collect();
        let answers = self.registry.publish(batch).await;
        let channel = &mut self.channels[usize::from(number)];
        for ((key, id), answer) in keys.iter().zip(ids).zip(answers) {
            let answer = answer.unwrap();
            assert_eq!(answer.repeated, key.is_some_and(|key| channel.keys.contains(&key)));
            if answer.repeated {
                continue;
            }
            channel.keys.extend(*key);
            channel.top += 1;
            channel.meets(&answer.at);
            channel.kept.push_back((channel.top, id));
            while channel.kept.len() > channel.size {
                channel.kept.pop_front();
            }
        }
    }

    async fn read(&mut self, number: u8, query: HistoryQuery) {
        let HistoryPage { top, publications, lost, more } = self.registry.history(&query).await.unwrap();
        let channel = &mut self.channels[usize::from(number)];
        channel.meets(&top);
        let limit = if query.bytes == 1 { 1 } else { query.limit };
        let surplus = channel.kept.len().saturating_sub(channel.size);
        let kept: Vec<_> = channel.kept.iter().skip(surplus).cloned().collect();
        let expected = match &query.since {
            None => Some(kept[kept.len() - kept.len().min(limit)..].to_vec()),
            Some(since) if since.epoch != top.epoch || since.offset > top.offset => None,
            Some(since) => {
                let rest: Vec<_> = kept.into_iter().filter(|(offset, _)| *offset > since.offset).collect();
                let whole = rest.len() as u64 == top.offset - since.offset;
                whole.then(|| rest.into_iter().take(limit).collect())
            }
        };
        let got: Vec<_> = publications.iter().map(|got| (got.offset, got.message_id.to_vec())).collect();
        assert!(publications.iter().all(|got| *got.epoch == *top.epoch && got.channel == *query.channel));
        assert_eq!((lost, &got), (expected.is_none(), &expected.unwrap_or_default()), "{query:?} at {top:?}");
        let follows = |since: &Top| !lost && since.offset + (got.len() as u64) < top.offset;
        assert_eq!(more, query.since.as_ref().is_some_and(follows), "{query:?} at {top:?}");
        self.recovered += usize::from(query.since.is_some() && !got.is_empty());
        self.lost += usize::from(lost);
    }
}

impl Channel {
    fn meets(&mut self, top: &Top) {
        let epoch = self.epoch.get_or_insert_with(|| Arc::clone(&top.epoch));
        assert_eq!((&*epoch, self.top), (&top.epoch, top.offset));
        assert_ne!(Some(&*epoch), self.former.as_ref(), "an epoch never comes back");
    }
}
