"""The build context: what of a checkout a build may copy, after `.dockerignore`."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

from report import Failure


def rules(text: str) -> list[tuple[bool, re.Pattern[str]]]:
    """The patterns in order: whether each takes a path back in, and the paths that it matches."""
    found: list[tuple[bool, re.Pattern[str]]] = []
    for line in text.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        back = pattern.startswith("!")
        found.append((back, expression(pattern.removeprefix("!").strip("/"))))
    return found


def expression(pattern: str) -> re.Pattern[str]:
    """A pattern matches a path and everything below it. `**` stands for any number of directories, `*` for a name."""
    parts = []
    for part in pattern.split("/"):
        if part == "**":
            parts.append("(?:[^/]+/)*")
        else:
            parts.append(fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*") + "/")
    return re.compile("".join(parts).removesuffix("/") + "(?:/.*)?")


def included(path: str, patterns: list[tuple[bool, re.Pattern[str]]]) -> bool:
    """Whether the context has a path: the last pattern that matches decides."""
    answer = True
    for back, pattern in patterns:
        if pattern.fullmatch(path):
            answer = back
    return answer


def checkout_files(root: Path) -> list[str]:
    """What git would commit: tracked files and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=False,
        capture_output=True,
    )
    if listed.returncode != 0:
        raise Failure(f"git cannot list the files of {root}: {listed.stderr.decode(errors='replace').strip()}")
    names = [name.decode() for name in listed.stdout.split(b"\0") if name]
    return sorted({name for name in names if (root / name).is_file()})


def copy(root: Path, target: Path) -> int:
    """Makes a context from a checkout; returns the number of files in it."""
    patterns = rules((root / ".dockerignore").read_text(encoding="utf-8"))
    wanted = [name for name in checkout_files(root) if included(name, patterns)]
    for name in wanted:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, file)
    return len(wanted)
