"""Runs the terminals that a page of the documentation shows, as they are printed, and compares what comes out.

Conventions of a page's fenced blocks:

- A `console` block begins with `# terminal N`. Terminals are shells of their own in one directory.
- `$ command` is typed there once the terminal's last command has ended; it must end with status 0.
- Lines below a command are its output. A block without a command goes on with the output of the one that still runs.
- `^C` is typed at the command that still runs. How that one ends is then its own business.
- `…` stands for anything within a line; a line that is `…` alone stands for any number of lines. When it is the last
  one, more may follow later, and how the command ends does not matter either.
- A UUID stands for the first one seen in its place, in later commands too.
- A block whose first line is a comment that begins with a file's name (`# send.py USER: …`) is that file, written there.
- `text` blocks are pictures. Every other block must be one that is known to be skipped, so that nothing goes unrun by
  accident.
"""

import os
import pathlib
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field

FREE_PORTS = " ".join(f"--{name} 127.0.0.1:0" for name in ("listen", "admin-listen", "delivery-listen", "router-listen"))
SOURCE = re.compile(r"(?:#|//) ([a-z_]+\.(?:py|js))\b")
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
PORT = re.compile(r":808[0-3]\b")
INTERRUPT = "^C"

# Reads commands from a descriptor of their own, so that what they start has no input: nobody types into it.
SHELL = r"""
trap : INT
while IFS= read -r -u "$COMMANDS" line; do
    eval "$line"
    printf '%s %s\n' "$MARK" "$?"
done
"""


class Failure(Exception):
    """A step did not do what the page says."""


@dataclass
class Step:
    """What is typed into a terminal, if anything, and what must appear there."""

    terminal: str
    typed: str | None
    line: int
    expected: list[str] = field(default_factory=list)

    @property
    def open_ended(self) -> bool:
        return bool(self.expected) and self.expected[-1] == "…"

    def __str__(self) -> str:
        return f"terminal {self.terminal}: {self.typed or '(more output)'}"


@dataclass
class Source:
    """A file that the page shows."""

    name: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"file {self.name}"


def parse(text: str, skipped: set[tuple[str, str]]) -> list[Step | Source]:
    """The steps of every fenced block, in order. `skipped` are languages with the block's text."""
    steps: list[Step | Source] = []
    block = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            if block is not None:
                block[2].append((number, line))
        elif block is None:
            block = (line[3:].strip(), number, [])
        else:
            steps += parse_block(*block, skipped)
            block = None
    if block is not None:
        raise Failure(f"line {block[1]}: the block does not end")
    return steps


def parse_block(
    language: str, start: int, lines: list[tuple[int, str]], skipped: set[tuple[str, str]]
) -> list[Step | Source]:
    body = "".join(line + "\n" for _, line in lines)
    if language == "text" or (language, body) in skipped:
        return []
    first = lines[0][1] if lines else ""
    if name := SOURCE.match(first):
        return [Source(name[1], start, body)]
    title = re.fullmatch(r"# terminal (\d+)", first)
    if language != "console" or title is None:
        raise Failure(f"line {start}: neither a terminal, nor a file, nor known to be skipped:\n{body}")
    steps: list[Step] = []
    for number, line in lines[1:]:
        if line.startswith("$ ") or line == INTERRUPT:
            steps.append(Step(title[1], line.removeprefix("$ "), number))
        else:
            if not steps:
                steps.append(Step(title[1], None, number))
            steps[-1].expected.append(line)
    return steps


