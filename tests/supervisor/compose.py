"""Reads compose.yaml into what a supervisor needs. A key that would be silently missing is an error."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Keys of a service that processes cannot honour, each with the reason.
IGNORED = {
    "build": "the binary is built by cargo",
    "read_only": "processes share the machine's file system",
    "cap_drop": "processes run as whoever started them",
    "security_opt": "as above",
    "user": "as above",
    "mem_limit": "it needs control groups",
    "logging": "logs are files of the stack's directory",
    "ports": "every service is reachable at its own address",
}
SERVICE_KEYS = {
    "image", "command", "environment", "volumes", "tmpfs", "secrets", "depends_on", "healthcheck", "restart",
    "stop_signal", "stop_grace_period", "profiles", "networks", "ulimits",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period", "start_interval", "disable"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?-)((?:[^{}]|\{[^{}]*\})*))?\})")


class ComposeError(Exception):
    """compose.yaml says something that this cannot do. The text names where and what."""


@dataclass
class Health:
    """How to find out whether a service works; times in seconds."""

    test: list[str]
    interval: float
    timeout: float
    retries: int
    start_period: float
    start_interval: float


@dataclass
class Service:
    """One service, with every variable filled in and nothing rendered yet."""

    name: str
    image: str
    command: list[str]
    environment: dict[str, str]
    # (source on this machine or None for an empty place, path that the service sees)
    mounts: list[tuple[Path | None, str]]
    secrets: dict[str, Path]
    depends_on: dict[str, str]
    health: Health | None
    restart: str
    stop_signal: str
    stop_grace: float
    profiles: set[str]
    # Last number of its address, or None when nobody connects to it.
    host: int | None
    nofile: int | None
    extra: dict[str, Any] = field(default_factory=dict)


def load(path: Path, profiles: set[str], environment: dict[str, str] | None = None) -> dict[str, Service]:
    """The services without a profile and those of `profiles`, by name, in the order of the file."""
    document = _fill(yaml.safe_load(path.read_text()), os.environ if environment is None else environment)
    known = {"name", "services", "secrets", "networks", "volumes"}
    for key in document:
        if key not in known and not key.startswith("x-"):
            raise ComposeError(f"{path}: the key {key!r} is not known to the process stack")
    secrets = {name: (path.parent / entry["file"]).resolve() for name, entry in document.get("secrets", {}).items()}
    services = {
        name: _service(name, entry, path.parent, secrets) for name, entry in document["services"].items()
    }
    every = {profile for service in services.values() for profile in service.profiles}
    if unknown := profiles - every:
        raise ComposeError(f"there is no profile {sorted(unknown)[0]!r}; there are {', '.join(sorted(every))}")
    chosen = {n: s for n, s in services.items() if not s.profiles or s.profiles & profiles}
    for service in chosen.values():
        for other in service.depends_on:
            if other not in chosen:
                raise ComposeError(f"services.{service.name} depends on {other!r}, which is not started")
    return chosen


def _fill(node: Any, environment: Any) -> Any:
    """Replaces variables in every text."""
    if isinstance(node, dict):
        return {key: _fill(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, environment) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        dollar, name, operator, default = match.groups()
        if dollar:
            return "$"
        given = environment.get(name)
        if operator is None:
            if given is None:
                raise ComposeError(f"the variable {name} is not set and has no default")
            return given
        return default if given is None or (operator == ":-" and not given) else given

    return VARIABLE.sub(value, node)


def _service(name: str, entry: dict[str, Any], base: Path, secrets: dict[str, Path]) -> Service:
    for key in entry:
        if key not in SERVICE_KEYS and key not in IGNORED:
            raise ComposeError(
                f"services.{name}.{key} is not known to the process stack: honour it in tests/supervisor, or name the "
                "reason why not in IGNORED of compose.py"
            )
    command = entry.get("command", [])
    if not isinstance(command, list):
        raise ComposeError(f"services.{name}.command has to be a list, so that no shell is needed")
    depends_on = {other: how["condition"] for other, how in entry.get("depends_on", {}).items()}
    for other, condition in depends_on.items():
        if condition not in CONDITIONS:
            raise ComposeError(f"services.{name}.depends_on.{other}.condition {condition!r} is not known")
    wanted = {}
    for secret in entry.get("secrets", []):
        if secret not in secrets:
            raise ComposeError(f"services.{name} has the secret {secret!r}, which is not among the file's secrets")
        wanted[secret] = secrets[secret]
    networks = entry.get("networks", {})
    address = networks.get("back", {}).get("ipv4_address") if isinstance(networks, dict) else None
    nofile = entry.get("ulimits", {}).get("nofile", {}).get("soft")
    return Service(
        name=name,
        image=entry["image"],
        command=[str(part) for part in command],
        environment={key: str(value) for key, value in entry.get("environment", {}).items()},
        mounts=_mounts(entry, base),
        secrets=wanted,
        depends_on=depends_on,
        health=_health(name, entry.get("healthcheck")),
        restart=entry.get("restart", "no"),
        stop_signal=entry.get("stop_signal", "SIGTERM"),
        stop_grace=seconds(entry.get("stop_grace_period", "10s")),
        profiles=set(entry.get("profiles", [])),
        host=int(address.rsplit(".", 1)[1]) if address else None,
        nofile=nofile,
    )


def _mounts(entry: dict[str, Any], base: Path) -> list[tuple[Path | None, str]]:
    mounts: list[tuple[Path | None, str]] = []
    for volume in entry.get("volumes", []):
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            mounts.append(((base / source).resolve(), target))
        else:
            mounts.append((None, target))
    mounts.extend((None, place.split(":")[0]) for place in entry.get("tmpfs", []))
    return mounts


def _health(name: str, entry: dict[str, Any] | None) -> Health | None:
    if entry is None or entry.get("disable"):
        return None
    if unknown := set(entry) - HEALTH_KEYS:
        raise ComposeError(f"services.{name}.healthcheck.{sorted(unknown)[0]} is not known")
    kind, *test = entry["test"]
    if kind != "CMD":
        raise ComposeError(f"services.{name}.healthcheck.test begins with {kind!r}; only CMD runs without a shell")
    return Health(
        test=test,
        interval=seconds(entry.get("interval", "30s")),
        timeout=seconds(entry.get("timeout", "30s")),
        retries=int(entry.get("retries", 3)),
        start_period=seconds(entry.get("start_period", "0s")),
        start_interval=seconds(entry.get("start_interval", "5s")),
    )


def seconds(text: str) -> float:
    """A duration such as `1m30s`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ComposeError(f"{text!r} is not a duration; write it like 500ms, 10s or 1m30s")
    return sum(float(number) * UNITS[unit] for number, unit in parts)
