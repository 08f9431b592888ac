"""Cases about the image: its Dockerfile's style and rules, and that its build commands work.

There need be no container engine: the RUN instructions of the builder are executed as they stand, in a directory for
each stage, on files that `.dockerignore` lets through. What that leaves out: the base images themselves, the
instructions of the last stage, and BuildKit. So that it can be afforded, nothing is optimised: the build argument
PROFILE chooses a profile with plain dependencies, and variables of cargo do the rest. What cargo makes is kept in
`tests/.out/image`, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import context
from dockerfile import Dockerfile, Stage, argument, expand, read
from report import ROOT, Case, Failure, command, require, require_none

DOCKERFILE = ROOT / "docker/Dockerfile"
KEPT = ROOT / "tests/.out/image"
BUILD_ARGUMENTS = {"PROFILE": "gate"}
PLAIN = {
    f"CARGO_PROFILE_{profile}_{key}": value
    for profile in ("GATE", "RELEASE")
    for key, value in (("OPT_LEVEL", "0"), ("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "none"))
}
# Cold, on one slow core.
SECONDS = 3600
# Of the packages libc6 and libgcc-s1, which every Debian has.
LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
PINNED = re.compile(r":[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$")
# What must never get into an image, and what must.
NOT_IN_CONTEXT = (
    "compose/secrets/token_secret",
    "compose/compose.yaml",
    ".git/config",
    ".sanjay/secrets.json",
    "target/debug/sanjay",
    "services/target/x",
    "tests/.venv/bin/python",
    "tests/.out/it.log",
    "tests/operations/__pycache__/run.pyc",
)
IN_CONTEXT = (
    "Cargo.toml",
    "Cargo.lock",
    "proto/sanjay/client/v1/payload.proto",
    "services/sanjay/src/main.rs",
    "tests/it/main.rs",
)


def hadolint() -> None:
    command(Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", DOCKERFILE)


def follows_the_rules() -> None:
    file = read(DOCKERFILE)
    last = file.stages[-1]
    problems = [f"{stage.base} is not pinned by a version" for stage in external(file) if not PINNED.search(stage.base)]
    suites = {re.search(r"bookworm|trixie|forky", stage.base) for stage in external(file)}
    if len({suite and suite[0] for suite in suites}) != 1:
        problems.append("the images of the toolchain and of the runtime are of different Debian releases")
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.one("USER")):
        problems.append("USER must be numbers other than 0, which a runtime can tell from root")
    if last.one("ENTRYPOINT") != '["sanjay"]':
        problems.append('ENTRYPOINT must be ["sanjay"]')
    if last.one("STOPSIGNAL") != "SIGTERM":
        problems.append("STOPSIGNAL must be SIGTERM, which drains")
    if '"sanjay", "health"' not in last.one("HEALTHCHECK"):
        problems.append("HEALTHCHECK must run `sanjay health`")
    for name in ("title", "description", "licenses", "version", "revision"):
        if f"org.opencontainers.image.{name}=" not in last.one("LABEL"):
            problems.append(f"the label org.opencontainers.image.{name} is missing")
    version = dict(argument(each.text) for each in last.all("ARG"))["VERSION"]
    cargo = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    if f'version = "{version}"' not in cargo:
        problems.append(f"ARG VERSION={version} is not the version of Cargo.toml")
    toolchain = re.search(r'^rust-version = "([\d.]+)"', cargo, re.MULTILINE)
    if toolchain and f"rust:{toolchain[1]}." not in file.stages[0].base:
        problems.append(
            f"the toolchain's image is {file.stages[0].base}, and Cargo.toml says rust-version {toolchain[1]}"
        )
    for stage in file.stages[:-1]:
        problems += [
            f"line {run.line}: cargo without --locked"
            for run in stage.all("RUN")
            if run.text.startswith("cargo") and "--locked" not in run.text and "chef prepare" not in run.text
        ]
    require_none(problems)


def external(file: Dockerfile) -> list[Stage]:
    """The stages that begin with an image of somebody else."""
    names = {stage.name for stage in file.stages}
    return [stage for stage in file.stages if stage.base not in names]


def context_holds_no_secret() -> None:
    patterns = context.rules((ROOT / ".dockerignore").read_text(encoding="utf-8"))
    require_none(
        [f".dockerignore lets {path} through" for path in NOT_IN_CONTEXT if context.included(path, patterns)]
        + [f".dockerignore keeps {path} out" for path in IN_CONTEXT if not context.included(path, patterns)]
    )


@dataclass
class Built:
    """A stage that was run: its files, and what later stages take over from it."""

    files: Path
    workdir: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    def path(self, inside: str) -> Path:
        """Where a path of the stage is on this machine; relative ones count from the working directory."""
        return self.files / os.path.normpath(os.path.join(self.workdir, inside)).lstrip("/")


class Build:
    """Runs stages in directories below one of its own."""

    def __init__(self, file: Dockerfile, directory: Path) -> None:
        self.file = file
        self.directory = directory
        self.built: dict[str, Built] = {}
        self.context = directory / "context"
        require(context.copy(ROOT, self.context) > 100, "the build context has next to no files")

    def stage(self, name: str) -> Built:
        """The stage with this name, run once, after the ones that it needs."""
        if name not in self.built:
            self.built[name] = self.run(self.file.stage(name))
        return self.built[name]

    def run(self, stage: Stage) -> Built:
        here = Built(self.directory / f"stage-{stage.name}")
        if stage.base in {other.name for other in self.file.stages}:
            base = self.stage(stage.base)
            shutil.copytree(base.files, here.files)
            here.workdir, here.variables = base.workdir, dict(base.variables)
        here.files.mkdir(exist_ok=True)
        for step in stage.instructions:
            if step.name == "ARG":
                name, default = argument(step.text)
                here.variables[name] = BUILD_ARGUMENTS.get(name, self.file.arguments.get(name, default))
            elif step.name == "WORKDIR":
                here.workdir = os.path.join(here.workdir, step.text)
                here.path(".").mkdir(parents=True, exist_ok=True)
            elif step.name == "COPY":
                self.copy(here, step.text.split())
            elif step.name == "RUN":
                execute(step.text, here)
            else:
                raise Failure(
                    f"line {step.line}: a stage that is run here cannot have {step.name}; teach it to image.py"
                )
        return here

    def copy(self, here: Built, words: list[str]) -> None:
        source, target = self.context, words[-1]
        if words[0].startswith("--from="):
            stage = self.stage(words.pop(0).removeprefix("--from="))
            source = stage.files
        require(len(words) == 2 and not words[0].startswith("--"), f"COPY {' '.join(words)} is not understood")
        origin = source / words[0].lstrip("/")
        if origin.is_dir():
            shutil.copytree(origin, here.path(target), dirs_exist_ok=True)
        else:
            require(origin.is_file(), f"COPY: there is no {words[0]}")
            shutil.copy2(origin, here.path(target))


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The build's variables, and where this machine keeps what an image's layers would."""
    ours = {"CARGO_TARGET_DIR": str(KEPT / "target"), "CARGO_INSTALL_ROOT": str(KEPT / "tools"), **PLAIN}
    path = f"{KEPT / 'tools/bin'}:{os.environ['PATH']}"
    return {**os.environ, **ours, **variables, "PATH": path}


