"""Runs cases one after another and counts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """A case found something wrong; the text says what, and what would be right."""


@dataclass(frozen=True)
class Case:
    """One thing that must hold. `run` raises a `Failure` unless it does."""

    name: str
    run: Callable[[], None]


def require(holds: bool, problem: str) -> None:
    """Fails the case with this problem unless the condition holds."""
    if not holds:
        raise Failure(problem)


def require_none(problems: Iterable[str]) -> None:
    """Fails the case with all of the problems, when there are any."""
    found = list(problems)
    require(not found, "\n".join(found))


def command(
    *words: str | Path,
    directory: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    seconds: float = 60,
) -> str:
    """Runs a program and returns what it printed, on both outputs. Fails unless it ends with status 0 in time."""
    line = [str(word) for word in words]
    try:
        # A session of its own, so that what the program has started ends with it.
        process = subprocess.Popen(
            line,
            cwd=directory,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise Failure(f"{line[0]} is missing: `tests/run operations` installs it") from error
    try:
        said, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failure(f"`{' '.join(line)}` did not end within {seconds:.0f} s") from error
        raise
    require(process.returncode == 0, f"`{' '.join(line)}` ended with status {process.returncode}:\n{said.strip()}")
    return said


def run_all(cases: Iterable[Case], wanted: str) -> int:
    """Runs the cases whose name contains `wanted` and prints the count; returns the exit status."""
    passed = failed = 0
    for case in cases:
        if wanted not in case.name:
            continue
        try:
            case.run()
        except Failure as failure:
            failed += 1
            print(f"FAILED {case.name}\n    " + str(failure).replace("\n", "\n    "), flush=True)
        except Exception:  # A case that breaks has failed, and the others are run all the same.
            failed += 1
            print(f"FAILED {case.name}\n{traceback.format_exc()}", flush=True)
        else:
            passed += 1
            print(f"ok {case.name}", flush=True)
    if passed + failed == 0:
        print(f"no case has {wanted!r} in its name", file=sys.stderr)
        failed = 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
