"""Which program on this machine stands for which image, and what it needs to be told beyond its command.

Everything that differs between the containers and the processes is here.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .compose import Service

ROOT = Path(__file__).resolve().parents[2]


class MissingProgram(Exception):
    """No program stands for an image. The text says what to install."""


@dataclass
class Program:
    """How a service runs: its command, and texts to replace in its configuration beside names and paths."""

    command: list[str]
    health: list[str] | None
    replace: dict[str, str]
    # Runs once and is not needed here: its work is done by the program that it would prepare.
    done: bool = False


def sanjay_binary() -> Path:
    """The binary under test: SANJAY_BIN, else the newest build of this checkout."""
    if named := os.environ.get("SANJAY_BIN"):
        if not os.access(named, os.X_OK):
            raise MissingProgram(f"SANJAY_BIN is {named!r}, which is no program; give the path of a sanjay binary")
        return Path(named)
    builds = [ROOT / "target" / profile / "sanjay" for profile in ("release", "debug")]
    built = [build for build in builds if build.exists()]
    if not built:
        raise MissingProgram("there is no sanjay binary; build one with `cargo build --release`, or set SANJAY_BIN")
    return max(built, key=lambda build: build.stat().st_mtime)


def program(service: Service, address: str, data: Path) -> Program | None:
    """The program of a service, or None when nothing here stands for its image and others do without."""
    image = service.image.rsplit(":", 1)[0].rsplit("@", 1)[0]
    make = {
        "sanjay": _sanjay,
        "redis": _redis,
        "mongo": _mongo,
        "nginx": _nginx,
        "jaegertracing/jaeger": _collector,
        "prom/prometheus": _prometheus,
        "prom/alertmanager": _alertmanager,
        "prom/blackbox-exporter": _blackbox,
        "grafana/grafana": lambda *_: None,
    }.get(image)
    if make is None:
        raise MissingProgram(f"services.{service.name}: no program is known for the image {service.image}")
    return make(service, address, data)


def _find(what: str, *names: str) -> str:
    places = os.environ.get("PATH", "") + ":" + ":".join([str(Path.home() / ".cargo/bin"), "/usr/sbin", "/usr/bin"])
    for name in names:
        if path := shutil.which(name, path=places):
            return path
    raise MissingProgram(f"none of {', '.join(names)} is installed: {what}")


def _health(service: Service, **programs: str) -> list[str] | None:
    if service.health is None:
        return None
    test = service.health.test
    return [programs.get(test[0].replace("-", "_"), test[0]), *test[1:]]


def _sanjay(service: Service, address: str, data: Path) -> Program:
    binary = str(sanjay_binary())
    return Program([binary, *service.command], _health(service, sanjay=binary), {})


def _redis(service: Service, address: str, data: Path) -> Program:
    server = _find("install redis-server", "redis-server")
    cli = _find("install redis-tools", "redis-cli")
    command = [server, *service.command[1:], "--bind", address, "--port", "6379", "--dir", str(data)]
    return Program(command, _health(service, redis_cli=cli), {})


def _mongo(service: Service, address: str, data: Path) -> Program:
    wire = [sys.executable, "-m", "supervisor.mongo_wire"]
    if service.command[0] == "mongosh":
        if shutil.which("mongod"):
            return Program([*wire, "initiate", f"{address_of(service, 'mongo')}:27017", "rs0"], None, {})
        return Program([], None, {}, done=True)
    health = [*wire, "ping", f"{address}:27017"]
    if mongod := shutil.which("mongod"):
        options = [part for part in service.command[1:] if part != "--bind_ip_all"]
        return Program([mongod, *options, "--bind_ip", address, "--dbpath", str(data)], health, {})
    venv = ROOT / "tests/.venv/bin/secantusd-py"
    server = shutil.which("secantusd-rs") or _find(
        "install MongoDB 8, or `tests/run stack` to have SecantusDB put into tests/.venv",
        "secantusd-rs", "secantusd-py", str(venv),
    )  # fmt: skip
    command = [server, "--host", address, "--port", "27017", "--storage-path", str(data), "--log-level", "WARNING"]
    return Program(command, health, {})


def _nginx(service: Service, address: str, data: Path) -> Program:
    nginx = _find("install nginx", "nginx")
    curl = _find("install curl", "curl")
    return Program([nginx, *service.command[1:]], _health(service, curl=curl), {})


def _collector(service: Service, address: str, data: Path) -> Program:
    command = [sys.executable, "-m", "supervisor.collector", address]
    return Program(command, [sys.executable, "-m", "supervisor.collector", "--check", address], {})


def _prometheus(service: Service, address: str, data: Path) -> Program:
    server = _find("install prometheus", "prometheus")
    command = [server, *service.command, f"--web.listen-address={address}:9090"]
    return Program(command, _health(service, wget=_find("install wget", "wget")), {})


def _alertmanager(service: Service, address: str, data: Path) -> Program:
    server = _find("install prometheus-alertmanager", "prometheus-alertmanager")
    command = [server, *service.command, f"--web.listen-address={address}:9093"]
    return Program(command, _health(service, wget=_find("install wget", "wget")), {})


def _blackbox(service: Service, address: str, data: Path) -> Program:
    server = _find("install prometheus-blackbox-exporter", "prometheus-blackbox-exporter")
    command = [server, *service.command, f"--web.listen-address={address}:9115"]
    return Program(command, _health(service, wget=_find("install wget", "wget")), {})


def address_of(service: Service, name: str) -> str:
    """A name as it stands in a configuration; rendering replaces it by an address."""
    return name


def replica_set() -> str:
    """Name of the replica set that the MongoDB-protocol server of this machine announces."""
    return "rs0" if shutil.which("mongod") else "secantus"
