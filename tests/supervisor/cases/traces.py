"""The trace of a message, as a collector gets it from the processes of the stack; docs/tracing.md says what is due."""

from __future__ import annotations

import json
import secrets
import signal
from typing import Any

from .place import Place, eventually, get

Span = dict[str, Any]

# The span of the back end that calls.
CALLER = "00f067aa0ba902b7"

# What an inbox message is made of when its client returns the trace with the ack.
SEND = {
    "delivery send producer below the caller",
    "delivery process consumer below delivery send",
    "router relay producer below delivery process",
    "edge push consumer below router relay",
    "delivery settle consumer below edge push",
}


class Traces:
    """Calls the API under traces of its own, and looks for their spans."""

    def __init__(self, place: Place):
        self.place = place
        self.api = place.api()
        self.collector = f"http://{place.address('jaeger')}:16686/spans"

    def send(self, user: str) -> tuple[str, str]:
        """Sends to a user; gives the trace and the message's id."""
        trace = _new_trace()
        answer = self.api.call("Send", traceparent=f"00-{trace}-{CALLER}-01", users=[user], payload={"text": "t"})
        return trace, answer.results[0].accepted.message_id

    def publish(self, channel: str) -> str:
        """Publishes; gives the trace."""
        trace = _new_trace()
        parent = f"00-{trace}-{CALLER}-01"
        self.api.call("Publish", traceparent=parent, channel=channel, payload={"text": "t"})
        return trace

    def spans(self, trace: str) -> list[Span]:
        """What has come of a trace, by its begin."""
        return sorted(json.loads(get(f"{self.collector}?trace={trace}")), key=lambda span: span["start"])

    def wait(self, what: str, trace: str, condition) -> list[Span]:
        """Waits until the spans of a trace fulfil a condition. Processes export once a second."""

        def look() -> list[Span] | None:
            spans = self.spans(trace)
            assert condition(spans), f"{sorted(tree(spans))}"
            return spans

        return eventually(what, 20, look)

    def expect(self, trace: str, expected: list[str]) -> list[Span]:
        """Waits until the trace is exactly this, beside relays of redelivery, which a busy machine may add."""
        return self.wait(f"the trace is {sorted(expected)}", trace, lambda spans: tree(spans) == sorted(expected))


def _new_trace() -> str:
    return secrets.token_hex(16)


def _new_user() -> str:
    return f"user-{secrets.token_hex(8)}"


def tree(spans: list[Span]) -> list[str]:
    """The spans in words, sorted: which service did what, below what."""
    by_id = {span["id"]: span for span in spans}

    def parent(span: Span) -> str:
        if not span["parent"]:
            return "nothing"
        if span["parent"] == CALLER:
            return "the caller"
        above = by_id.get(span["parent"])
        return f"{_role(above)} {above['name']}" if above else "what is missing"

    first = (span for span in spans if "sanjay.redelivery.attempt" not in span["attributes"])
    return sorted(f"{_role(span)} {span['name']} {span['kind']} below {parent(span)}" for span in first)


def _role(span: Span) -> str:
    return span["service"].removeprefix("sanjay-")


def named(spans: list[Span], name: str, **attributes: Any) -> Span:
    """The one span of this name, with these attributes (`push_from` stands for `sanjay.push.from`)."""
    wanted = {f"sanjay.{key.replace('_', '.')}": value for key, value in attributes.items()}
    found = [
        span
        for span in spans
        if span["name"] == name and all(span["attributes"].get(key) == value for key, value in wanted.items())
    ]
    assert len(found) == 1, f"{len(found)} spans {name} with {wanted} in {spans}"
    return found[0]


def _all(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span["name"] == name]


def _ack(client, message: dict[str, Any]) -> None:
    answer = client.call(ack={"ranges": [[message["seq"], message["seq"]]], "trace": message["trace"]})
    assert "ok" in answer, answer


def _describes(spans: list[Span], message_id: str) -> None:
    for span in spans:
        attributes = span["attributes"]
        assert attributes["messaging.system"] == "sanjay", span
        assert attributes["messaging.message.id"] == message_id, span
        assert attributes["messaging.operation.name"] == span["name"], span
        assert attributes["messaging.destination.template"] == "inbox/{user}", span
        assert not span["error"], span


