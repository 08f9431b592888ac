"""Runs the cases against one stack of its own: `python -m supervisor.cases [CASE…]`; ends with "N passed, N failed".

The checker's own tests come first: what they do not hold, no case can show.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
import unittest
from collections.abc import Callable

from ..compose import ComposeError
from ..programs import ROOT, MissingProgram, sanjay_binary
from ..stack import COMPOSE, Stack, StackError
from . import alerts, kills, life, pace, traces
from .place import Place

# In this order: an alert about a process that died may need a while to end, so deaths come last.
CASES: dict[str, Callable[[Place], None]] = {
    "message": life.message_through_nginx,
    "trace": traces.normal,
    "trace-offline": traces.offline,
    "targets": alerts.targets,
    "data": alerts.data,
    "outage": alerts.outage,
    "trace-redelivered": traces.redelivered,
    "trace-edge-killed": traces.edge_killed,
    "kills": kills.each_process_is_killed,
}
# These start stacks of their own.
ALONE: dict[str, Callable[[], None]] = {
    "checker": lambda: _unit_tests("history_tests"),
    "down": life.down_leaves_nothing,
    "supervisor-killed": life.down_after_the_supervisor_was_killed,
    "demo": life.demo,
    "configuration": life.configuration,
    "refusals": life.what_cannot_be_honoured_is_refused,
}
LOGS = ROOT / "tests/.out/stack"


class Tally:
    """What passed and what failed."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def run(self, name: str, case: Callable[[], None]) -> bool:
        """Runs a case and says how it went."""
        start = time.monotonic()
        try:
            case()
        except Exception:
            self.failed += 1
            print(f"FAILED {name} ({time.monotonic() - start:.1f} s)\n{traceback.format_exc()}", flush=True)
            return False
        self.passed += 1
        print(f"ok     {name} ({time.monotonic() - start:.1f} s)", flush=True)
        return True


def _unit_tests(module: str) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromName(f"supervisor.cases.{module}")
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=0).run(suite)
    assert result.testsRun and result.wasSuccessful(), "see above"


def _with_stack(tally: Tally, names: list[str]) -> None:
    stack = Stack(f"tests-{os.getpid()}")

    def up() -> None:
        stack.up({"observe"}, edits=pace.edits(COMPOSE.parent))

    try:
        if not tally.run("up", up):
            return
        place = Place(stack)
        failed = [name for name in names if not tally.run(name, lambda name=name: CASES[name](place))]
        if failed:
            _keep_logs(stack)
    finally:
        tally.run("up-down", stack.down)


def _keep_logs(stack: Stack) -> None:
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    for log in (stack.directory / "services").glob("*/log"):
        shutil.copyfile(log, LOGS / f"{log.parent.name}.log")
    print(f"       logs of the services are in {LOGS.relative_to(ROOT)}", flush=True)


def main() -> int:
    every = [*ALONE, *CASES]
    parser = argparse.ArgumentParser(prog="tests/run stack", description="The whole stack as processes.")
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"one of {', '.join(every)}; all when left out")
    names = parser.parse_args().names or every
    if unknown := set(names) - set(every):
        parser.error(f"there is no case {sorted(unknown)[0]!r}; there are {', '.join(every)}")
    tally = Tally()
    try:
        print(f"the binary is {sanjay_binary()}", flush=True)
        for name in ALONE:
            if name in names:
                tally.run(name, ALONE[name])
        if chosen := [name for name in CASES if name in names]:
            _with_stack(tally, chosen)
    except (ComposeError, MissingProgram, StackError) as error:
        print(error)
        tally.failed += 1
    print(f"{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