class Terminal:
    """A shell in a session of its own, with what its current command has printed."""

    def __init__(self, directory: str, environment: dict[str, str]):
        self.mark = f"mark-{os.urandom(8).hex()}"
        commands, self.commands = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-c", SHELL, "terminal"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(commands,),
            start_new_session=True,
            cwd=directory,
            env=environment | {"MARK": self.mark, "COMMANDS": str(commands)},
        )
        os.close(commands)
        self.changed = threading.Condition()
        self.output = ""
        self.status: int | None = 0
        self.last: Step | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        pending = b""
        mark = re.compile(re.escape(self.mark.encode()) + rb" (\d+)\n")
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            pending += chunk
            with self.changed:
                if found := mark.search(pending):
                    self.output += pending[: found.start()].decode(errors="replace")
                    pending = pending[found.end() :]
                    self.status = int(found[1])
                elif self.mark.encode() not in pending:
                    # Only whole lines, so that a mark is never taken for output.
                    end = pending.rfind(b"\n") + 1
                    self.output += pending[:end].decode(errors="replace")
                    pending = pending[end:]
                self.changed.notify_all()
        with self.changed:
            self.output += pending.decode(errors="replace")
            self.status = -1 if self.status is None else self.status
            self.changed.notify_all()

    def wait(self, condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self.changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self.changed.wait(left)
        return True

    def type(self, command: str) -> None:
        self.output, self.status = "", None
        os.write(self.commands, (command + "\n").encode())

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        # The session's group holds the shell and all that it started.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self.commands)


class Tour:
    """Runs steps and remembers what stands for what."""

    def __init__(self, directory: str, environment: dict[str, str], seconds: float):
        self.directory, self.environment, self.seconds = directory, environment, seconds
        self.terminals: dict[str, Terminal] = {}
        self.known: dict[str, str] = {}

    def terminal(self, name: str) -> Terminal:
        if name not in self.terminals:
            self.terminals[name] = Terminal(self.directory, self.environment)
        return self.terminals[name]

    def run(self, step: Step | Source) -> None:
        if isinstance(step, Source):
            pathlib.Path(self.directory, step.name).write_text(step.text, encoding="utf-8")
            return
        terminal = self.terminal(step.terminal)
        if step.typed == INTERRUPT:
            if terminal.status is not None:
                raise Failure(f"there is nothing to interrupt:\n{terminal.output}")
            terminal.interrupt()
            if not terminal.wait(lambda: terminal.status is not None, self.seconds):
                raise Failure(f"it did not end within {self.seconds} s of ^C")
        elif step.typed is not None:
            self.finish(terminal)
            terminal.type(self.command(step.typed))
        self.expect(terminal, step)
        terminal.last = step

    def command(self, typed: str) -> str:
        """What is typed, with the UUIDs that were seen. A page's own tour puts its free ports in here."""
        return UUID.sub(lambda found: self.known.get(found[0], found[0]), typed)

    def expect(self, terminal: Terminal, step: Step) -> None:
        """Waits until the output begins with what is expected, and takes that away."""
        pattern, names = self.pattern(step, terminal)
        found = None

        def matches() -> bool:
            nonlocal found
            found = pattern.match(terminal.output)
            return found is not None or terminal.status is not None

        in_time = terminal.wait(matches, self.seconds)
        with terminal.changed:
            found = pattern.match(terminal.output)
            if found is None:
                why = "the command ended" if in_time else f"after {self.seconds} s"
                raise Failure(f"{why}; expected\n{indent(step.expected)}\nbut there is\n{indent(terminal.output.splitlines())}")
            terminal.output = terminal.output[found.end() :]
        self.known.update({uuid: found[group] for uuid, group in names.items()})

    def pattern(self, step: Step, terminal: Terminal) -> tuple[re.Pattern[str], dict[str, str]]:
        """The expected lines as an expression, and the groups of UUIDs that are seen for the first time."""
        names: dict[str, str] = {}
        continues_open = step.typed is None and terminal.last is not None and terminal.last.open_ended
        out = r"(?:.*\n)*?" if continues_open else ""
        for line in step.expected:
            if line == "…":
                out += r"(?:.*\n)*?"
                continue
            at = 0
            for found in re.finditer(f"{UUID.pattern}|{PORT.pattern}|…", line):
                out += re.escape(line[at : found.start()]) + self.variable(found[0], names)
                at = found.end()
            out += re.escape(line[at:]) + r"[ \t]*\n"
        return re.compile(out), names

    def variable(self, text: str, names: dict[str, str]) -> str:
        if text == "…":
            return ".*"
        if PORT.fullmatch(text):
            return r":\d+"
        if text in self.known:
            return re.escape(self.known[text])
        if text in names:
            return f"(?P={names[text]})"
        names[text] = f"uuid{len(names)}"
        return f"(?P<{names[text]}>{UUID.pattern})"

    def finish(self, terminal: Terminal) -> None:
        """Waits for the terminal's command to end as it should."""
        last = terminal.last
        if last is None:
            return
        if not terminal.wait(lambda: terminal.status is not None, self.seconds):
            raise Failure(f"line {last.line}: `{last.typed}` still runs after {self.seconds} s")
        if last.open_ended:
            return
        if terminal.output.strip():
            raise Failure(f"line {last.line}: more output than expected:\n{indent(terminal.output.splitlines())}")
        if terminal.status != 0 and last.typed != INTERRUPT:
            raise Failure(f"line {last.line}: `{last.typed}` ended with status {terminal.status}")

    def end(self) -> None:
        """Checks what the last command of each terminal did; what is open-ended may still run."""
        for terminal in self.terminals.values():
            if not (terminal.status is None and terminal.last is not None and terminal.last.open_ended):
                self.finish(terminal)

    def close(self) -> None:
        for terminal in self.terminals.values():
            terminal.close()


def indent(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def walk(tour: Tour, page: pathlib.Path, skipped: set[tuple[str, str]]) -> tuple[int, int]:
    """Runs every step of a page and says so; how many passed, and how many failed."""
    passed = 0
    try:
        for step in parse(page.read_text(encoding="utf-8"), skipped):
            print(f"{page.name}:{step.line} {step}", flush=True)
            tour.run(step)
            passed += 1
        tour.end()
    except Failure as failure:
        print(f"FAILED: {failure}")
        for number, terminal in tour.terminals.items():
            print(f"  what terminal {number} had not been asked about:\n{indent(terminal.output.splitlines()[-40:])}")
        return passed, 1
    if passed == 0:
        print(f"{page.name} has no step")
        return 0, 1
    return passed, 0


def reader_environment() -> dict[str, str]:
    """This process's environment, without what a reader has not set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SANJAY_")}


def binary_under_test() -> pathlib.Path:
    """`SANJAY_BIN`, or what `cargo build` leaves."""
    root = pathlib.Path(__file__).resolve().parents[2]
    binary = pathlib.Path(os.environ.get("SANJAY_BIN", root / "target/debug/sanjay")).resolve()
    if not os.access(binary, os.X_OK):
        raise SystemExit(f"there is no binary at {binary}; build it with `cargo build -p sanjay`, or set SANJAY_BIN")
    return binary
