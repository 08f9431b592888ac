"""The supervisor: one process that keeps the services of a stack as they should be, and takes orders over a socket."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from .compose import load
from .processes import Managed, start_time
from .render import Renderer

TICK = 0.05


class Supervisor:
    """Runs in the stack's directory, whose `stack.json` it keeps up to date for whoever comes after it."""

    def __init__(self, directory: Path, options: dict[str, Any]):
        self.directory = directory
        self.options = options
        services = load(Path(options["compose"]), set(options["profiles"]))
        renderer = Renderer(services, options["block"], directory, options.get("edits", {}))
        rendered = {name: renderer.render(service) for name, service in services.items()}
        self.skipped = [name for name, one in rendered.items() if one is None]
        self.services = {name: Managed(one) for name, one in rendered.items() if one is not None}
        self.order = self._order()
        self.problem = ""
        self.stopping = False
        self._written = ""

    def _order(self) -> list[str]:
        """Each after what it depends on."""
        order: list[str] = []

        def add(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"services depend on each other in a circle: {' -> '.join((*path, name))}")
            if name not in order and name in self.services:
                for other in self.services[name].service.depends_on:
                    add(other, (*path, name))
                order.append(name)

        for name in self.services:
            add(name, ())
        return order

    def run(self) -> None:
        """Until it is told to end."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))
        place = self.directory / "socket"
        place.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        # A path of a socket is short; the directory's may not be.
        os.chdir(self.directory)
        listener.bind("socket")
        listener.listen(8)
        listener.setblocking(False)
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        while not self.stopping:
            self._tick()
            if selector.select(TICK):
                self._serve(listener)
        self._stop_all()
        place.unlink(missing_ok=True)
        self._write()

    def _tick(self) -> None:
        now = time.monotonic()
        for name in self.order:
            managed = self.services[name]
            # A restart waits for nobody: conditions are about the first start, as with docker compose.
            may_start = managed.started > 0 or all(
                self.services[other].fulfils(condition)
                for other, condition in managed.service.depends_on.items()
                if other in self.services
            )
            managed.tick(now, may_start)
        self._write()

    def _stop_all(self) -> None:
        for name in reversed(self.order):
            self.services[name].stop()

    def _serve(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(1)
            try:
                order = json.loads(connection.makefile("r").readline())
                answer = self._obey(order)
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError) as error:
                print(f"an order was not understood: {error}", file=sys.stderr)

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        what, name = order.get("order"), order.get("service")
        if what == "status":
            return self.describe()
        if what == "end":
            self.stopping = True
            return {}
        managed = self.services.get(str(name))
        if managed is None:
            return {"error": f"there is no service {name!r}; there are {', '.join(self.services)}"}
        if what == "stop":
            managed.stop()
        elif what == "kill":
            managed.wanted = "stopped"
            if managed.process:
                os.killpg(managed.process.pid, signal.SIGKILL)
        elif what == "start":
            managed.wanted, managed.start_at, managed.failures = "running", 0.0, 0
            if managed.process is None:
                managed.state = "waiting"
        else:
            return {"error": f"there is no order {what!r}"}
        self._write()
        return {}

    def describe(self) -> dict[str, Any]:
        """What `status` shows."""
        return {
            "supervisor": {"pid": os.getpid(), "start_time": start_time(os.getpid())},
            "block": self.options["block"],
            "up": all(managed.is_up() for managed in self.services.values()),
            "failed": [name for name, managed in self.services.items() if managed.state == "failed"],
            "skipped": self.skipped,
            "services": [self.services[name].describe() for name in self.services],
        }

    def _write(self) -> None:
        text = json.dumps(self.describe())
        if text != self._written:
            new = self.directory / "stack.json.new"
            new.write_text(text)
            new.rename(self.directory / "stack.json")
            self._written = text


if __name__ == "__main__":
    where = Path(sys.argv[1])
    Supervisor(where, json.loads((where / "options.json").read_text())).run()
