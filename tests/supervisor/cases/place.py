"""A running stack as its clients see it: where nginx is, which secrets there are, what each service's metrics say."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..stack import Stack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from sanjay_api import Api, Client  # noqa: E402

T = TypeVar("T")
ROLES = ("router", "delivery", "edge")


def eventually(what: str, patience: float, look: Callable[[], T | None]) -> T:
    """Looks until there is something other than None or False; AssertionError says what did not come, and `look`'s last
    AssertionError why not."""
    until, why = time.monotonic() + patience, ""
    while True:
        try:
            if found := look():
                return found
        except (AssertionError, OSError) as error:
            why = f": {error}"
        if time.monotonic() > until:
            raise AssertionError(f"not within {patience:.0f} s: {what}{why}")
        time.sleep(0.05)


class Place:
    """The stack, its addresses and credentials."""

    def __init__(self, stack: Stack):
        self.stack = stack

    def service(self, name: str) -> dict[str, Any]:
        """What the supervisor says of a service now."""
        return next(one for one in self.stack.status()["services"] if one["name"] == name)

    def ours(self) -> list[str]:
        """The services that are processes of Sanjay's three roles."""
        names = [one["name"] for one in self.stack.status()["services"]]
        return [name for name in names if name.rpartition("-")[0] in ROLES]

    def address(self, name: str) -> str:
        return self.service(name)["address"]

    def token(self, user: str) -> str:
        """A token for an hour, which allows every channel."""
        claims = {"sub": user, "exp": int(time.time()) + 3600, "caps": {"*": ["subscribe", "publish"]}}
        head, body = (_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        secret = self.stack.secret("token_secret").encode()
        return f"{head}.{body}.{_base64(hmac.digest(secret, f'{head}.{body}'.encode(), hashlib.sha256))}"

    def client(self, user: str, **hello: Any) -> Client:
        """A connection through nginx."""
        url = f"ws://{self.address('nginx')}:8080/v1/ws"
        return Client(user, url=url, token=self.token(user), **hello)

    def api(self) -> Api:
        """The back ends' API through nginx."""
        return Api(key=self.stack.secret("demo_api_key"), server=f"{self.address('nginx')}:8082")

    def metric(self, name: str, metric: str) -> float:
        """The sum of a metric's values at a service, 0 when it has none."""
        page = get(f"http://{self.address(name)}:8081/metrics").decode()
        found = re.findall(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)", page, re.MULTILINE)
        return sum(map(float, found))

    def edge_of_user(self, before: dict[str, float]) -> str:
        """The edge whose connections became more than they were `before`."""
        return eventually(
            "an edge has one more connection",
            10,
            lambda: next((name for name, number in self.connections().items() if number > before[name]), None),
        )

    def connections(self) -> dict[str, float]:
        """How many connections each edge has."""
        edges = [name for name in self.ours() if name.startswith("edge-")]
        return {name: self.metric(name, "sanjay_edge_connections") for name in edges}

    def kill(self, name: str) -> None:
        """SIGKILL, and waits until the supervisor has it healthy again."""
        before = self.service(name)
        os.kill(before["pid"], signal.SIGKILL)

        def back() -> bool:
            now = self.service(name)
            return now["pid"] not in (None, before["pid"]) and now["state"] == "healthy"

        eventually(f"{name} is healthy again after its death", 30, back)
        assert self.service(name)["restarts"] == before["restarts"] + 1, self.service(name)

    def signal(self, names: list[str], number: signal.Signals) -> None:
        """Signals each of these services."""
        for name in names:
            os.kill(self.service(name)["pid"], number)


def get(url: str, patience: float = 5) -> bytes:
    """The body of a page; OSError when there is none."""
    with urllib.request.urlopen(url, timeout=patience) as answer:
        return answer.read()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
