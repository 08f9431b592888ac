"""What a stack is for, and how it ends: nothing of it stays, even after its supervisor was killed."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ..compose import ComposeError, load
from ..processes import start_time
from ..programs import MissingProgram, sanjay_binary
from ..render import Renderer
from ..stack import COMPOSE, Stack, listening
from .place import Place, eventually


def message_through_nginx(place: Place) -> None:
    """A back end sends through nginx's gRPC port; clients on all edges get it through nginx's WebSocket port."""
    api = place.api()
    clients = {}
    # The key that nginx hashes is random: that none of so many comes to one of three edges is one case in millions.
    for _ in range(40):
        user = f"user-{secrets.token_hex(4)}"
        clients[user] = place.client(user)
        if all(place.connections().values()) and len(clients) >= 3:
            break
    assert all(place.connections().values()), f"nginx left an edge out: {place.connections()}"
    answer = api.call("Send", users=list(clients), payload={"text": "hello"})
    accepted = {result.user: result.accepted.message_id for result in answer.results}
    for user, client in clients.items():
        message = client.event("inbox")
        assert message["message_id"] == accepted[user] and message["payload"] == {"text": "hello"}, message
        assert "ok" in client.call(ack={"ranges": [[message["seq"], message["seq"]]]})
        state = api.call("GetDelivery", user=user, message_id=accepted[user])
        assert state.settled_us > 0, state
        client.close()


def down_leaves_nothing() -> None:
    """After `down` no process and no listening socket is left; two stacks run beside each other."""
    first, second = Stack(f"down-{os.getpid()}"), Stack(f"beside-{os.getpid()}")
    try:
        status, beside = first.up(set()), second.up(set())
        assert status["block"] != beside["block"], status["block"]
        pids = _processes(first)
        assert len(pids) > len(status["services"]), "the services and the supervisor"
        assert listening(status["block"]), "its services listen"
        first.down()
        _nothing_is_left(first, pids, status["block"])
        assert second.status()["up"], "the other stack goes on"
    finally:
        first.down()
        second.down()


def down_after_the_supervisor_was_killed() -> None:
    """The supervisor is SIGKILLed: its services go on, and `down` finds them all the same."""
    stack = Stack(f"killed-{os.getpid()}")
    try:
        status = stack.up(set())
        pids = _processes(stack)
        supervisor = status["supervisor"]["pid"]
        os.kill(supervisor, signal.SIGKILL)
        eventually("the supervisor is gone", 5, lambda: start_time(supervisor) is None)
        alive = [one["name"] for one in status["services"] if one["pid"] and start_time(one["pid"])]
        assert "edge-1" in alive and "nginx" in alive, alive
        stack.down()
        _nothing_is_left(stack, pids, status["block"])
        _killed_while_it_starts(stack)
    finally:
        stack.down()


def _killed_while_it_starts(stack: Stack) -> None:
    command = [sys.executable, "-m", "supervisor", "--name", stack.name, "up"]
    up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Redis is the first of the services.
    services = eventually("something runs", 20, lambda: up.poll() is None and _children(stack))
    os.kill(services["supervisor"], signal.SIGKILL)
    up.kill()
    up.wait()
    pids = _processes(stack)
    assert pids, "what was started goes on"
    stack.down()
    _nothing_is_left(stack, pids, services["block"])


def _children(stack: Stack) -> dict[str, Any] | None:
    """The supervisor of a stack that is coming up, as soon as it has started something."""
    try:
        state = json.loads((stack.directory / "stack.json").read_text())
    except OSError:
        return None
    started = any(one["pid"] for one in state["services"])
    return {"supervisor": state["supervisor"]["pid"], "block": state["block"]} if started else None


def what_cannot_be_honoured_is_refused() -> None:
    """Keys that the processes would silently lack, variables and secrets that are missing: named, with what to do."""
    document = yaml.safe_load(COMPOSE.read_text())
    for change, text in (
        (lambda d: d["services"]["edge-1"].update(privileged=True), "services.edge-1.privileged is not known"),
        (lambda d: d["services"]["redis"]["healthcheck"].update(start="1s"), "services.redis.healthcheck.start"),
        (lambda d: d["services"]["redis"].update(command="redis-server"), "has to be a list"),
        (lambda d: d["services"]["redis"].update(image="redis:${NO_SUCH_VARIABLE}"), "NO_SUCH_VARIABLE is not set"),
        (lambda d: d["services"]["edge-1"].update(secrets=["nothing"]), "has the secret 'nothing'"),
        (lambda d: d["services"]["edge-1"].update(volumes=["./nothing:/x"]), "nothing, which does not exist"),
        (lambda d: d["secrets"]["cluster_key"].update(file="./nothing"), "make-secrets.sh"),
        (lambda d: d["services"]["redis"].update(image="valkey:9"), "no program is known for the image valkey:9"),
        (
            lambda d: d["services"]["edge-1"]["depends_on"].update(jaeger={"condition": "service_started"}),
            "not started",
        ),
        (lambda d: d.update(configs={}), "the key 'configs' is not known"),
    ):
        changed = copy.deepcopy(document)
        change(changed)
        _refused(changed, text)
    name = f"none-{os.getpid()}"
    command = [sys.executable, "-m", "supervisor", "--name", name]
    for arguments, text in ((["status"], "is not up"), (["up", "--profile", "nothing"], "there is no profile")):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 1 and text in result.stderr, result
    assert not Stack(name).directory.exists(), "a start that was refused left something"
    # `down` removes the directory of a stack, so a name must not lead to another one.
    elsewhere = [sys.executable, "-m", "supervisor", "--name", "../elsewhere", "down"]
    result = subprocess.run(elsewhere, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "is no name of a stack" in result.stderr, result


def demo() -> None:
    """The profile `demo`: what it sends is received, over nginx, and it says so."""
    stack = Stack(f"demo-{os.getpid()}")
    try:
        stack.up({"demo"})
        for name in ("demo-chat", "demo-notifications"):

            def talks(name: str = name) -> bool:
                log = stack.tail(name)
                counts = re.findall(r"sent=(\d+) received=(\d+).* lost=(\d+)", log)
                assert counts and int(counts[-1][0]) and int(counts[-1][1]), log
                assert counts[-1][2] == "0", log
                return True

            eventually(f"{name} sends and receives", 30, talks)
    finally:
        stack.down()


def configuration() -> None:
    """The binary takes the stack's configuration file with its secrets, and names a secret's file that is missing."""
    files = {
        "SANJAY_CLUSTER__KEY_FILE": "cluster_key",
        "SANJAY_EDGE__TOKEN_SECRET_FILE": "token_secret",
        "SANJAY_DELIVERY__API_KEYS_FILE": "api_keys",
    }
    with tempfile.TemporaryDirectory() as directory:
        _secrets(directory)
        made = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
        again = _secrets(directory)
        assert made == {path.name: path.read_bytes() for path in Path(directory).iterdir()}, "secrets were overwritten"
        assert "made " not in again, again
        environment = {name: f"{directory}/{file}" for name, file in files.items()}
        command = [str(sanjay_binary()), "check-config", str(COMPOSE.parent / "sanjay.toml")]
        command += [part for role in ("edge", "router", "delivery") for part in ("--for", role)]
        taken = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert taken.returncode == 0, taken.stderr
        (Path(directory) / "cluster_key").unlink()
        missing = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert missing.returncode == 1 and "SANJAY_CLUSTER__KEY_FILE" in missing.stderr, missing
        assert f"{directory}/cluster_key" in missing.stderr, missing.stderr


def _secrets(directory: str) -> str:
    """Makes what is missing; what it says of that."""
    command = [COMPOSE.parent / "make-secrets.sh", directory]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _refused(document: dict[str, Any], text: str) -> None:
    # Beside the original, because paths in it are relative to it.
    with (
        tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=COMPOSE.parent) as file,
        tempfile.TemporaryDirectory() as directory,
    ):
        # JSON is YAML, and quicker to write.
        json.dump(document, file)
        file.flush()
        try:
            services = load(Path(file.name), set())
            renderer = Renderer(services, "127.64.0", Path(directory), {})
            for service in services.values():
                renderer.render(service)
        except (ComposeError, MissingProgram) as error:
            assert text in str(error), f"{text!r} is not in {error}"
        else:
            raise AssertionError(f"not refused: {text}")


def _nothing_is_left(stack: Stack, pids: dict[int, str | None], block: str) -> None:
    alive = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid, start in pids.items() if start_time(pid) == start}
    assert not alive, alive
    assert not _processes(stack), _processes(stack)
    assert not listening(block), listening(block)
    assert not stack.directory.exists(), stack.directory


def _processes(stack: Stack) -> dict[int, str | None]:
    """Ids and start times of the processes that have to do with the stack's directory: run from it, or name it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            directory, command = os.readlink(entry / "cwd"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if directory.startswith(f"{stack.directory}/") or str(stack.directory).encode() in command:
            found[int(entry.name)] = start_time(int(entry.name))
    return found
