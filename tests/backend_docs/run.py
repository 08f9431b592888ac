"""Runs the programs of docs/backend.md and docs/backend-node.md as they stand there, and the terminals around them;
tests/readme/tour.py has the conventions. Then some of the programs again, where things go wrong: answers that get lost,
streams that end early, a certificate that is checked.

What differs from a reader's machine: `sanjay standalone` gets free ports, which stand in for 8080 and 8082 in later
commands; `proto` is a copy; the packages are those of tests/requirements.txt and of package-lock.json here, whose
versions the pages must name.

The last line is "N passed, N failed"; the exit status is 1 when something failed.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests/readme"), str(ROOT / "tests/python")]

from balancer import Balancer  # noqa: E402
from lossy import Lossy  # noqa: E402
from sanjay_api import Api  # noqa: E402
from tour import FREE_PORTS, Failure, Tour, binary_under_test, reader_environment, walk  # noqa: E402

# The second goes on with the server and the terminals of the first.
PAGES = [ROOT / "docs/backend.md", ROOT / "docs/backend-node.md"]
KEY = "my-api-key"
PROGRAMS = [("python3", "py"), ("node", "js")]
PYTHON_PACKAGES = ["grpcio", "grpcio-status", "grpcio-tools", "grpcio-reflection", "websockets"]
SECONDS = 60


def skipped() -> set[tuple[str, str]]:
    """What the pages have installed, with the versions that are tested here."""
    wanted = (ROOT / "tests/requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in wanted if not line.startswith("#"))
    python = " ".join(f"{name}=={pinned[name]}" for name in PYTHON_PACKAGES)
    dependencies = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    node = " ".join(f"{name}@{version}" for name, version in dependencies.items())
    return {
        ("sh", f"python3 -m venv venv\n. venv/bin/activate\npip install {python}\n"),
        ("sh", f"npm install {node}\n"),
    }


class Reader(Tour):
    """A reader with a server on free ports."""

    def address(self, name: str) -> str:
        """`HOST:PORT` of the server that terminal 1 has started."""
        ready = json.loads(pathlib.Path(self.directory, ".sanjay/ready.json").read_text(encoding="utf-8"))
        return re.search(r"127\.0\.0\.1:\d+", ready[name])[0]

    def command(self, typed: str) -> str:
        typed = super().command(typed)
        if typed == "sanjay standalone":
            return f"{typed} {FREE_PORTS}"
        for port, name in ((8080, "url"), (8082, "server")):
            if f"127.0.0.1:{port}" in typed:
                typed = typed.replace(f"127.0.0.1:{port}", self.address(name))
        return typed

    def program(self, server: str, *arguments: str, **environment: str) -> list[str]:
        """Runs one of the pages' programs against a server; the lines that it printed."""
        environment = self.environment | {"SANJAY_SERVER": server, "SANJAY_API_KEY": KEY} | environment
        done = subprocess.run(
            arguments, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode != 0:
            raise Failure(f"{' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout.splitlines()


def prepare(directory: str, binary: pathlib.Path) -> dict[str, str]:
    """Puts what a reader has installed into the directory; the reader's environment."""
    programs = pathlib.Path(directory, "bin")
    programs.mkdir()
    (programs / "sanjay").symlink_to(binary)
    pathlib.Path(directory, "node_modules").symlink_to(HERE / "node_modules")
    shutil.copytree(ROOT / "proto", pathlib.Path(directory, "proto"))
    environment = reader_environment()
    environment["PATH"] = f"{programs}:{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failure(f"{what}: there is\n    {found}\nand not\n    {wanted}")


def without_ids(lines: list[str]) -> list[str]:
    """What `send` prints, without the messages' ids."""
    return [re.sub(r": [0-9a-f-]{36},", ":", line) for line in lines]


def lost_answers(reader: Reader, lossy: Lossy, runner: str, suffix: str) -> None:
    """Both users are asked for until they are accepted, no sooner than the server said, and get one message each."""
    users = [f"lost-1-{suffix}", f"lost-2-{suffix}"]
    lossy.forget()
    lines = reader.program(lossy.url, runner, f"send.{suffix}", "lost", "hi", *users)
    expect("what it printed", without_ids(lines), [f"{user}: seq 1, accepted before" for user in users])
    expect("users of each call", [call.users for call in lossy.calls], [users, users, users[1:]])
    first, second, third = (call.at for call in lossy.calls)
    pauses = (("RetryInfo", second - first, lossy.RETRY_INFO), ("retry_after_ms", third - second, lossy.RETRY_AFTER))
    for what, pause, least in pauses:
        if pause < least:
            raise Failure(f"{what} says {least} s, and the next call came after {pause:.3f} s")
    answer = Api(server=f"http://{reader.address('server')}", key=KEY).call("Send", users=users, payload={"text": "next"})
    expect("the next seq of each", [result.accepted.seq for result in answer.results], [2, 2])


def cut_streams(reader: Reader, lossy: Lossy, runner: str, suffix: str) -> None:
    """Streams that end without an error and with one are followed by another; nothing is lost, doubled or moved."""
    user = f"stream-{suffix}"
    lossy.forget()
    lines = reader.program(lossy.url, runner, f"stream.{suffix}", user, "1000", "cut")
    expect("what it printed", lines, [f"{user}: 1000 accepted, seq 1 to 1000"])
    expect("streams", lossy.streams, 3)


def through_tls(reader: Reader, balancer: Balancer, runner: str, suffix: str) -> None:
    """A certificate that no authority of the system has signed is believed when `SANJAY_CA` names it."""
    command = [runner, f"send.{suffix}", "tls", "hi", f"tls-{suffix}"]
    lines = reader.program(balancer.url, *command, SANJAY_CA=str(balancer.certificate))
    expect("what it printed", without_ids(lines), [f"tls-{suffix}: seq 1"])


def cases(reader: Reader, directory: str) -> tuple[int, int]:
    """The programs where things go wrong; how many passed, and how many failed."""
    server = reader.address("server")
    passed = failed = 0
    with Lossy(server, KEY) as lossy, Balancer(directory, server) as balancer:
        for case, front in ((lost_answers, lossy), (cut_streams, lossy), (through_tls, balancer)):
            for runner, suffix in PROGRAMS:
                print(f"{case.__name__} {runner}", flush=True)
                try:
                    case(reader, front, runner, suffix)
                    passed += 1
                except (Failure, subprocess.TimeoutExpired) as failure:
                    print(f"FAILED: {failure}")
                    failed += 1
    return passed, failed


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--keep", action="store_true", help="keep the directory that the programs ran in, and print it")
    options.add_argument("--seconds", type=float, default=30, help="how long a step may take (default: 30)")
    arguments = options.parse_args()
    binary = binary_under_test()
    if not (HERE / "node_modules").is_dir():
        raise SystemExit(f"there is no {HERE}/node_modules; run `npm ci` there, or `tests/run backend`")

    directory = tempfile.mkdtemp(prefix="sanjay-backend-")
    reader = Reader(directory, prepare(directory, binary), arguments.seconds)
    passed = failed = 0
    try:
        for page in PAGES:
            if failed == 0:
                good, failed = walk(reader, page, skipped())
                passed += good
        if failed == 0:
            good, failed = cases(reader, directory)
            passed += good
    finally:
        reader.close()
        if arguments.keep:
            print(f"kept {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
