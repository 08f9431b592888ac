//! Random operations.

use proptest::prelude::*;

use super::super::{failing::NAK, *};
use crate::store::FailureKind;

/// What a run does, and on a store with which limits.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(super) limits: Limits,
    pub(super) operations: Vec<Operation>,
}

/// A random operation.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Append(Vec<Item>),
    /// User, ranges as (from, length), written, right epoch.
    Ack(u8, Vec<(u64, u64)>, u64, bool),
    Read(u8, Option<u64>, usize),
    Arm(u8),
    /// User, failures, seqs of redeliveries that were written, a range that is acked in the same call.
    Fail(u8, Vec<Failing>, Vec<u64>, Option<(u64, u64)>),
    /// Claims, and says what follows for what it gets.
    Claim(End),
    /// Sends again or purges a dead letter, told by its place among all.
    Redriven(usize),
    Purge(usize),
    /// Settles everything that has expired, so many at a time.
    Expire(usize),
    /// Messages, and in how many seconds they are due.
    Schedule(Vec<(Item, u64)>),
    /// Claims so many scheduled messages, and does with them what is said.
    ClaimScheduled(usize, Finish),
    /// Forgets a scheduled message, told by its place among all.
    Unschedule(usize),
    /// User, device, from where.
    DeviceReads(u8, u8, Option<u64>),
    /// User, device, a range that it acks, written, and what fails.
    DeviceAcks(u8, u8, (u64, u64), u64, u64),
    /// After so many days, so many inboxes at a time.
    ForgetDevices(u64, usize),
    Advance(u64),
    Sweep,
    Reopen,
}

/// A message to send; 0 stands for no key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) user: u8,
    pub(super) caller: u8,
    pub(super) body: u8,
    pub(super) key: u8,
    pub(super) collapse: u8,
    /// In seconds.
    pub(super) ttl: Option<u64>,
}

/// What follows for a claimed inbox; nothing after a crash.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Park,
    Again,
    Crash,
}

/// How far whoever claimed scheduled messages comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    Nothing,
    Appended,
    Done,
}

/// A failure: its seq, its kind, and by how much its delivery is not the newest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failing(pub(super) u64, pub(super) FailureKind, pub(super) u32);

fn one_failing() -> impl Strategy<Value = Failing> {
    let kind = prop_oneof![
        5 => Just(NAK),
        1 => Just(FailureKind::Nak(Duration::from_secs(100_000))),
        2 => Just(FailureKind::Deadline),
        1 => Just(FailureKind::Term),
    ];
    let off = prop_oneof![5 => Just(0_u32), 1 => 1..3_u32];
    (1..24_u64, kind, off).prop_map(|(seq, kind, off)| Failing(seq, kind, off))
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Park), Just(End::Again), Just(End::Crash)]
}

fn finish() -> impl Strategy<Value = Finish> {
    prop_oneof![1 => Just(Finish::Nothing), 1 => Just(Finish::Appended), 2 => Just(Finish::Done)]
}

fn item() -> impl Strategy<Value = Item> {
    let caller = prop_oneof![4 => Just(0_u8), 1 => Just(1_u8)];
    let collapse = prop_oneof![3 => Just(0_u8), 2 => 1..4_u8];
    let ttl =
        prop_oneof![5 => Just(None), 2 => (0..5_u64).prop_map(Some), 1 => (0..200_000_u64).prop_map(Some)];
    (0..3_u8, caller, 0..3_u8, prop_oneof![1 => Just(0_u8), 1 => 1..4_u8], collapse, ttl)
        .prop_map(|(user, caller, body, key, collapse, ttl)| Item { user, caller, body, key, collapse, ttl })
}

fn limits() -> impl Strategy<Value = Limits> {
    let messages = prop_oneof![Just(MAX_UNSETTLED), Just(4)];
    // The largest body of a run is longer than the last of these.
    let bytes = prop_oneof![2 => Just(u64::MAX), 1 => Just(150), 1 => Just(40)];
    let overflow = prop_oneof![Just(Overflow::Reject), Just(Overflow::DeadLetterOldest)];
    (messages, bytes, overflow, prop::bool::weighted(0.3)).prop_map(
        |(messages, bytes, overflow, keep_expired)| Limits {
            max_unsettled: messages,
            max_unsettled_bytes: bytes,
            overflow,
            keep_expired,
            ..Limits::default()
        },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => prop::collection::vec(item(), 1..6).prop_map(Operation::Append),
        4 => (0..3u8, prop::collection::vec((1..40u64, 0..6u64), 0..4), 0..40u64, prop::bool::weighted(0.9))
            .prop_map(|(user, ranges, written, right)| Operation::Ack(user, ranges, written, right)),
        3 => (0..3u8, prop::option::of(0..40u64), 0..12usize)
            .prop_map(|(user, after, limit)| Operation::Read(user, after, limit)),
        1 => (0..3u8).prop_map(Operation::Arm),
        6 => (
            0..3u8,
            prop::collection::vec(one_failing(), 0..6),
            prop::collection::vec(1..24_u64, 0..4),
            prop::option::weighted(0.3, (1..24_u64, 0..4_u64)),
        )
            .prop_map(|(user, failed, rewritten, range)| Operation::Fail(user, failed, rewritten, range)),
        5 => end().prop_map(Operation::Claim),
        1 => any::<usize>().prop_map(Operation::Redriven),
        1 => any::<usize>().prop_map(Operation::Purge),
        2 => (1..6_usize).prop_map(Operation::Expire),
        2 => prop::collection::vec((item(), prop_oneof![0..5_u64, 0..100_000_u64]), 1..4)
            .prop_map(Operation::Schedule),
        3 => (1..6_usize, finish()).prop_map(|(limit, finish)| Operation::ClaimScheduled(limit, finish)),
        1 => any::<usize>().prop_map(Operation::Unschedule),
        3 => (0..3u8, 0..3u8, prop::option::of(0..40u64))
            .prop_map(|(user, device, after)| Operation::DeviceReads(user, device, after)),
        5 => (0..3u8, 0..3u8, (1..24u64, 0..6u64), 0..24u64, 1..24u64).prop_map(
            |(user, device, range, written, fails)| Operation::DeviceAcks(user, device, range, written, fails)
        ),
        1 => (0..32u64, 1..4usize).prop_map(|(days, limit)| Operation::ForgetDevices(days, limit)),
        2 => (0..200_000u64).prop_map(Operation::Advance),
        3 => (0..5u64).prop_map(Operation::Advance),
        1 => Just(Operation::Sweep),
        1 => Just(Operation::Reopen),
    ]
}

pub(crate) fn operations() -> impl Strategy<Value = Plan> {
    (limits(), prop::collection::vec(operation(), 1..60))
        .prop_map(|(limits, operations)| Plan { limits, operations })
}
