"""A stack from outside: starts its supervisor, asks it, ends it, and cleans up after one that was killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .compose import load
from .processes import group_lives, marked, signal_group, start_time
from .programs import ROOT, sanjay_binary

COMPOSE = ROOT / "compose/compose.yaml"
# How long services may take until all are healthy.
START = 120.0
# A service that ended so often before it was healthy once will not become so by itself.
HOPELESS = 4


class StackError(Exception):
    """What went wrong, and what to do."""


def directory_of(name: str) -> Path:
    # It becomes part of a path that `down` removes.
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise StackError(f"{name!r} is no name of a stack; use 1 to 40 letters, digits, - and _")
    base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return Path(base) / f"sanjay-stack-{os.getuid()}-{name}"


def _owner_socket(block: str) -> socket.socket | None:
    """Claims a block of addresses for as long as the socket lives."""
    claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        claim.bind((f"{block}.254", 9))
    except OSError:
        claim.close()
        return None
    return claim


def listening(block: str) -> list[str]:
    """The addresses of a block on which somebody listens."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, port = local.split(":")
        # In the byte order of the machine; 0A is LISTEN.
        address = socket.inet_ntoa(struct.pack("=I", int(address, 16)))
        if state == "0A" and address.startswith(f"{block}."):
            found.append(f"{address}:{int(port, 16)}")
    return found


class Stack:
    """The stack of this name."""

    def __init__(self, name: str = "default"):
        self.name = name
        self.directory = directory_of(name)

    def up(self, profiles: set[str], edits: dict[str, str] | None = None, compose: Path = COMPOSE) -> dict[str, Any]:
        """Starts it and waits until every service is healthy; returns its status."""
        if self._supervisor_lives():
            raise StackError(f"the stack {self.name!r} is up already; `tests/stack down` ends it")
        load(compose, profiles)
        sanjay_binary()
        self._secrets(compose)
        self.clean()
        self.directory.mkdir(mode=0o700)
        block, claim = self._block()
        options = {"compose": str(compose), "profiles": sorted(profiles), "block": block, "edits": edits or {}}
        (self.directory / "options.json").write_text(json.dumps(options))
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        with (self.directory / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisor", str(self.directory)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True, pass_fds=[claim.fileno()],
            )  # fmt: skip
        claim.close()
        try:
            return self.wait(lambda status: status["up"], START, process)
        except BaseException:
            self.down()
            raise

    def wait(self, condition, patience: float, process=None) -> dict[str, Any]:
        """Waits until the status fulfils a condition."""
        until, status = time.monotonic() + patience, None
        while time.monotonic() < until:
            if process is not None and process.poll() is not None:
                log = (self.directory / "supervisor.log").read_text().strip()
                raise StackError(f"the supervisor ended: {log.splitlines()[-1] if log else process.returncode}")
            with contextlib.suppress(OSError, ValueError):
                status = self.status()
                new = [one for one in status["services"] if process and not one["was_healthy"]]
                if wrong := status["failed"] + [one["name"] for one in new if one["restarts"] >= HOPELESS]:
                    raise StackError(f"{wrong[0]} does not come up\n{self.tail(wrong[0])}")
                if condition(status):
                    return status
            time.sleep(0.1)
        good = {"healthy", "running", "completed", "stopped"}
        late = [one for one in (status or {"services": []})["services"] if one["state"] not in good]
        logs = "\n".join(f"--- {one['name']}: {one['state']}\n{self.tail(one['name'])}" for one in late[:3])
        raise StackError(f"the stack is not as it should be after {patience:.0f} s\n{logs}")

    def order(self, order: str, service: str | None = None) -> dict[str, Any]:
        """Gives the supervisor an order: status, stop, start, kill, end."""
        here = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(90)
                connection.connect(f"/proc/self/fd/{here}/socket")
                connection.sendall(json.dumps({"order": order, "service": service}).encode() + b"\n")
                answer = json.loads(connection.makefile("r").readline())
        finally:
            os.close(here)
        if "error" in answer:
            raise StackError(answer["error"])
        return answer

    def status(self) -> dict[str, Any]:
        return self.order("status")

    def down(self) -> None:
        """Ends everything, in order when the supervisor lives, else by what it wrote down."""
        if self._supervisor_lives():
            supervisor = self._state()["supervisor"]
            with contextlib.suppress(OSError, ValueError):
                self.order("end")
            until = time.monotonic() + 120
            while start_time(supervisor["pid"]) == supervisor["start_time"]:
                if time.monotonic() > until:
                    signal_group(supervisor["pid"], signal.SIGKILL)
                    break
                time.sleep(0.05)
        self.clean()

    def clean(self) -> None:
        """Kills what a supervisor left behind, and removes the stack's directory."""
        services = [one for one in self._state().get("services", []) if one["pid"]]
        leaders = [one["pid"] for one in services if start_time(one["pid"]) == one["start_time"]]
        for pid in leaders:
            signal_group(pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while pids := [*marked(self.directory), *filter(group_lives, leaders)]:
            if time.monotonic() > until:
                raise StackError(f"processes of the stack do not end after SIGKILL: {pids}")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        shutil.rmtree(self.directory, ignore_errors=True)

    def tail(self, service: str, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            log = (self.directory / "services" / service / "log").read_text(errors="replace")
            # Who is started again and again says the same each time.
            return "\n".join(list(dict.fromkeys(log.splitlines()))[-lines:])
        return "(no log)"

    def secret(self, name: str) -> str:
        return (COMPOSE.parent / "secrets" / name).read_text().strip()

    def _state(self) -> dict[str, Any]:
        try:
            return json.loads((self.directory / "stack.json").read_text())
        except (OSError, ValueError):
            return {}

    def _supervisor_lives(self) -> bool:
        supervisor = self._state().get("supervisor")
        return bool(supervisor) and start_time(supervisor["pid"]) == supervisor["start_time"]

    @staticmethod
    def _secrets(compose: Path) -> None:
        made = subprocess.run([compose.parent / "make-secrets.sh"], capture_output=True, text=True, check=False)
        if made.returncode:
            raise StackError(f"make-secrets.sh failed: {made.stderr.strip()}")

    @staticmethod
    def _block() -> tuple[str, socket.socket]:
        for number in range(1 << 10):
            block = f"127.{64 + number // 250}.{1 + number % 250}"
            # Services whose supervisor was killed still hold their block.
            if not listening(block) and (claim := _owner_socket(block)):
                return block, claim
        raise StackError("no block of loopback addresses is free; end other stacks with `tests/stack down`")
