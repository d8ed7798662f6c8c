"""The whole service as a user starts it: `ddpsweep serve` with a private Ray on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from service.client import Client

T = TypeVar("T")
DDPSWEEP = [sys.executable, "-m", "service.cli.main"]


@dataclass
class Running:
    """A service in its own processes."""

    process: subprocess.Popen[str]
    url: str
    home: Path
    database: str = ""

    def __post_init__(self) -> None:
        self.database = self.database or f"sqlite:///{self.home / 'ddpsweep.db'}"

    def cli(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `ddpsweep` against this service."""
        environment = os.environ | {"DDPSWEEP_URL": self.url, "DDPSWEEP_HOME": str(self.home)}
        return subprocess.run(
            [*DDPSWEEP, *arguments], env=environment, input=stdin, capture_output=True, text=True, timeout=120
        )

    def child(self, role: str) -> int:
        """Return the process id of the API or the dispatcher."""
        return wait_for(lambda: next(iter(children(self.process.pid, role)), 0), 30)


def children(parent: int, role: str = "") -> list[int]:
    """List the children of a process, by role if one is named."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and (not role or role.encode() in command):
            found.append(int(stat.parent.name))
    return found


def descendants(parent: int) -> set[int]:
    """List a process's children, their children, and so on."""
    found = set(children(parent))
    for child in tuple(found):
        found |= descendants(child)
    return found


def is_running(pid: int) -> bool:
    """Tell whether a process lives and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(look: Callable[[], T], seconds: float) -> T:
    """Look again until there is something to see."""
    until = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < until, f"nothing was seen within {seconds} s"
        time.sleep(0.1)
    return seen


def start(home: Path, command: Sequence[str] = DDPSWEEP, **settings: str) -> Running:
    """Start a service with some settings and wait until it is ready."""
    home.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [*command, "serve", "--port", "0"],
        env=os.environ | {"DDPSWEEP_HOME": str(home)} | settings,
        stdout=subprocess.PIPE,
        stderr=(home / "serve.log").open("a"),
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found, (home / "serve.log").read_text()
    with Client(found.group()) as client:
        wait_for(client.ready, 60)
    return Running(process, found.group(), home, settings.get("DDPSWEEP_DATABASE_URL", ""))


def stop(service: Running) -> int:
    """Stop a service as Ctrl-C does; return its exit code."""
    service.process.send_signal(signal.SIGINT)
    return service.process.wait(60)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all tests that do it no harm."""
    running = start(tmp_path_factory.mktemp("service"))
    yield running
    assert stop(running) == 0


@pytest.fixture
def fragile_service(tmp_path: Path) -> Iterator[Running]:
    """A service of one's own, to be ill-treated."""
    running = start(tmp_path / "fragile")
    yield running
    if running.process.poll() is None:
        stop(running)