def execute(text: str, here: Built) -> None:
    require(not re.search(r"(^|[\s=])/", text), f"`{text}` names an absolute path, which would be one of this machine")
    print(f"    RUN {text}", flush=True)
    before = os.times()
    said = command("sh", "-c", text, directory=here.path("."), environment=environment(here.variables), seconds=SECONDS)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"        took {after.elapsed - before.elapsed:.0f} s, {cpu:.0f} s of CPU", flush=True)
    if " --path " in text:
        compiled = set(re.findall(r"^ *Compiling (\S+) v", said, re.MULTILINE))
        late = sorted(name for name in compiled if not name.startswith("sanjay"))
        require(not late, f"the layer of dependencies lacks {', '.join(late)}: `{text}` compiled them again")


def builder_commands_work() -> None:
    file = read(DOCKERFILE)
    directory = Path(tempfile.mkdtemp(prefix="sanjay-image-"))
    try:
        build = Build(file, directory)
        from_builder = [
            each.text.split() for each in file.stages[-1].all("COPY") if each.text.startswith("--from=builder ")
        ]
        require(len(from_builder) == 1, "the last stage must take exactly one file from the stage builder")
        binary = build.stage("builder").files / expand(from_builder[0][1], {}).lstrip("/")
        require(binary.is_file(), f"the stage builder left no {from_builder[0][1]}")
        runs(binary)
        needs_only_what_the_runtime_has(binary)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        forget_our_crates()


def forget_our_crates() -> None:
    """Removes what cargo kept of crates in the directory that is gone: the next run has another one."""
    for kept in (KEPT / "target").glob("*/*/*sanjay*"):
        if kept.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
        else:
            kept.unlink(missing_ok=True)


def runs(binary: Path) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    said = command(binary, "--version").strip()
    require(version is not None and said.startswith(f"sanjay {version[1]}"), f"--version says {said!r}")
    require(
        "--admin" in command(binary, "health", "--help"), "`sanjay health` has no flag --admin, which HEALTHCHECK uses"
    )
    done = subprocess.run(
        [binary, "health", "--admin", "http://127.0.0.1:1"], capture_output=True, check=False, timeout=30
    )
    require(
        done.returncode == 1, f"`sanjay health` ends with status {done.returncode} where nothing listens, not with 1"
    )


def needs_only_what_the_runtime_has(binary: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", command("readelf", "--dynamic", "--wide", binary))
    require(bool(needed), "readelf shows no library that the binary needs; is it linked statically?")
    require_none(f"the binary needs {name}, which the runtime image lacks" for name in sorted(set(needed) - LIBRARIES))


CASES = [
    Case("image: hadolint has nothing to say", hadolint),
    Case("image: the Dockerfile follows the rules", follows_the_rules),
    Case("image: the build context has the sources and no secret", context_holds_no_secret),
    Case("image: the builder's commands work, and the binary runs", builder_commands_work),
]
