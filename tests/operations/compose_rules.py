"""Cases about compose/compose.yaml: the public schema, and rules of our own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from report import ROOT, Case, command, require, require_none

COMPOSE = ROOT / "compose/compose.yaml"
# A service that lacks one of these says here why. A reason without need fails too.
WITHOUT_HEALTHCHECK = {
    "mongo-init": "it ends when it has done its work",
    "jaeger": "whether its image has a program to ask with was not verified",
    "demo-chat": "it serves nobody; its exit status says whether it is well",
    "demo-notifications": "it serves nobody; its exit status says whether it is well",
}
WITHOUT_RESTART: dict[str, str] = {}
# At least two numbers, such as 8.0 or v3.5.0: one alone moves with every release.
VERSION = re.compile(r":[\w.-]*\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$")
ROLES = ("edge", "router", "delivery")


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def schema() -> None:
    tool = Path(sys.executable).parent / "check-jsonschema"
    command(tool, "--builtin-schema", "vendor.compose-spec", COMPOSE)


def images_are_pinned() -> None:
    require_none(
        f"{name}: {service.get('image')} is not pinned by a version of at least two numbers"
        for name, service in services().items()
        if "build" not in service and not VERSION.search(str(service.get("image")))
    )


def every_service_is_looked_after() -> None:
    with_health, with_restart = set(), set()
    for name, service in services().items():
        check = service.get("healthcheck", {})
        if check.get("test") and not check.get("disable"):
            with_health.add(name)
        if service.get("restart", "no") != "no":
            with_restart.add(name)
    problems = [
        *lacks("healthcheck", with_health, WITHOUT_HEALTHCHECK),
        *lacks("restart", with_restart, WITHOUT_RESTART),
    ]
    require_none(problems)


def lacks(what: str, having: set[str], reasons: dict[str, str]) -> Iterator[str]:
    all_of_them = set(services())
    for name in sorted(all_of_them - having - set(reasons)):
        yield f"{name} has no {what}, and compose_rules.py lists no reason"
    for name in sorted(set(reasons) & (having | (set(reasons) - all_of_them))):
        yield f"compose_rules.py has a reason why {name} has no {what}, which it has, or is no service"


def only_the_front_is_published() -> None:
    """nginx is for everybody; whatever else is published is for this machine alone."""
    problems = []
    for name, service in services().items():
        for port in service.get("ports", []):
            if name != "nginx" and not str(port).startswith("127.0.0.1:"):
                problems.append(f"{name} publishes {port} on every address")
    require_none(problems)


def mounted_files_exist() -> None:
    problems = []
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = str(volume).split(":")[0]
            if source.startswith(".") and not (COMPOSE.parent / source).exists():
                problems.append(f"{name} mounts {source}, which does not exist")
    require_none(problems)


def secrets_are_declared() -> None:
    declared = yaml.safe_load(COMPOSE.read_text(encoding="utf-8")).get("secrets", {})
    made = (COMPOSE.parent / "make-secrets.sh").read_text(encoding="utf-8")
    used = {secret for service in services().values() for secret in service.get("secrets", [])}
    mentioned = set()
    for service in services().values():
        mentioned |= set(re.findall(r"/run/secrets/(\w+)", yaml.safe_dump(service)))
    mentioned |= set(
        re.findall(r"/run/secrets/(\w+)", (COMPOSE.parent / "alertmanager/alertmanager.yml").read_text("utf-8"))
    )
    require_none(
        [f"the secret {name} is used and not declared" for name in sorted((used | mentioned) - set(declared))]
        + [f"the secret {name} is declared and no service uses it" for name in sorted(set(declared) - used)]
        + [f"make-secrets.sh does not make {name}" for name in sorted(declared) if not re.search(rf"\b{name}\b", made)]
    )


def every_process_is_scraped() -> None:
    config = yaml.safe_load((COMPOSE.parent / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    scraped = {
        (job["job_name"], target)
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    }
    wanted = {
        (f"sanjay-{service['command'][0]}", f"{name}:8081")
        for name, service in services().items()
        if service.get("command") and service["command"][0] in ROLES
    }
    require(bool(wanted), "compose.yaml has no edge, router or delivery node")
    known = set(services())
    require_none(
        [f"prometheus.yml does not scrape {target} in the job {job}" for job, target in sorted(wanted - scraped)]
        + [
            f"prometheus.yml scrapes {target}, which is no service"
            for _, target in sorted(scraped)
            if target.split(":")[0] not in known
        ]
    )


CASES = [
    Case("compose: the file follows the schema", schema),
    Case("compose: every image of others is pinned by a version", images_are_pinned),
    Case("compose: every service has a healthcheck and a restart policy, or a reason", every_service_is_looked_after),
    Case("compose: only nginx is published to other machines", only_the_front_is_published),
    Case("compose: what is mounted exists", mounted_files_exist),
    Case("compose: secrets are declared, used and made", secrets_are_declared),
    Case("compose: Prometheus scrapes every process", every_process_is_scraped),
]
