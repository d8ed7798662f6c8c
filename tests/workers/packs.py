"""Packs for the tests of the workers, and how to wait for their events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.pack.engine import train
from ddpnopt.results import Finished, RunResult
from tests.ddpnopt.problems import bits
from workers.protocol import (
    Executor,
    LastEvent,
    PackEvent,
    PackProgress,
    PackStarted,
    PackTask,
)

ENDLESS = 10_000_000


def task(
    pack_id: int = 1, attempt: int = 1, steps: int = 10, eval_every: int = 5, **changes: Any
) -> PackTask:
    """Three runs on WINE."""
    shared: dict[str, Any] = {
        "dataset": "wine",
        "model": ModelConfig((4,)),
        "loss": "cross_entropy",
        "training": TrainingConfig(steps, 16, eval_every),
    } | changes
    optimizers = (
        OptimizerConfig("sgd", "baseline", 0.1),
        OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-3, FeedbackConfig()),
        OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-3, FeedbackConfig(factorized=True, safeguard="psd")),
    )
    runs = tuple(RunConfig(optimizer=optimizer, seed=pack_id, **shared) for optimizer in optimizers)
    return PackTask(pack_id, attempt, runs)


def expected(of: PackTask) -> list[dict[str, Any]]:
    """What the engine makes of a task in this process."""
    (finished,) = [event for event in train(of.runs) if isinstance(event, Finished)]
    return all_bits(finished.results)


def all_bits(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    assert [result.index for result in results] == list(range(len(results)))
    return [bits(result) for result in results]


def collect(executor: Executor, ends: int, seconds: float = 60) -> list[PackEvent]:
    """Poll until so many attempts have ended."""
    events: list[PackEvent] = []
    deadline = time.monotonic() + seconds
    while sum(isinstance(event, LastEvent) for event in events) < ends:
        assert time.monotonic() < deadline, f"{ends} attempts did not end within {seconds} s: {events}"
        events += executor.poll(0.2)
    return events


def without_logs(events: Sequence[PackEvent]) -> list[PackEvent]:
    """Return events as they are apart from what was written meanwhile."""
    return [event if isinstance(event, PackStarted) else replace(event, log="") for event in events]


def progress_of(events: Sequence[PackEvent]) -> list[PackEvent]:
    """Return the progress alone, without logs."""
    return without_logs([event for event in events if isinstance(event, PackProgress)])


def wait_for_progress(executor: Executor, pack_ids: set[int], seconds: float = 60) -> list[PackEvent]:
    """Poll until all of these packs have trained a while; return what was polled."""
    seen: set[int] = set()
    events: list[PackEvent] = []
    deadline = time.monotonic() + seconds
    while not pack_ids <= seen:
        assert time.monotonic() < deadline, f"no progress of {pack_ids - seen} within {seconds} s"
        events += executor.poll(0.2)
        assert not any(isinstance(event, LastEvent) for event in events), events
        seen |= {event.pack_id for event in events if isinstance(event, PackProgress) and event.step > 0}
    return events
