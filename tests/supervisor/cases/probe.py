"""Traffic that goes on while things break: sends to users who read through nginx, publishes to subscribers.

Every send and publish is repeated under its dedupe key until it is answered. Readers come back with a back-off and
apply each message once. What was accepted and what arrived is kept for the checker.
"""

from __future__ import annotations

import collections
import contextlib
import random
import threading
import time
import uuid
from typing import Any

import grpc
from sanjay_api import Client
from websockets.exceptions import WebSocketException

from . import history
from .place import Place, eventually

CHANNEL = "probe"
# Longest pause, in seconds, after a first failure, and ever.
BACK_OFF = (0.1, 1.0)
# An answer that takes longer is not waited for: the same key is sent again.
CALL = 3.0
# How long one message may find no answer.
PATIENCE = 30.0
# Between two messages, in seconds.
PAUSE = 0.03


class Reader(threading.Thread):
    """A user who reads the inbox and subscribes to the channel, over one connection after the other."""

    def __init__(self, place: Place, user: str, ended: threading.Event):
        super().__init__(name=f"reader {user}", daemon=True)
        self.place, self.user, self.ended = place, user, ended
        self.effects: list[history.Message] = []
        self.events: list[history.Event] = []
        self.connections = 0
        self.connected = threading.Event()
        self.problem: str | None = None
        self._client: Client | None = None
        self._epoch: str | None = None
        self._applied: set[int] = set()

    def run(self) -> None:
        failed = 0
        while not self.ended.is_set():
            try:
                self._connection()
            except (OSError, WebSocketException):
                failed = 1 if self.connected.is_set() else failed + 1
            except Exception as error:  # A thread that ended would look like a user to whom nothing comes.
                self.problem = f"{self.user}: {type(error).__name__}: {error}"
                return
            finally:
                self.connected.clear()
                self.hang_up()
            self.ended.wait(random.uniform(0, min(BACK_OFF[1], BACK_OFF[0] * 2**failed)))

    def hang_up(self) -> None:
        """Ends the connection, from whatever thread."""
        if (client := self._client) is not None:
            with contextlib.suppress(OSError, WebSocketException):
                client.close()

    def _connection(self) -> None:
        client = self._client = self.place.client(self.user)
        inbox = client.welcome.get("inbox")
        if inbox is None:
            raise OSError("delivery is away, so the edge does not know the inbox yet")
        assert self._epoch in (None, inbox["epoch"]), f"the inbox became another one: {self._epoch}, then {inbox}"
        self._epoch = inbox["epoch"]
        answer = client.call(subscribe={"channel": CHANNEL})
        if "error" in answer:
            assert answer["error"]["retryable"], answer
            raise OSError("the routers are away")
        self.events.append(history.Subscribed(answer["subscribed"]["epoch"], answer["subscribed"]["offset"]))
        self.connections += 1
        self.connected.set()
        while not self.ended.is_set():
            self._take(client, client.next())

    def _take(self, client: Client, envelope: dict[str, Any]) -> None:
        if message := envelope.get("inbox"):
            seq = message["seq"]
            # Recorded first, acknowledged then.
            if seq not in self._applied:
                self._applied.add(seq)
                self.effects.append(history.Message(seq, message["message_id"], message["payload"]["text"]))
            client.send(ack={"ranges": [[seq, seq]], "trace": message["trace"]})
        elif message := envelope.get("message"):
            body = message["payload"]["text"]
            self.events.append(history.Publication(message["epoch"], message["offset"], body))
        elif gap := envelope.get("gap"):
            self.events.append(history.Gap(gap["epoch"], gap["from"], gap["to"]))


class Writer(threading.Thread):
    """A back end. It makes one message after the other, each when the one before was answered."""

    def __init__(self, place: Place, ended: threading.Event):
        super().__init__(name=type(self).__name__, daemon=True)
        self.place, self.ended = place, ended
        self.key = uuid.uuid4()
        self.made = 0
        # How often a message had to be repeated, by what was answered.
        self.repeats: collections.Counter[str] = collections.Counter()
        self.problem: str | None = None

    def run(self) -> None:
        try:
            api = eventually("the API describes itself", PATIENCE, lambda: _or_os_error(self.place.api))
            while not self.ended.wait(PAUSE):
                self.made += 1
                self._until_answered(api)
        except Exception as error:  # As above: its silence would be taken for success.
            self.problem = f"{self.name}: {type(error).__name__}: {error}"

    def _until_answered(self, api) -> None:
        key, until = f"{self.key}-{self.made}", time.monotonic() + PATIENCE
        while True:
            try:
                if self.make(api, key):
                    return
                problem = "refused for now"
            except grpc.RpcError as error:
                problem = f"{error.code().name}: {error.details()}"
                may_repeat = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
                may_repeat |= {grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN}
                assert error.code() in may_repeat, problem
            assert time.monotonic() < until, f"message {self.made} found no answer for {PATIENCE:.0f} s: {problem}"
            self.repeats[problem] += 1
            self.ended.wait(0.1)

    def make(self, api, key: str) -> bool:
        """Makes the message of this number; false when it was refused and may be repeated."""
        raise NotImplementedError


