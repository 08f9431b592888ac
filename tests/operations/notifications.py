"""Cases with a running Alertmanager: who is told of an alert, in which words, and who is not.

It runs on a copy of its file in which only addresses and waiting times differ. The receiver is a small HTTP server.
"""

from __future__ import annotations

import datetime
import http.server
import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitoring import ALERTMANAGER
from report import Case, Failure, require, require_none

SECONDS = 30
NOTES = {"summary": "a summary", "description": "a description", "runbook_url": "docs/runbook.md#anchor"}
# What is there, and which other alert must then stay silent, or must not.
INHIBITED = [
    ({"alertname": "DependencyDown", "dependency": "redis"}, {"alertname": "PublishesFailing"}),
    ({"alertname": "DependencyDown", "dependency": "mongodb"}, {"alertname": "StoreErrors"}),
    ({"alertname": "DependencyDown", "dependency": "router"}, {"alertname": "EdgeNotAttached"}),
    ({"alertname": "DependencyDown", "dependency": "delivery"}, {"alertname": "SendsFailing"}),
    ({"alertname": "TargetDown", "job": "sanjay-router"}, {"alertname": "PeersUnhealthy"}),
    ({"alertname": "UndeliveredMessagesStuck"}, {"alertname": "UndeliveredMessagesOld"}),
    (
        {"alertname": "DeliveryLatencyBurnFast", "kind": "inbox"},
        {"alertname": "DeliveryLatencyBurnSlow", "kind": "inbox"},
    ),
    (
        {"alertname": "CertificateExpiresNow", "instance": "a:1"},
        {"alertname": "CertificateExpiresSoon", "instance": "a:1"},
    ),
    (
        {"alertname": "CrashLoop", "job": "j", "instance": "a:1"},
        {"alertname": "TargetDown", "job": "j", "instance": "a:1"},
    ),
]
NOT_INHIBITED = [
    ({"alertname": "DependencyDown", "dependency": "redis"}, {"alertname": "StoreErrors"}),
    ({"alertname": "DependencyDown", "dependency": "mongodb"}, {"alertname": "InboxAuditDifference"}),
    ({"alertname": "TargetDown", "job": "sanjay-edge"}, {"alertname": "PeersUnhealthy"}),
    (
        {"alertname": "DeliveryLatencyBurnFast", "kind": "inbox"},
        {"alertname": "DeliveryLatencyBurnSlow", "kind": "channel"},
    ),
    (
        {"alertname": "CertificateExpiresNow", "instance": "a:1"},
        {"alertname": "CertificateExpiresSoon", "instance": "b:1"},
    ),
    (
        {"alertname": "CrashLoop", "job": "j", "instance": "a:1"},
        {"alertname": "TargetDown", "job": "j", "instance": "b:1"},
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: str, holds: Callable[[], Any]) -> Any:
    """Polls until the condition holds and returns what it returned."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if answer := holds():
            return answer
        time.sleep(0.05)
    raise Failure(f"after {SECONDS} s still not: {what}")


class Receiver:
    """Takes notifications and keeps them."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        got = self.got

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Says nothing: at its end Alertmanager does not wait for answers."""

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"

    def titles(self) -> list[str]:
        return [attachment["title"] for body in self.got for attachment in body["attachments"]]


class Alertmanager:
    """An Alertmanager that ends with the block it was made for."""

    def __enter__(self) -> Alertmanager:
        self.receiver = Receiver()
        self.directory = Path(tempfile.mkdtemp(prefix="sanjay-alertmanager-"))
        (self.directory / "url").write_text(self.receiver.url, encoding="utf-8")
        (self.directory / "alertmanager.yml").write_text(self.rendered(), encoding="utf-8")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = (self.directory / "log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [
                "prometheus-alertmanager",
                f"--config.file={self.directory / 'alertmanager.yml'}",
                f"--storage.path={self.directory / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--cluster.listen-address=",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        try:
            eventually("Alertmanager is ready", self.ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.receiver.server.shutdown()
        self.receiver.server.server_close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def rendered(self) -> str:
        text = ALERTMANAGER.read_text(encoding="utf-8")
        text, files = re.subn(r"/run/secrets/alert_webhook_url", str(self.directory / "url"), text)
        text, times = re.subn(r"(?m)^( *group_(?:wait|interval)): .*$", r"\1: 1s", text)
        require(
            files > 0 and times > 1,
            "alertmanager.yml has no alert_webhook_url or no waiting times any more; adapt this case",
        )
        return text

    def ready(self) -> bool:
        if self.process.poll() is not None:
            self.log.seek(0)
            raise Failure(f"Alertmanager ended with status {self.process.returncode}:\n{self.log.read()}")
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def send(self, *alerts: dict[str, str], resolved: bool = False) -> None:
        """Reports alerts as Prometheus would; all of a call at once."""
        now = datetime.datetime.now(datetime.UTC)
        ends = now - datetime.timedelta(seconds=1) if resolved else now + datetime.timedelta(minutes=5)
        body = [
            {
                "labels": labels,
                "annotations": NOTES,
                "startsAt": (now - datetime.timedelta(minutes=1)).isoformat(),
                "endsAt": ends.isoformat(),
            }
            for labels in alerts
        ]
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            require(answer.status == 200, f"Alertmanager answered {answer.status}")

    def inhibited(self, labels: dict[str, str]) -> bool | None:
        """Whether an alert is kept silent by another one; nothing while Alertmanager has not looked at it."""
        with urllib.request.urlopen(f"{self.url}/api/v2/alerts", timeout=5) as answer:
            for alert in json.load(answer):
                if alert["labels"] == labels and alert["status"]["state"] != "unprocessed":
                    return bool(alert["status"]["inhibitedBy"])
        return None


def notifications_say_what_to_do() -> None:
    with Alertmanager() as alertmanager:
        urgent = {"alertname": "DependencyDown", "severity": "critical", "job": "sanjay-router", "dependency": "redis"}
        alertmanager.send(
            urgent,
            {"alertname": "GapRateHigh", "severity": "warning"},
            {"alertname": "StoreErrors", "severity": "warning"},
        )
        titles = eventually(
            "both notifications came", lambda: len(alertmanager.receiver.got) >= 2 and alertmanager.receiver.titles()
        )
        require(
            sorted(titles) == ["[FIRING, at once] DependencyDown", "[FIRING] StoreErrors"], f"the titles are {titles}"
        )
        for body in alertmanager.receiver.got:
            text = body["attachments"][0]["text"]
            require_none(f"the text lacks the {key}: {text!r}" for key, value in NOTES.items() if value not in text)
        alertmanager.send(urgent, resolved=True)
        eventually("the end was told", lambda: "[RESOLVED, at once] DependencyDown" in alertmanager.receiver.titles())


def silenced(cause: dict[str, str], other: dict[str, str]) -> bool:
    """Whether the second alert is kept silent while the first is there."""
    with Alertmanager() as alertmanager:
        alertmanager.send(cause)
        eventually(f"{cause} is known", lambda: alertmanager.inhibited(cause) is False)
        alertmanager.send(other)
        eventually(f"{other} is known", lambda: alertmanager.inhibited(other) is not None)
        return alertmanager.inhibited(other) is True


def inhibition_leaves_the_cause() -> None:
    require_none(
        [f"{other} is not silent beside {cause}" for cause, other in INHIBITED if not silenced(cause, other)]
        + [f"{other} is silent beside {cause}" for cause, other in NOT_INHIBITED if silenced(cause, other)]
    )


CASES = [
    Case("alertmanager: notifications go to their receiver and say what to do", notifications_say_what_to_do),
    Case("alertmanager: inhibition leaves the cause and nothing else", inhibition_leaves_the_cause),
]
