"""Two commands to a server that speaks MongoDB's protocol, in as much of that protocol as they need.

`ping ADDRESS:PORT` ends with 0 when the server takes writes; `initiate ADDRESS:PORT NAME` makes a replica set of it.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

OP_MSG = 2013


def text(name: str, value: str) -> bytes:
    data = value.encode() + b"\0"
    return b"\x02" + name.encode() + b"\0" + struct.pack("<i", len(data)) + data


def number(name: str, value: int) -> bytes:
    return b"\x10" + name.encode() + b"\0" + struct.pack("<i", value)


def document(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def nested(kind: bytes, name: str, value: bytes) -> bytes:
    return kind + name.encode() + b"\0" + value


def call(address: str, command: bytes) -> bytes:
    """Sends a command and returns the bytes of the answer's document."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        body = struct.pack("<I", 0) + b"\0" + command
        connection.sendall(struct.pack("<iiii", 16 + len(body), 1, 0, OP_MSG) + body)
        answer = b""
        while len(answer) < 4 or len(answer) < struct.unpack("<i", answer[:4])[0]:
            part = connection.recv(65536)
            if not part:
                raise ConnectionError("the server closed the connection")
            answer += part
        return answer[21:]


def is_primary(address: str) -> bool:
    answer = call(address, document(number("hello", 1), text("$db", "admin")))
    return b"\x08isWritablePrimary\0\x01" in answer


def initiate(address: str, name: str) -> None:
    member = document(number("_id", 0), text("host", address))
    config = document(text("_id", name), nested(b"\x04", "members", document(nested(b"\x03", "0", member))))
    call(address, document(nested(b"\x03", "replSetInitiate", config), text("$db", "admin")))
    until = time.monotonic() + 60
    while not is_primary(address):
        if time.monotonic() > until:
            raise TimeoutError(f"{address} is no primary after 60 s")
        time.sleep(0.2)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "ping":
            sys.exit(0 if is_primary(sys.argv[2]) else 1)
        initiate(sys.argv[2], sys.argv[3])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error}")
