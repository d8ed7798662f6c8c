"""A service on a disk of 4 MB that gets full: `unshare -rm python -m tests.chaos.disk_full DISK ELSEWHERE N`.

Runs in a mount namespace of its own, with which its disk goes away. Prints its counts as JSON.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.config import Settings
from service.db.engine import open_engine
from service.dispatch.loop import Dispatcher
from tests.chaos.books import all_over, check_books, digests, states
from tests.chaos.conftest import migrated
from tests.conftest import SMALL_SPEC
from tests.service.helpers import submit
from workers.local import LocalExecutor

SIZE, LARGER = "4m", "16m"
SWEEPS: Final = "/api/v1/sweeps"
SPEC: Final[dict[str, Any]] = SMALL_SPEC | {"reuse": False, "seeds": 12}
MOST_ROUNDS: Final = 2000
COUNTS: Final[Counter[str]] = Counter()


class Warnings(logging.Handler):
    """Counts how often the dispatcher could not write."""

    def emit(self, record: logging.LogRecord) -> None:
        COUNTS["warnings"] += "cannot be written now" in record.getMessage()


class Disk:
    """A small disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={SIZE}")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, "tmpfs", str(self.folder)], check=True)

    def fill(self) -> None:
        """Take all the space that is left."""
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            for size in (2**16, 1):
                try:
                    while filler.write(b"\0" * size) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Make room: what took it goes, or the disk grows."""
        filler = self.folder / "filler"
        if filler.exists():
            filler.unlink()
        else:
            self._mount("-o", f"remount,size={LARGER}")

    def remove(self) -> None:
        """Throw everything on it away."""
        subprocess.run(["umount", str(self.folder)], check=True)


class Service:
    """An API and a dispatcher, each with connections of its own."""

    def __init__(self, disk: Disk) -> None:
        self.url = f"sqlite:///{disk.folder / 'small.db'}"
        with migrated(self.url):
            pass
        self.app = create_app(Settings(database_url=self.url))
        self.client = TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        self.engine = open_engine(self.url)
        self.dispatcher = Dispatcher(self.engine, LocalExecutor(), "the only one")
        self.acknowledged: list[str] = []

    def submit(self) -> int:
        """Submit the next sweep, which is the same one until it is acknowledged; return the answer."""
        key = {"Idempotency-Key": f"sweep {len(self.acknowledged)}"}
        answer = self.client.post(SWEEPS, json=SPEC, headers=key)
        if answer.is_success:
            self.acknowledged.append(answer.json()["id"])
        return self._count(answer)

    def look(self) -> None:
        """Read a few things."""
        for path in (SWEEPS, "/readyz", "/", "/api/v1/cluster"):
            self._count(self.client.get(path))

    def _count(self, answer: Any) -> int:
        COUNTS[str(answer.status_code)] += 1
        assert answer.is_success or answer.status_code == 503, (answer.request.url, answer.text)
        return int(answer.status_code)

    def dispatch(self, rounds: int) -> None:
        for _ in range(rounds):
            self.dispatcher.step(0)

    def let_go(self) -> None:
        """Close all connections: the last one to go wants to put the log into the database."""
        self.engine.dispose()
        self.app.state.engine.dispose()

    def complete(self) -> None:
        """Go on until all is over, once there is room again."""
        for _ in range(MOST_ROUNDS):
            self.dispatcher.step(0)
            if all_over(self.engine):
                return
        raise AssertionError("it did not resume by itself")


def one_filling(folder: Path, number: int, wanted: list[Any]) -> None:
    """Get the disk full at some moment, by others or by the service's own doing, and make room again."""
    chance = random.Random(number)
    disk = Disk(folder)
    service = Service(disk)
    assert service.submit() == 201
    service.dispatch(chance.randrange(8))
    if number % 2 == 0:
        disk.fill()
    while service.submit() != 503:  # what the log has room for is still written
        service.dispatch(number % 4 == 1)
    service.look()
    service.dispatch(chance.randrange(3, 12))
    if number % 3 == 0:
        service.let_go()
        service.look()
        service.dispatch(3)
        COUNTS["let go"] += 1
    COUNTS["kept while full"] += len(service.acknowledged)
    disk.free()
    assert service.submit() in (200, 201)
    service.complete()
    check(service.engine, service.acknowledged, wanted)
    service.let_go()
    disk.remove()


def check(engine: Engine, acknowledged: list[str], wanted: list[Any]) -> None:
    """Assert that what was acknowledged is there, once, complete, with the right bits."""
    check_books(engine)
    found = states(engine)
    assert sorted(found) == sorted(acknowledged)
    assert set(found.values()) == {"completed"}
    assert all(digests(engine, sweep_id) == wanted for sweep_id in acknowledged)
    COUNTS["sweeps"] += len(acknowledged)


def undisturbed(folder: Path) -> list[Any]:
    """Train the sweep where there is room."""
    with migrated(f"sqlite:///{folder / 'undisturbed.db'}") as engine:
        sweep_id = submit(engine, SPEC)
        dispatcher = Dispatcher(engine, LocalExecutor(), "undisturbed")
        while not all_over(engine):
            dispatcher.step(0)
        return digests(engine, sweep_id)


def main(disk: str, elsewhere: str, fillings: str) -> None:
    """Fill the disk so many times."""
    logging.getLogger("service.dispatch.loop").addHandler(Warnings())
    wanted = undisturbed(Path(elsewhere))
    for number in range(int(fillings)):
        one_filling(Path(disk), number, wanted)
    print(json.dumps(COUNTS))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
