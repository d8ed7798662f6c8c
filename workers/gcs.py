"""Ask whether a Ray cluster is there, and whether it asks for a token, before Ray itself tries to join it.

Ray joins a cluster without tokens and says nothing, although anyone who reaches such a cluster runs code
there. It tries for twenty seconds to join one with another token, and for minutes to join one that is not
there. So this module sends one request of Ray's protocol (gRPC, that is HTTP/2) with a token and one without.
Ray itself has no call for that.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from workers.protocol import CannotJoinError

TIMEOUT_S: Final = 5.0
METHOD: Final = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The first that any process asks of a cluster."""

MEND: Final = (
    "start its nodes with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN for all, such as: "
    "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32) ray start --head --port={port}"
)

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def token() -> str | None:
    """Return this process's token, from where Ray looks for it; None without."""
    if found := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return found
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def check(address: str) -> None:
    """Make sure that there is a cluster at `host:port` that takes our token and no one without.

    Raises:
        CannotJoinError: if not, in one line that says what to do.
        ConnectionError: if nothing is there.
    """
    host, port = split(address)
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # certificates are asked for, and this module has none to show
    if answers(host, port, None):
        raise CannotJoinError(
            f"the Ray cluster at {address} asks for no token, so anyone who reaches it runs code there; "
            + MEND.format(port=port)
        )
    own = token()
    if own is None:
        raise CannotJoinError(
            f"the Ray cluster at {address} asks for a token and there is none here; "
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what its nodes were started with"
        )
    if not answers(host, port, own):
        raise CannotJoinError(
            f"the Ray cluster at {address} refuses our token; "
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what its nodes were started with"
        )


def split(address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        CannotJoinError: if it is no address of that form.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise CannotJoinError(f"{address!r} is no Ray address; it is host:port, such as 10.0.0.1:6379")
    return host, int(port)


def answers(host: str, port: int, own: str | None) -> bool:
    """Tell whether the cluster answers a request that bears this token, or none; it refuses it otherwise.

    Raises:
        ConnectionError: if nothing is there that speaks HTTP/2.
    """
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
            connection.sendall(_request(where, own))
            return _answered(connection)
    except ConnectionRefusedError:
        raise ConnectionError(f"there is no Ray cluster at {where}: the connection is refused") from None
    except TimeoutError:
        raise ConnectionError(f"there is no Ray cluster at {where}: no answer in {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise ConnectionError(f"there is no Ray cluster at {where}: {error}") from None


def _request(authority: str, own: str | None) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": METHOD,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": f"{TIMEOUT_S:.0f}S",
    }
    if own is not None:
        fields["authorization"] = f"Bearer {own}"
    headers = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields.items())
    empty_message = b"\0" + struct.pack(">I", 0)
    return (
        PREFACE
        + _frame(SETTINGS, 0, 0, b"")
        + _frame(HEADERS, END_HEADERS, 1, headers)
        + _frame(DATA, END_STREAM, 1, empty_message)
    )


def _string(text: str) -> bytes:
    """Return a string literal of HPACK, whose length has 7 bits and then as many as it takes."""
    raw = text.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    length, rest = bytearray([127]), len(raw) - 127
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + raw


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _answered(connection: socket.socket) -> bool:
    """Tell whether our stream brings a message before it ends: a refusal is headers alone."""
    while True:
        header = _read(connection, 9)
        length = int.from_bytes(header[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", header[3:])
        if length > 2**20 or kind > 9:
            raise ConnectionError("what answers is no Ray")
        _read(connection, length)
        if kind == GOAWAY:
            raise ConnectionError("what answers is no Ray")
        if stream != 1:
            continue
        if kind == DATA and length:
            return True
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            return False


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := connection.recv(size - len(found))):
            raise ConnectionError("what answers is no Ray")
        found += more
    return found
