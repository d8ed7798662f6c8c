"""Packs too large for the memory there is, for real and as torch would say it; and interrupted actors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workers.runner
from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.results import Divergence, Finished, Progress, RunResult
from tests.workers.packs import all_bits, expected, task
from workers import memory
from workers.actor import PackActor
from workers.protocol import (
    PackEvent,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    PackTask,
    WorkerOptions,
)
from workers.runner import run_pack

# --- for real ---

MIB = 2**20
RUNS = 8
STEPS = 2
TOO_LITTLE = (2, 8 * MIB)
"""Two runs, and less than one of them takes."""
LITTLE = (RUNS, 100 * MIB)
"""All runs, and about what three of them take."""

HELD = """
import json
import logging
import torch
from ddpnopt.datasets.load import load
from tests.workers.test_memory import LITTLE, TOO_LITTLE, large, records
from workers import memory
from workers.runner import run_pack

torch.set_num_threads(1)
warnings = []

class Kept(logging.Handler):
    def emit(self, record):
        if record.levelno == logging.WARNING:
            warnings.append(record.getMessage())

logging.getLogger("workers").addHandler(Kept())
list(run_pack(large(1, batch=16)))  # what libraries hold for good is not what a pack needs
found = []
for runs, nbytes in (TOO_LITTLE, LITTLE):
    memory.limit(nbytes)
    events = records(run_pack(large(runs)))
    found.append((events, list(warnings)))
    warnings.clear()
