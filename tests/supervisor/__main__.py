"""The command line of tests/stack."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from .compose import ComposeError
from .programs import MissingProgram
from .stack import Stack, StackError


def table(status: dict) -> str:
    rows = [("SERVICE", "STATE", "ADDRESS", "PID", "RESTARTS")]
    for one in status["services"]:
        rows.append((one["name"], one["state"], one["address"], str(one["pid"] or "-"), str(one["restarts"])))
    rows.extend((name, "not here", "-", "-", "-") for name in status["skipped"])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def hints(stack: Stack, status: dict) -> str:
    nginx = next(one["address"] for one in status["services"] if one["name"] == "nginx")
    lines = [
        "",
        f"clients      ws://{nginx}:8080/v1/ws (TLS on port 8443; its certificate is for localhost)",
        f"back ends    http://{nginx}:8082",
        f"logs         {stack.directory}/services/SERVICE/log",
        "secrets      compose/secrets/",
    ]
    for name, port in (("prometheus", 9090), ("alertmanager", 9093)):
        lines.extend(
            f"{name:12} http://{one['address']}:{port}" for one in status["services"] if one["name"] == name
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/stack", description="The services of compose.yaml as plain processes.")
    parser.add_argument("--name", default="default", help="of the stack; several may run beside each other")
    orders = parser.add_subparsers(dest="order", required=True)
    up = orders.add_parser("up", help="start it and wait until it is healthy")
    up.add_argument("--profile", action="append", default=[], help="of compose.yaml: observe, demo; may be repeated")
    orders.add_parser("down", help="end it; nothing of it stays")
    status = orders.add_parser("status", help="what runs")
    status.add_argument("--json", action="store_true")
    for name, help_ in (("stop", "end one service"), ("start", "start one again"), ("kill", "SIGKILL, and keep it down")):
        orders.add_parser(name, help=help_).add_argument("service")
    arguments = parser.parse_args()
    # A start that is told to end takes back what it has started, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("tests/stack: told to end"))
    try:
        stack = Stack(arguments.name)
        if arguments.order == "up":
            state = stack.up(set(arguments.profile))
            print(table(state))
            print(hints(stack, state))
        elif arguments.order == "down":
            stack.down()
        elif arguments.order == "status":
            state = stack.status()
            print(json.dumps(state) if arguments.json else table(state))
            return 0 if state["up"] else 1
        else:
            stack.order(arguments.order, arguments.service)
    except (ComposeError, MissingProgram, StackError) as error:
        print(f"tests/stack: {error}", file=sys.stderr)
        return 1
    except FileNotFoundError:
        print(f"tests/stack: the stack {arguments.name!r} is not up; `tests/stack up` starts it", file=sys.stderr)
        return 1
    except (ConnectionError, TimeoutError) as error:
        print(f"tests/stack: the supervisor does not answer ({error}); `tests/stack down` cleans up", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
