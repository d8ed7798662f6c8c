"""The supervisor's children: started again when they die, given up when they cannot start."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from service import processes
from service.dispatch.main import EXIT_LOST
from service.errors import SetupError
from service.processes import Child


class Fake:
    """A process that ends with the code that the test says, at once."""

    pid = 2**22 + 1  # beyond what Linux gives out
    code: int | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def poll(self) -> int | None:
        return self.code


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(processes.subprocess, "Popen", Fake)
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    return clock


def live_and_die(child: Child, now: list[float], code: int, after: float) -> float:
    """Start the child, let it die, and return how long it then waits."""
    child.look(0)
    assert child.process is not None
    now[0] += after
    monkeypatched = child.process
    monkeypatched.code = code  # type: ignore[attr-defined]
    child.look(0)
    assert child.process is None
    delay = child.restart_at - now[0]
    child.look(0)
    assert child.process is None
    now[0] = child.restart_at
    return delay


def test_a_child_that_is_killed_comes_back_as_often_as_that_happens(now: list[float]) -> None:
    deaths: list[str] = []
    child = Child("dispatcher", lambda: [], lambda: deaths.append("x"))
    delays = [live_and_die(child, now, code, 1.0) for code in 6 * (-signal.SIGKILL, EXIT_LOST)]
    assert len(deaths) == 12
    assert delays[:4] == pytest.approx([0.5, 1.0, 2.0, 4.0])
    assert max(delays) == pytest.approx(processes.LONGEST_DELAY_S)


def test_a_child_that_cannot_start_is_given_up(now: list[float]) -> None:
    child = Child("API", lambda: [], lambda: None)
    for _ in range(processes.QUICK_FAILURES - 1):
        live_and_die(child, now, 1, 1.0)
    with pytest.raises(SetupError, match="API ends as soon as it starts"):
        live_and_die(child, now, 1, 1.0)


def test_a_child_that_lived_starts_with_a_clean_slate(now: list[float]) -> None:
    child = Child("API", lambda: [], lambda: None)
    for _ in range(3 * processes.QUICK_FAILURES):
        assert live_and_die(child, now, 1, processes.STEADY_S + 1) == pytest.approx(processes.FIRST_DELAY_S)
