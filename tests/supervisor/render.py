"""Turns what a container would see into what a process sees: names into addresses, mounted paths into copies."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from .compose import ComposeError, Service
from .programs import Program, program, replica_set

TEXT = {".toml", ".conf", ".yml", ".yaml", ".json", ""}


@dataclass
class Rendered:
    """A service that is ready to be started."""

    service: Service
    address: str
    directory: Path
    command: list[str]
    health: list[str] | None
    environment: dict[str, str]
    done: bool


class Renderer:
    """Knows the addresses of a stack: `block` (such as `127.60.7`) and each service's last number."""

    def __init__(self, services: dict[str, Service], block: str, directory: Path, edits: dict[str, str]):
        self.services, self.block, self.directory = services, block, directory
        # Further texts to replace in mounted files, for a test that cannot wait for production's times.
        self.edits = edits
        names = "|".join(sorted(map(re.escape, services), key=len, reverse=True))
        self.names = re.compile(rf"(?<![\w.-])({names})(?=:\d)")

    def address(self, service: Service) -> str:
        return f"{self.block}.{service.host}" if service.host is not None else "127.0.0.1"

    def render(self, service: Service) -> Rendered | None:
        """Copies what the service mounts, and makes its command; None when nothing here can run it."""
        home = self.directory / "services" / service.name
        data = home / "data"
        data.mkdir(parents=True, exist_ok=True)
        made: Program | None = program(service, self.address(service), data)
        if made is None:
            return None
        places = {target: home / "root" / target.lstrip("/") for _, target in service.mounts}
        places["/run/secrets"] = home / "root/run/secrets"
        replace = lambda text: self._text(text, service, places, made)  # noqa: E731
        # The outer mount first: a place of its own may lie inside another mount.
        for source, target in sorted(service.mounts, key=lambda mount: mount[1]):
            self._copy(source, places[target], replace)
        self._secrets(service, places["/run/secrets"])
        environment = {key: replace(value) for key, value in service.environment.items()}
        return Rendered(
            service=service,
            address=self.address(service),
            directory=home,
            command=[replace(part) for part in made.command],
            health=[replace(part) for part in made.health] if made.health else None,
            environment=environment,
            done=made.done,
        )

    def _text(self, text: str, service: Service, places: dict[str, Path], made: Program) -> str:
        address = self.address(service)
        for old, new in {**made.replace, "replicaSet=rs0": f"replicaSet={replica_set()}"}.items():
            text = text.replace(old, new)
        text = self.names.sub(lambda match: self.address(self.services[match[1]]), text)
        text = re.sub(r"(?<![\w.])(?:0\.0\.0\.0|127\.0\.0\.1|localhost|\*)(?=:\d)", address, text)
        if text == "127.0.0.1":
            return address
        for target in sorted(places, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.-]){re.escape(target)}(?![\w-])", str(places[target]), text)
        return text

    def _copy(self, source: Path | None, place: Path, replace) -> None:
        if source is None:
            place.mkdir(parents=True, exist_ok=True)
        elif not source.exists():
            raise ComposeError(f"compose.yaml mounts {source}, which does not exist")
        elif source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            for entry in source.iterdir():
                self._copy(entry, place / entry.name, replace)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix not in TEXT or source.stat().st_size > 1 << 20:
                shutil.copyfile(source, place)
                return
            text = source.read_text()
            for old, new in self.edits.items():
                text = text.replace(old, new)
            place.write_text(replace(text))

    def _secrets(self, service: Service, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, source in service.secrets.items():
            if not source.exists():
                raise ComposeError(f"the secret {source} is missing; make it with compose/make-secrets.sh")
            target = place / name
            target.unlink(missing_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o600)
