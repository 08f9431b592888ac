"""Checks what operations rest on: the image's build, the compose file, alerts and their runbook, and the dashboard.

The last line is "N passed, N failed"; the exit status is 1 when a case failed. An argument runs only the cases that
have it in their name.
"""

from __future__ import annotations

import argparse
import sys

import compose_rules
import dashboards
import image
import monitoring
import notifications
from report import run_all


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("wanted", nargs="?", default="", help="run the cases that have this in their name")
    wanted = options.parse_args().wanted
    modules = (compose_rules, monitoring, notifications, dashboards, image)
    return run_all([case for module in modules for case in module.CASES], wanted)


if __name__ == "__main__":
    sys.exit(main())