def normal(place: Place) -> None:
    """A message to a user who is connected: five spans of three services, each below the one before; and a publish."""
    traces, user = Traces(place), _new_user()
    client = place.client(user)
    trace, message_id = traces.send(user)
    message = client.event("inbox")
    _ack(client, message)
    spans = traces.expect(trace, list(SEND))
    _describes(spans, message_id)
    push = named(spans, "push", push_from="hint")
    assert message["trace"] == f"00-{trace}-{push['id']}-01", f"the client sees the push: {message}"
    assert all(not span["links"] for span in spans), spans
    assert user not in json.dumps(spans), "no span names a user"

    assert "subscribed" in client.call(subscribe={"channel": "traces"})
    trace = traces.publish("traces")
    client.event("message")
    expected = [
        "delivery publish producer below the caller",
        "router publish consumer below delivery publish",
        "router relay producer below router publish",
        "edge push consumer below router relay",
    ]
    traces.expect(trace, expected)
    client.close()


def redelivered(place: Place) -> None:
    """A message that no edge reports written is relayed again, in the same trace, and links its first relay."""
    # Only the router that made the first relay can link it, so there is one.
    place.stack.order("stop", "router-2")
    try:
        _redelivered(place, [name for name in place.ours() if name.startswith("edge-")])
    finally:
        place.stack.order("start", "router-2")
    eventually("router-2 is back", 20, lambda: place.service("router-2")["state"] == "healthy")


def _redelivered(place: Place, edges: list[str]) -> None:
    traces, user = Traces(place), _new_user()
    attached = lambda: place.metric("router-1", "sanjay_router_attached_edges") == len(edges)  # noqa: E731
    eventually("every edge is attached to router-1", 20, attached)
    client = place.client(user)
    place.signal(edges, signal.SIGSTOP)
    try:
        trace, message_id = traces.send(user)
        spans = traces.wait("it is relayed again", trace, lambda spans: len(_all(spans, "relay")) >= 2)
    finally:
        place.signal(edges, signal.SIGCONT)
    first, again = _all(spans, "relay")[:2]
    assert "sanjay.redelivery.attempt" not in first["attributes"] and not first["links"], first
    assert again["attributes"]["sanjay.redelivery.attempt"] == 1, again
    assert again["links"] == [{"trace": trace, "id": first["id"]}], again
    assert first["parent"] == again["parent"], "both are below what the inbox stored"
    _ack(client, client.event("inbox"))
    done = lambda spans: _all(spans, "settle") and _all(spans, "push")  # noqa: E731
    spans = traces.wait("it is pushed and settled", trace, done)
    assert named(spans, "settle")["parent"] in {span["id"] for span in _all(spans, "push")}, spans
    _describes(spans, message_id)
    client.close()


def offline(place: Place) -> None:
    """A message to a user who is away: relayed to nobody, then read from the inbox when the user comes."""
    traces, user = Traces(place), _new_user()
    trace, message_id = traces.send(user)
    spans = traces.wait("it is relayed", trace, lambda spans: any(span["name"] == "relay" for span in spans))
    assert named(spans, "relay")["attributes"]["sanjay.edges"] == 0, spans
    client = place.client(user)
    _ack(client, client.event("inbox"))
    expected = SEND - {"edge push consumer below router relay"} | {"edge push consumer below delivery process"}
    spans = traces.expect(trace, list(expected))
    named(spans, "push", push_from="read")
    _describes(spans, message_id)
    client.close()


def edge_killed(place: Place) -> None:
    """The edge that holds a user dies after it pushed; another one, or the same anew, reads the message."""
    traces, user = Traces(place), _new_user()
    before = place.connections()
    client = place.client(user)
    edge = place.edge_of_user(before)
    trace, message_id = traces.send(user)
    client.event("inbox")
    # What an edge has not exported yet dies with it.
    traces.wait("it is pushed", trace, lambda spans: any(span["name"] == "push" for span in spans))
    place.kill(edge)
    client = place.client(user)
    _ack(client, client.event("inbox"))
    spans = traces.expect(trace, [*SEND, "edge push consumer below delivery process"])
    again = named(spans, "push", push_from="read")
    assert named(spans, "settle")["parent"] == again["id"], spans
    _describes(spans, message_id)
    client.close()