print(json.dumps(found))
"""
"""What a process with little memory does: both packs, each held to so much more than there is before it."""


def large(runs: int, batch: int = 1024) -> PackTask:
    """Runs with a dense V_xx for every sample of a large batch: dozens of MiB each, and little to do."""
    optimizer = OptimizerConfig("sgd", "ddpnopt", 0.05, 1e-3, FeedbackConfig())
    # Not in lanes, which take next to no memory: those do not know gelu.
    model, training = ModelConfig((32, 32), "gelu"), TrainingConfig(STEPS, batch, 1)
    made = (RunConfig("digits", model, "cross_entropy", training, optimizer, seed) for seed in range(runs))
    return PackTask(1, 1, tuple(made))


def records(events: Iterator[PackEvent]) -> list[list[Any]]:
    """Put what follows the start into words that cross between processes."""
    assert isinstance(next(events), PackStarted)
    return [record(event) for event in events]


def record(event: PackEvent) -> list[Any]:
    if isinstance(event, PackProgress):
        return ["progress", event.step, event.steps, event.active]
    if isinstance(event, PackFailed):
        return ["failed", event.reason, event.retryable]
    return ["finished", hashlib.sha256(repr(all_bits(event.results)).encode()).hexdigest()]


@pytest.fixture(scope="module")
def held() -> list[tuple[list[list[Any]], list[str]]]:
    """Events and warnings of both packs."""
    if memory._held() is None:
        pytest.skip("this system does not tell a process's memory")
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[tuple[list[list[Any]], list[str]]] = json.loads(done.stdout)
    return found


def test_a_pack_too_large_for_the_memory_is_trained_in_pieces_to_the_same_bits(held):
    _, (events, warnings) = held
    *all_at_once, finished = records(run_pack(large(RUNS)))
    *progress, in_pieces = events
    assert in_pieces == finished
    assert f"{RUNS} runs at once are too many" in warnings[0]
    assert len(progress) > len(all_at_once)
    assert {(kind, steps, active) for kind, _, steps, active in progress} == {("progress", STEPS, RUNS)}
    assert all(0 <= step <= STEPS for _, step, _, _ in progress)
    assert progress[-1][1] == STEPS


def test_a_run_too_large_for_the_memory_fails_and_may_be_tried_again(held):
    (events, warnings), _ = held
    *progress, (kind, reason, retryable) = events
    assert (kind, retryable) == ("failed", True)
    assert "allocate memory" in reason
    assert len(warnings) == 1
    assert all(0 <= step <= STEPS for _, step, _, _ in progress)


# --- the limit ---


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What `setrlimit` was called with; this process keeps its own."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: found.append(pair))
    monkeypatch.setattr(memory, "_held", lambda: 1000)
    return found


@pytest.mark.parametrize(("most", "limit"), [(resource.RLIM_INFINITY, 1500), (10_000, 1500), (1200, 1200)])
def test_a_limit_is_for_what_comes_and_never_above_the_systems_own(limits, most, limit, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (700, most))
    memory.limit(500)
    assert limits == [(limit, most)]


def test_where_the_memory_of_a_process_is_not_told_there_is_no_limit(limits, monkeypatch, caplog):
    monkeypatch.setattr(memory, "_held", lambda: None)
    with caplog.at_level(logging.WARNING):
        memory.limit(500)
    assert limits == []
    assert "not limited" in caplog.text


def test_an_actor_limits_itself_if_it_is_told_to(monkeypatch):
    found: list[int] = []
    monkeypatch.setattr(memory, "limit", found.append)
    PackActor(WorkerOptions(memory=10**9))
    PackActor(WorkerOptions())
    assert found == [10**9]


NO_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
]
"""As numpy and torch say it."""


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_what_no_memory_looks_like(error):
    assert memory.is_exhausted(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        OSError(28, "x"),
    ],
    ids=repr,
)
def test_what_does_not(error):
    assert not memory.is_exhausted(error)


# --- in pieces ---


class Scarce:
    """`train` where so many runs at once are too many. It keeps which runs it was asked for."""

    def __init__(self, most: int, error: BaseException, after: int = 1, leaving: Sequence[int] = ()) -> None:
        """Fail after so many points; runs of these seeds diverge at the second point."""
        self.most, self.error, self.after, self.leaving = most, error, after, leaving
        self.asked: list[list[int]] = []

    def __call__(
        self, runs: Sequence[RunConfig], *args: Any, **options: Any
    ) -> Iterator[Progress | Finished]:
        seeds = [run.seed for run in runs]
        self.asked.append(seeds)
        active = len(runs)
        for point in range(3):
            if len(runs) > self.most and point == self.after:
                raise self.error
            if point == 1:
                active -= sum(seed in self.leaving for seed in seeds)
            yield Progress(5 * point, 10, active)
        yield Finished(tuple(self._result(place, seed) for place, seed in enumerate(seeds)))

    def _result(self, place: int, seed: int) -> RunResult:
        steps = np.arange(2)
        divergence = Divergence(3, "batch_loss", "nan", 1.0) if seed in self.leaving else None
        return RunResult(place, seed, {}, steps, steps, {}, str(seed), divergence)


def numbered(runs: int) -> PackTask:
    """A pack whose runs are known by their seeds."""
    one = task().runs[0]
    return PackTask(7, 3, tuple(replace(one, seed=seed) for seed in range(runs)))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_pack_is_halved_until_it_fits(after, monkeypatch):
    scarce = Scarce(2, NO_MEMORY[after], after)
    monkeypatch.setattr(workers.runner, "train", scarce)
    _, *progress, finished = run_pack(numbered(7))
    assert scarce.asked == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [0], [1, 2], [3, 4], [5, 6]]
    assert isinstance(finished, PackFinished)
    assert [result.index for result in finished.results] == list(range(7))
    assert [result.weights_digest for result in finished.results] == list("0123456")
    whole, three = [(0, 7), (5, 7)][:after], [(0, 7), (2, 7)][:after]
    fitting = [
        *[(0, 7), (0, 7), (1, 7)],  # [0]: 0, 5, 10 steps of one run of seven
        *[(1, 7), (2, 7), (4, 7)],  # [1, 2]: 10, 20, 30
        *[(4, 7), (5, 7), (7, 7)],
        *[(7, 7), (8, 7), (10, 7)],
    ]
    assert [(event.step, event.active) for event in progress] == [*whole, *three, *fitting]
    assert {(event.pack_id, event.attempt, event.steps) for event in progress} == {(7, 3, 10)}


def test_a_pack_that_fits_is_trained_at_once(monkeypatch):
    scarce = Scarce(7, MemoryError())
    monkeypatch.setattr(workers.runner, "train", scarce)
    assert isinstance([*run_pack(numbered(7))][-1], PackFinished)
    assert len(scarce.asked) == 1


@pytest.mark.parametrize(("runs", "most"), [(1, 1), (2, 1), (3, 2), (5, 1), (8, 3), (13, 2), (13, 3)])
def test_every_run_has_its_result_once_and_in_its_place(runs, most, monkeypatch):
    scarce = Scarce(most, MemoryError(), leaving=(0, 4))
    monkeypatch.setattr(workers.runner, "train", scarce)
    _, *progress, finished = run_pack(numbered(runs))
    assert isinstance(finished, PackFinished)
    assert [(result.index, result.weights_digest) for result in finished.results] == [
        (place, str(place)) for place in range(runs)
    ]
    assert sorted(seed for asked in scarce.asked if len(asked) <= most for seed in asked) == [*range(runs)]
    assert all(0 <= event.step <= 10 for event in progress)
    assert all(0 <= event.active <= runs for event in progress)
    assert progress[-1].step == 10
    assert progress[-1].active == runs - sum(seed < runs for seed in (0, 4))


def test_who_has_left_in_an_earlier_piece_is_not_counted_as_active(monkeypatch):
    monkeypatch.setattr(workers.runner, "train", Scarce(2, MemoryError(), 0, leaving=(0, 1, 3)))
    _, *progress, _ = run_pack(numbered(4))
    assert [event.active for event in progress] == [4, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_one_run_that_is_too_large_fails_the_pack(error, monkeypatch):
    scarce = Scarce(0, error)
    monkeypatch.setattr(workers.runner, "train", scarce)
    *_, failed = run_pack(numbered(4))
    assert scarce.asked == [[0, 1, 2, 3], [0, 1], [0]]
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.attempt, failed.retryable) == (7, 3, True)
    assert type(error).__name__ in failed.reason


def test_other_errors_split_nothing(monkeypatch):
    scarce = Scarce(2, RuntimeError("an invariant"))
    monkeypatch.setattr(workers.runner, "train", scarce)
    *_, failed = run_pack(numbered(4))
    assert len(scarce.asked) == 1
    assert isinstance(failed, PackFailed)
    assert "an invariant" in failed.reason


def test_pieces_have_states_of_their_own(tmp_path, monkeypatch):
    """The pack is interrupted in its second piece and goes on there, beginning with the pieces before it."""
    one = task(steps=20)
    checkpoints = Checkpoints(tmp_path, every=0.0)
    train, limited = workers.runner.train, len(one.runs) - 1

    def scarce(runs: Sequence[RunConfig], *args: Any, **options: Any) -> Iterator[Progress | Finished]:
        if len(runs) > limited:
            raise MemoryError
        yield from train(runs, *args, **options)

    monkeypatch.setattr(workers.runner, "train", scarce)
    events = run_pack(one, checkpoints)
    assert isinstance(next(events), PackStarted)
    # 5 and 10 steps of the last two runs of three, after 20 of the first.
    assert [next(events).step for _ in range(8)] == [0, 1, 3, 5, 6, 6, 10, 13]
    events.close()
    assert len([*tmp_path.iterdir()]) == 1
    _, *progress, finished = run_pack(one, checkpoints)
    assert [event.step for event in progress] == [0, 1, 3, 5, 6, 13, 16, 20]
    assert isinstance(finished, PackFinished)
    assert all_bits(finished.results) == expected(one)
    assert [*tmp_path.iterdir()] == []


# --- actors ---


def seen_until(events: Iterator[PackEvent], step: int) -> list[int]:
    seen: list[int] = []
    assert isinstance(next(events), PackStarted)
    while not seen or seen[-1] < step:
        event = next(events)
        assert isinstance(event, PackProgress)
        seen.append(event.step)
    return seen


@pytest.fixture
def actor(tmp_path: Path) -> Callable[[], PackActor]:
    """Workers of one cluster: each has its own process there, and all see the folder."""
    return lambda: PackActor(WorkerOptions(checkpoints=str(tmp_path / "states"), checkpoint_every=0.0))


def test_what_one_actor_began_another_ends(actor, tmp_path):
    one = task(steps=20)
    events = actor().train(one)
    assert seen_until(events, 10) == [0, 5, 10]
    events.close()
    assert len([*(tmp_path / "states").iterdir()]) == 1
    again = replace(one, attempt=2)
    _, *progress, finished = actor().train(again)
    assert progress == [PackProgress(one.pack_id, 2, step, 20, 3, 3) for step in (10, 15, 20)]
    assert isinstance(finished, PackFinished)
    assert all_bits(finished.results) == expected(one)
    assert [*(tmp_path / "states").iterdir()] == []


def test_another_pack_does_not_go_on_from_there(actor, tmp_path):
    events = actor().train(task(1, steps=20))
    seen_until(events, 10)
    events.close()
    other = task(2, steps=20)
    _, *progress, finished = actor().train(other)
    assert [event.step for event in progress] == [0, 5, 10, 15, 20]
    assert isinstance(finished, PackFinished)
    assert all_bits(finished.results) == expected(other)
    assert len([*(tmp_path / "states").iterdir()]) == 1


def test_without_a_folder_a_pack_starts_afresh():
    events = PackActor(WorkerOptions()).train(task(steps=20))
    seen_until(events, 10)
    events.close()
    again = PackActor(WorkerOptions()).train(task(steps=20))
    assert seen_until(again, 10) == [0, 5, 10]


def test_an_actor_that_starts_sweeps_up_what_is_long_forgotten(actor, tmp_path, monkeypatch):
    (tmp_path / "states").mkdir()
    for name in ("old.pt", "new.pt"):
        (tmp_path / "states" / name).write_text("")
    os.utime(tmp_path / "states" / "old.pt", (0, 0))
    actor()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["new.pt"]