class Sender(Writer):
    """Sends to the users in turn."""

    def __init__(self, place: Place, ended: threading.Event, users: list[str]):
        super().__init__(place, ended)
        self.accepted: dict[str, list[history.Message]] = {user: [] for user in users}

    def make(self, api, key: str) -> bool:
        user = list(self.accepted)[self.made % len(self.accepted)]
        body = f"send {self.made}"
        answer = api.call("Send", timeout=CALL, users=[user], payload={"text": body}, dedupe_key=key)
        result = answer.results[0]
        if result.HasField("error"):
            assert result.error.retryable, result
            return False
        self.accepted[user].append(history.Message(result.accepted.seq, result.accepted.message_id, body))
        return True


class Publisher(Writer):
    """Publishes to the channel."""

    def __init__(self, place: Place, ended: threading.Event):
        super().__init__(place, ended)
        self.published: list[history.Publication] = []

    def make(self, api, key: str) -> bool:
        body = f"publish {self.made}"
        answer = api.call("Publish", timeout=CALL, channel=CHANNEL, payload={"text": body}, dedupe_key=key)
        self.published.append(history.Publication(answer.epoch, answer.offset, body))
        return True


class Probe:
    """All of it together."""

    def __init__(self, place: Place, users: int):
        self._writers_ended, self._readers_ended = threading.Event(), threading.Event()
        run = uuid.uuid4().hex[:8]
        self.readers = [Reader(place, f"probe-{run}-{number}", self._readers_ended) for number in range(users)]
        self.sender = Sender(place, self._writers_ended, [reader.user for reader in self.readers])
        self.publisher = Publisher(place, self._writers_ended)

    def start(self) -> None:
        """Begins; returns when everybody has got something."""
        for reader in self.readers:
            reader.start()
        self.everybody_is_connected()
        self.sender.start()
        self.publisher.start()
        self.goes_on()

    def everybody_is_connected(self) -> None:
        """Waits for it."""

        def connected() -> bool:
            return self._alive() and all(reader.connected.is_set() for reader in self.readers)

        eventually("every reader is connected", 30, connected)

    def goes_on(self, messages: int = 1) -> None:
        """Waits until everybody is connected, and got of each kind what was made so many messages from now."""
        self.everybody_is_connected()
        sent, published = self.sender.made + messages, self.publisher.made + messages

        def got(reader: Reader) -> bool:
            sends = any(int(effect.body.split()[1]) > sent for effect in reader.effects[-3:])
            news = [event for event in reader.events[-3:] if isinstance(event, history.Publication)]
            return sends and any(int(event.body.split()[1]) > published for event in news)

        eventually("everybody gets new messages", 30, lambda: self._alive() and all(map(got, self.readers)))

    def end(self) -> list[str]:
        """Ends the writers, waits for what is under way, and says what was wrong."""
        self._writers_ended.set()
        for writer in (self.sender, self.publisher):
            writer.join(PATIENCE + 5)
            assert not writer.is_alive(), f"{writer.name} does not end"

        def all_came() -> bool:
            return all(
                len(reader.effects) >= len(self.sender.accepted[reader.user])
                and not history.check_end(reader.user, self.publisher.published, reader.events)
                for reader in self.readers
            )

        # What did not come by then, the checker names.
        with contextlib.suppress(AssertionError):
            eventually("every accepted message took effect", 20, all_came)
        self._readers_ended.set()
        for reader in self.readers:
            reader.hang_up()
            reader.join(10)
        return self._problems()

    def _alive(self) -> bool:
        for thread in (*self.readers, self.sender, self.publisher):
            assert thread.problem is None, thread.problem
        return True

    def _problems(self) -> list[str]:
        problems = [thread.problem for thread in (*self.readers, self.sender, self.publisher) if thread.problem]
        problems += history.check_published(self.publisher.published)
        for reader in self.readers:
            problems += history.check_inbox(reader.user, self.sender.accepted[reader.user], reader.effects)
            problems += history.check_subscriber(reader.user, self.publisher.published, reader.events)
            problems += history.check_end(reader.user, self.publisher.published, reader.events)
        return problems

    def summary(self) -> str:
        """How much there was, for a person, and to see that it was enough."""
        connections = sum(reader.connections for reader in self.readers)
        repeats = self.sender.repeats.total() + self.publisher.repeats.total()
        return (
            f"{self.sender.made} sends and {self.publisher.made} publishes, {repeats} repeats, "
            f"{len(self.readers)} readers with {connections} connections"
        )


def _or_os_error(make):
    try:
        return make()
    except grpc.RpcError as error:
        raise OSError(f"{error.code()}: {error.details()}") from error
