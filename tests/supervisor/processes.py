"""One service's process: started, watched, restarted when it dies, stopped in order."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .compose import Health
from .render import Rendered

# Pauses before a process that died is started again, in seconds; the first again once it was healthy for STEADY.
PAUSES = [0.1, 0.5, 1.0, 2.0, 5.0]
STEADY = 10.0
# When a program is asked whether it works although compose.yaml has no check for the image that it stands for.
UNLISTED = Health(test=[], interval=5.0, timeout=3.0, retries=3, start_period=60.0, start_interval=0.5)

# The variable that names the stack's directory in the environment of all that it starts.
MARK = "STACK_DIRECTORY"


def marked(directory: Path) -> list[int]:
    """The processes that were started for the stack of this directory."""
    mark = f"{MARK}={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's clock: tells it from a later one with the same id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]


def signal_group(pid: int, number: int) -> None:
    """Signals a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def group_lives(pid: int) -> bool:
    """Whether anything is left of what a process led."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Managed:
    """A service's process over all its runs."""

    def __init__(self, rendered: Rendered):
        self.rendered = rendered
        self.service = rendered.service
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.restarts = 0
        # Whether it was healthy in any of its runs.
        self.was_healthy = False
        self.failures = 0
        # What is wanted: "running", or "stopped" after a `stop`.
        self.wanted = "running"
        self.start_at = 0.0
        self.state = "waiting"
        self.last_exit: int | None = None
        self._check: subprocess.Popen[bytes] | None = None
        self._check_started = 0.0
        self._check_at = 0.0
        self._bad_checks = 0
        self._healthy_since: float | None = None

    @property
    def log(self) -> Path:
        return self.rendered.directory / "log"

    def start(self) -> None:
        """Starts the process; it leads a process group of its own."""
        rendered = self.rendered
        if rendered.done:
            self.state, self.wanted = "completed", "stopped"
            return
        wanted = self.service.nofile

        def limit() -> None:
            if wanted is not None:
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                rendered.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment(), **rendered.environment},
                cwd=rendered.directory / "data",
                start_new_session=True,
                preexec_fn=limit,
            )
        self.started = time.monotonic()
        self.state = "starting"
        self._bad_checks, self._healthy_since, self._check_at = 0, None, self.started
        if rendered.health is None:
            self.state = "running"

    def _environment(self) -> dict[str, str]:
        """What every process gets, whatever its service sets beside it."""
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TZ") if key in os.environ}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        # By this a process is known even if the supervisor dies before it has written down whom it started.
        environment[MARK] = str(self.rendered.directory.parents[1])
        return environment

    def tick(self, now: float, may_start: bool) -> None:
        """Looks at the process and does what follows. Called many times a second."""
        if self.process is None:
            due = self.wanted == "running" and now >= self.start_at and self.state != "completed"
            if due and may_start:
                self.start()
            return
        status = self.process.poll()
        if status is not None:
            self._ended(now, status)
        elif self.rendered.health is not None:
            self._check_health(now)

    def _ended(self, now: float, status: int) -> None:
        assert self.process is not None
        # What it started itself would keep its ports.
        signal_group(self.process.pid, signal.SIGKILL)
        self.process, self.last_exit = None, status
        self._drop_check()
        if self.wanted == "stopped":
            self.state = "stopped"
            return
        restart = self.service.restart
        if restart == "no" or (restart.startswith("on-failure") and status == 0):
            self.state = "completed" if status == 0 else "failed"
            self.wanted = "stopped"
            return
        if self._healthy_since is not None and now - self._healthy_since >= STEADY:
            self.failures = 0
        most = restart.partition(":")[2]
        if most and self.failures >= int(most):
            self.state, self.wanted = "failed", "stopped"
            return
        pause = PAUSES[min(self.failures, len(PAUSES) - 1)]
        self.failures, self.restarts = self.failures + 1, self.restarts + 1
        self.start_at, self.state = now + pause, "waiting"

    def _check_health(self, now: float) -> None:
        health = self.service.health or UNLISTED
        assert self.rendered.health is not None
        if self._check is None:
            if now >= self._check_at:
                self._check = subprocess.Popen(
                    self.rendered.health,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=self._environment(),
                    start_new_session=True,
                )
                self._check_started = now
            return
        status = self._check.poll()
        if status is None and now - self._check_started < health.timeout:
            return
        self._drop_check()
        starting = self.state == "starting"
        if status == 0:
            self.state, self._bad_checks = "healthy", 0
            self._healthy_since = self._healthy_since or now
            self.was_healthy = True
        elif not (starting and now - self.started < health.start_period):
            self._bad_checks += 1
            if self._bad_checks >= health.retries:
                self.state, self._healthy_since = "unhealthy", None
        pause = health.start_interval if self.state == "starting" else health.interval
        self._check_at = now + pause

    def _drop_check(self) -> None:
        if self._check is not None and self._check.poll() is None:
            signal_group(self._check.pid, signal.SIGKILL)
            self._check.wait()
        self._check = None

    def is_up(self) -> bool:
        """Whether it is as it should be."""
        if self.wanted == "stopped":
            return self.state in {"stopped", "completed"}
        return self.state in {"healthy", "running"}

    def fulfils(self, condition: str) -> bool:
        """Whether whoever depends on it may start."""
        if condition == "service_completed_successfully":
            return self.state == "completed"
        if condition == "service_healthy":
            return self.state == "healthy"
        return self.state in {"starting", "running", "healthy", "unhealthy", "completed"}

    def stop(self, grace: float | None = None) -> None:
        """Ends the process in order, or after its grace by force."""
        self.wanted = "stopped"
        if self.process is not None:
            self.process.send_signal(getattr(signal, self.service.stop_signal))
            try:
                self.last_exit = self.process.wait(self.service.stop_grace if grace is None else grace)
            except subprocess.TimeoutExpired:
                print(f"{self.service.name} did not end in its stop_grace_period; killed", file=sys.stderr)
            signal_group(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        self._drop_check()
        if self.state != "completed":
            self.state = "stopped"

    def describe(self) -> dict[str, Any]:
        """What `status` says of it."""
        pid = self.process.pid if self.process else None
        return {
            "name": self.service.name,
            "state": self.state,
            "pid": pid,
            "start_time": start_time(pid) if pid else None,
            "address": self.rendered.address,
            "restarts": self.restarts,
            "was_healthy": self.was_healthy,
            "last_exit": self.last_exit,
            "log": str(self.log),
        }
