"""Compares what was accepted with what arrived. Pure: it looks at records, and runs without a stack.

Inbox messages must have taken effect once each, in the order of their seqs. Channel messages may be missing where a gap
was announced or the subscriber was away, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# How many problems of one kind are spelled out.
SHOWN = 5


@dataclass(frozen=True)
class Message:
    """An inbox message, as `Send` answered it or as it took effect."""

    seq: int
    id: str
    body: str


@dataclass(frozen=True)
class Subscribed:
    """A subscription began above this offset."""

    epoch: str
    offset: int


@dataclass(frozen=True)
class Publication:
    """A channel message."""

    epoch: str
    offset: int
    body: str


@dataclass(frozen=True)
class Gap:
    """Announced: nothing up to `to` of this epoch comes."""

    epoch: str
    start: int
    to: int


Event = Subscribed | Publication | Gap


def position(events: list[Event]) -> tuple[str, int] | None:
    """Epoch and offset up to which a subscriber got, or was told to have missed, everything."""
    if not events:
        return None
    last = events[-1]
    return last.epoch, last.to if isinstance(last, Gap) else last.offset


def check_inbox(user: str, accepted: Iterable[Message], effects: Iterable[Message]) -> list[str]:
    """What is wrong with one user's messages: `accepted` in the order in which they were sent, one after the other was
    answered, to an inbox that was empty and got nothing else; `effects` in the order in which they were applied."""
    accepted, effects = list(accepted), list(effects)
    problems = []
    seqs = [message.seq for message in accepted]
    if seqs != list(range(1, len(seqs) + 1)):
        problems.append(f"{user}: accepted messages have the seqs {_some(seqs)}, not 1 to {len(seqs)} in their order")
    known = {message.seq: message for message in accepted}
    seen: set[int] = set()
    newest = 0
    for effect in effects:
        if known.get(effect.seq) != effect:
            problems.append(f"{user}: {effect} was never accepted; under its seq it was {known.get(effect.seq)}")
        elif effect.seq in seen:
            problems.append(f"{user}: seq {effect.seq} took effect twice")
        elif effect.seq < newest:
            problems.append(f"{user}: seq {effect.seq} took effect after {newest}")
        seen.add(effect.seq)
        newest = max(newest, effect.seq)
    if lost := sorted(known.keys() - seen):
        problems.append(f"{user}: {len(lost)} accepted messages never took effect: seqs {_some(lost)}")
    return problems


def check_published(accepted: Iterable[Publication]) -> list[str]:
    """What is wrong with the offsets that publishes were answered, in the order in which they were made."""
    problems = []
    tops: dict[str, int] = {}
    for publication in accepted:
        top = tops.get(publication.epoch, 0)
        if publication.offset <= top:
            problems.append(f"offset {publication.offset} of {publication.epoch} was answered after {top}")
        tops[publication.epoch] = max(top, publication.offset)
    return problems


def check_subscriber(name: str, accepted: Iterable[Publication], events: Iterable[Event]) -> list[str]:
    """What is wrong with what one subscriber got of a channel, over all its connections in their order. Each connection
    begins with a `Subscribed`; within it, each offset follows the one before or stands after an announced gap."""
    known = {(publication.epoch, publication.offset): publication for publication in accepted}
    problems = []
    epoch, last = None, 0
    seen: set[tuple[str, int]] = set()
    for event in events:
        match event:
            case Subscribed():
                epoch, last = event.epoch, event.offset
            case Gap():
                if event.epoch == epoch and event.to < last:
                    problems.append(f"{name}: a gap up to {event.to} was announced after offset {last}")
                epoch, last = event.epoch, event.to
            case Publication():
                key = (event.epoch, event.offset)
                if known.get(key) != event:
                    problems.append(f"{name}: {event} was not published; there it was {known.get(key)}")
                if key in seen:
                    problems.append(f"{name}: offset {event.offset} of {event.epoch} came twice")
                elif event.epoch != epoch or event.offset != last + 1:
                    problems.append(f"{name}: {event} came after offset {last} of {epoch}, and no gap was announced")
                seen.add(key)
                epoch, last = event.epoch, event.offset
    return problems


def check_end(name: str, accepted: list[Publication], events: list[Event]) -> list[str]:
    """What is wrong when a subscriber that is connected stands elsewhere than the channel."""
    if not accepted:
        return []
    newest = (accepted[-1].epoch, accepted[-1].offset)
    stands = position(events)
    return [] if stands == newest else [f"{name}: stands at {stands}, the channel at {newest}; no gap was announced"]


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return shown + (", …" if len(numbers) > SHOWN else "")
