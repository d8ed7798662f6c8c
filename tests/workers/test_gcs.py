"""What is said about addresses where there is no Ray; `test_joined_cluster` has those where there is one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.workers.namespace import one_line
from workers import gcs


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Something that answers whatever it is asked with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(request.param)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "server",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"\0\0\x08\x07\0\0\0\0\0" + bytes(8),  # GOAWAY
        b"\0\0\0\x04\0\0\0\0\0",  # settings, and no more
    ],
    indirect=True,
    ids=["nothing", "http1", "goaway", "half"],
)
def test_what_is_no_ray(server):
    with pytest.raises(ConnectionError) as caught:
        gcs.check(server)
    assert f"there is no Ray cluster at {server}" in one_line(caught.value)


def test_what_does_not_answer(monkeypatch):
    monkeypatch.setattr(gcs, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConnectionError, match="no answer"):
        gcs.check(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head.example.org:1", ("head.example.org", 1)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_addresses(address, parts):
    assert gcs.split(address) == parts


@pytest.mark.parametrize(
    "address", ["auto", "local", ":6379", "host", "host:", "host:x", "host:99999", "ray://h:1"]
)
def test_what_is_no_address(address):
    with pytest.raises(ConnectionError, match="host:port"):
        gcs.check(address)


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 1000, 20_000])
def test_the_length_of_a_string_in_a_header(size):
    """RFC 7541, 5.1, read back."""
    encoded = gcs._string("x" * size)
    length, at = encoded[0], 1
    if length == 127:
        shift = 0
        while True:
            length += (encoded[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if encoded[at - 1] < 128:
                break
    assert length == size
    assert encoded[at:] == b"x" * size


def test_a_token_is_found_where_ray_looks_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert gcs.token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert gcs.token() == "at home"
    (tmp_path / "elsewhere").write_text("elsewhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert gcs.token() == "elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "at hand")
    assert gcs.token() == "at hand"
