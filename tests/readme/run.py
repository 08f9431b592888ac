"""Runs the README's tour as it is printed, and compares what comes out; tour.py has the conventions.

Two things differ from a reader's machine: `cargo run --release -- X` runs the binary under test (`SANJAY_BIN`), which
`target/release/sanjay` names too, and a server gets free ports instead of 8080 to 8083.

The last line is "N passed, N failed"; the exit status is 1 when a step failed.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

from tour import FREE_PORTS, Tour, binary_under_test, reader_environment, walk

ROOT = pathlib.Path(__file__).resolve().parents[2]
CARGO_RUN = "cargo run --release -- "
# This file is run by the second one; the first builds the release binary.
SKIPPED = {("sh", "cargo run --release -- standalone\ntests/run\n")}


class Readme(Tour):
    """A reader who has built the release binary."""

    def command(self, typed: str) -> str:
        typed = super().command(typed)
        if typed.startswith(CARGO_RUN):
            return f"target/release/sanjay {typed.removeprefix(CARGO_RUN)} {FREE_PORTS}"
        return typed


def prepare(directory: str, binary: pathlib.Path) -> None:
    release = pathlib.Path(directory, "target", "release")
    release.mkdir(parents=True)
    (release / "sanjay").symlink_to(binary)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    options.add_argument("--keep", action="store_true", help="keep the directory that the tour ran in, and print it")
    options.add_argument("--seconds", type=float, default=30, help="how long a step may take (default: 30)")
    arguments = options.parse_args()
    binary = binary_under_test()

    directory = tempfile.mkdtemp(prefix="sanjay-readme-")
    prepare(directory, binary)
    tour = Readme(directory, reader_environment(), arguments.seconds)
    try:
        passed, failed = walk(tour, arguments.readme, SKIPPED)
    finally:
        tour.close()
        if arguments.keep:
            print(f"kept {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
