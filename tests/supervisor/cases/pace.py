"""Makes the times of the monitoring shorter, because the shipped ones take minutes: a copy with every duration scaled.

What is scaled are intervals, `for:`, ranges and offsets; thresholds and the way things are computed stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

# A tenth: two scrapes of 1.5 s are in every range, and an alert that waits for a minute waits for six seconds.
FACTOR = 0.1
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
DURATION = r"(?:\d+(?:ms|[smhdw]))+"
KEYS = "scrape_interval|scrape_timeout|evaluation_interval|interval|for|keep_firing_for"
KEYS += "|group_wait|group_interval|repeat_interval"
TEXTS = re.compile(rf"(?P<before>\b(?:{KEYS}): |\boffset |\[)(?P<duration>{DURATION})(?P<after>\n|\b|\])")


def seconds(duration: str) -> float:
    """A duration of Prometheus, such as `1h30m`."""
    return sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw])", duration))


def edits(directory: Path, factor: float = FACTOR) -> dict[str, str]:
    """What to replace in the files of Prometheus and Alertmanager below `directory`. In this order no replacement is
    replaced again: shorter durations come first, and what they become is shorter than all that follow."""
    found = {}
    patterns = ("prometheus/*.yml", "prometheus/rules/*.yml", "alertmanager/*.yml")
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        for match in TEXTS.finditer(path.read_text()):
            scaled = round(seconds(match["duration"]) * factor * 1000)
            found[match[0]] = f"{match['before']}{scaled}ms{match['after']}", scaled
    ordered = sorted(found.items(), key=lambda entry: entry[1][1])
    return {old: new for old, (new, _) in ordered}
