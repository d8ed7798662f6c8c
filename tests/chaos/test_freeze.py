"""T2: a process is frozen beyond its lease, another goes on with its pack, and then it wakes up.

kill -9 never shows a missing fence, since the dead write nothing. The same without the fence must fail.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from service.db.engine import open_engine, read
from service.db.tables import attempts, packs, results, runs
from tests.chaos.books import check_books
from tests.chaos.holder import STALE_WRITES
from tests.chaos.scale import SCALE, TIMEOUT_S
from tests.service.helpers import submit

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

ROOT = Path(__file__).parent.parent.parent
EVENTS = 5
"""Of a small pack: it starts, is at steps 0, 2 and 4, and is done."""


class Process:
    """A holder of leases in a process of its own."""

    def __init__(self, owner: str) -> None:
        command = [sys.executable, "-m", "tests.chaos.holder", owner]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, *command: Any) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the last command."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process is gone"
        return json.loads(line)

    def wait_until_frozen(self) -> None:
        """Wait for SIGSTOP to have come."""
        seen = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert seen is not None
        assert seen.si_code == os.CLD_STOPPED, "the process is gone"

    def wake(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Process, Process]]:
    """Two holders, for both databases: they take seconds to start."""
    both = Process("sleeper"), Process("other")
    yield both
    for one in both:
        one.process.kill()
        one.process.wait()


def rounds(count: int) -> Iterator[tuple[int, str]]:
    """Say where to freeze and what to try then: every write, everywhere."""
    chance = random.Random(0)
    for number in range(count):
        yield chance.randrange(EVENTS), list(STALE_WRITES)[number % len(STALE_WRITES)]


def freeze_and_wake(
    sleeper: Process, other: Process, sweep_id: str, at: int, stale_write: str, fenced: bool
) -> tuple[bool, bool]:
    """Play one round; return whether the stale write was accepted, and whether the one that holds was."""
    sleeper.tell("freeze", sweep_id, at, stale_write, fenced)
    sleeper.wait_until_frozen()
    other.tell("take_over", sweep_id)
    assert other.answer() == 2
    sleeper.wake()
    stale = sleeper.answer()
    other.tell("finish")
    return stale, other.answer()


def check_recorded(engine: Engine, sweep_id: str) -> None:
    """Assert that the second attempt recorded every run, and left no trace of the first one's last words."""
    with read(engine) as connection:
        query = select(results.c.attempt).join(runs, runs.c.id == results.c.run_id)
        assert connection.scalars(query.where(runs.c.sweep_id == sweep_id)).all() == [2] * 18
        state = connection.scalar(select(packs.c.state).where(packs.c.sweep_id == sweep_id))
        ledger = connection.execute(
            select(attempts.c.outcome, attempts.c.log)
            .where(attempts.c.sweep_id == sweep_id)
            .order_by(attempts.c.attempt)
        )
        assert [tuple(row) for row in ledger] == [("lost", ""), ("completed", "")]
    assert state == "completed"


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """A database of its own."""
    engine = open_engine(database)
    yield engine
    engine.dispose()


def test_t2_frozen_beyond_the_lease(
    engine: Engine,
    processes: tuple[Process, Process],
    small_spec: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    spec = small_spec | {"reuse": False}
    accepted = without = 0
    for one in processes:
        one.tell("use", engine.url.render_as_string(hide_password=False))
        one.answer()
    for at, stale_write in rounds(SCALE.freezes):
        sweep_id = submit(engine, spec)
        stale, held = freeze_and_wake(*processes, sweep_id, at, stale_write, fenced=True)
        accepted += stale
        assert held, "the one that holds the pack could not record it"
        check_recorded(engine, sweep_id)
    check_books(engine)
    for at, stale_write in rounds(SCALE.freezes):
        sweep_id = submit(engine, spec)
        without += freeze_and_wake(*processes, sweep_id, at, stale_write, fenced=False)[0]
    say(
        f"T2 {engine.dialect.name}: {SCALE.freezes} freezes beyond the lease, {accepted} stale writes "
        f"accepted; control without the fence: {without} of {SCALE.freezes}"
    )
    assert accepted == 0
    assert without > 0, "the control shows nothing"
