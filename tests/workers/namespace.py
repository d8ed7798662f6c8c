"""Clusters of several nodes on one machine, in a network of their own that has loopback only.

`ray start` binds to every interface there is, so a test does not start a cluster where anyone could reach it.
With its processes in a namespace of their own too, nothing is left when the test is over.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
UNSHARE = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
HEAD = "127.0.0.1:6399"


def run(function: Callable[..., None], folder: Path, seconds: float = 200) -> str:
    """Run a module's function in a namespace of its own, which has $TEST_FOLDER; return what it printed."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    if (probe := subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"namespaces are not permitted here: {probe.stderr.strip()}")
    code = f"import tests.workers.namespace as n, {function.__module__} as m; n.inside(m.{function.__name__})"
    # A path of Ray's sockets has 107 characters at the most, and pytest's folders are deep.
    short = Path("/tmp") / f"ddps-{secrets.token_hex(4)}"
    short.mkdir(mode=0o700)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_TMPDIR": str(short),
        "TEST_FOLDER": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [*UNSHARE, sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
        shutil.rmtree(short, ignore_errors=True)
    assert process.returncode == 0, said
    return said


def inside(function: Callable[..., None]) -> None:
    """What runs in the namespace: its first process, with which all others end."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.pack("16sH14x", b"lo", IFF_UP | IFF_RUNNING)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, flags)
    function()
    sys.stdout.flush()
    os._exit(0)  # what Ray does at exit is not what is tested


def start(*arguments: str, **environment: str | None) -> None:
    """Run `ray start`; a variable that is None is taken out of its environment."""
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    done = subprocess.run(
        [RAY, "start", "--object-store-memory=80000000", *arguments],
        env=changed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def start_head(*arguments: str, port: int = 6399, **environment: str | None) -> None:
    """Start a cluster whose head trains nothing."""
    start(
        *("--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", *arguments),
        **environment,
    )


def start_node(*arguments: str) -> None:
    """Start a node that joins it."""
    start(f"--address={HEAD}", *arguments)


def stop_cluster() -> None:
    """End all of Ray's processes, which are this namespace's own."""
    subprocess.run([RAY, "stop", "--force"], capture_output=True, timeout=60)


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Wait until a condition holds; false if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def one_line(error: BaseException) -> str:
    """Return what an error says, which must be one line."""
    said = str(error)
    assert said
    assert re.fullmatch(r"[^\r\n]+", said), said
    return said
