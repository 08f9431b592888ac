"""Reads a Dockerfile, as far as ours goes: stages, arguments, and the instructions between them.

What it does not understand is an error, so that nothing is skipped in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from report import Failure

KNOWN = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
}
VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, and what follows it on its lines, joined."""

    name: str
    text: str
    line: int


@dataclass
class Stage:
    """What follows one FROM. `base` is an image, or the name of an earlier stage."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def one(self, name: str) -> str:
        """The text of an instruction that the stage must have exactly once."""
        found = self.all(name)
        if len(found) != 1:
            raise Failure(f"the stage {self.name or self.base} has {len(found)} {name} instructions and needs one")
        return found[0].text


@dataclass
class Dockerfile:
    """Arguments before the first FROM, and the stages in order."""

    arguments: dict[str, str]
    stages: list[Stage]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise Failure(f"the Dockerfile has no stage {name}")


def expand(text: str, variables: dict[str, str]) -> str:
    """Replaces `$NAME` and `${NAME}`; an unknown name is an error."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in variables:
            raise Failure(f"the Dockerfile uses {name} in {text!r} and never sets it")
        return variables[name]

    return VARIABLE.sub(value, text)


def instructions(text: str) -> list[Instruction]:
    """The instructions in order; lines that end in a backslash are joined, comments are left out."""
    found: list[Instruction] = []
    pending, began = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not pending and not line.strip()):
            continue
        began = began if pending else number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip() + " "
            continue
        name, _, rest = pending.partition(" ")
        if name not in KNOWN:
            raise Failure(f"line {began}: this reader does not know the instruction {name}; add it to dockerfile.py")
        found.append(Instruction(name, rest.strip(), began))
        pending = ""
    if pending:
        raise Failure(f"line {began}: the last instruction ends in a backslash")
    return found


def argument(text: str) -> tuple[str, str]:
    """An ARG's name and default, which may be in quotes."""
    name, _, default = text.partition("=")
    return name, default.strip('"')


def read(path: Path) -> Dockerfile:
    """Reads a file."""
    result = Dockerfile({}, [])
    for instruction in instructions(path.read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            words = instruction.text.split()
            named = len(words) == 3 and words[1].upper() == "AS"
            if not named and len(words) != 1:
                raise Failure(f"line {instruction.line}: FROM with options is not understood: {instruction.text}")
            result.stages.append(Stage(expand(words[0], result.arguments), words[2] if named else ""))
        elif result.stages:
            result.stages[-1].instructions.append(instruction)
        elif instruction.name == "ARG":
            name, default = argument(instruction.text)
            result.arguments[name] = default
        else:
            raise Failure(f"line {instruction.line}: {instruction.name} before the first FROM")
    return result
