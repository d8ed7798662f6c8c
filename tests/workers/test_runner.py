"""One pack in this process: its events, how failures are told, and the local executor."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import workers.runner
from ddpnopt.config import ModelConfig
from ddpnopt.datasets.load import READERS, load
from ddpnopt.errors import DataError
from ddpnopt.results import Divergence, Progress
from tests.workers.contract import ExecutorContract
from tests.workers.packs import ENDLESS, all_bits, expected, task
from workers.actor import PackActor
from workers.local import LocalExecutor
from workers.protocol import Environment, PackFailed, PackFinished, PackProgress, WorkerOptions
from workers.runner import run_pack


def finished_event() -> PackFinished:
    *_, finished = run_pack(task())
    assert isinstance(finished, PackFinished)
    return finished


@pytest.mark.parametrize(
    "value",
    [
        task(),
        Environment("a CPU", {"torch": "2"}, "0" * 64),
        PackProgress(1, 2, 3, 4, 5),
        PackFailed(1, 2, "why", "where", retryable=True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_protocol_objects_cross_processes(value):
    assert pickle.loads(pickle.dumps(value)) == value


def test_results_cross_processes_with_every_bit():
    finished = finished_event()
    again = pickle.loads(pickle.dumps(finished))
    assert all_bits(again.results) == all_bits(finished.results)
    assert again.environment == finished.environment
    diverged = replace(finished.results[0], divergence=Divergence(3, "batch_loss", "nan", 2.5))
    assert pickle.loads(pickle.dumps(diverged)).divergence == diverged.divergence


def test_events_in_order():
    one = task(pack_id=7, attempt=3)
    *progress, finished = run_pack(one)
    assert progress == [PackProgress(7, 3, step, 10, 3) for step in (0, 5, 10)]
    assert isinstance(finished, PackFinished)
    assert (finished.pack_id, finished.attempt) == (7, 3)
    assert all_bits(finished.results) == expected(one)


def test_the_environment_says_where_it_was_trained():
    environment = finished_event().environment
    assert environment.data_checksum == load("wine").checksum
    assert environment.versions["torch"] == torch.__version__
    assert environment.versions["threads"] == str(torch.get_num_threads())
    assert set(environment.versions) == {"numerics", "python", "torch", "numpy", "threads", "kernel"}
    assert environment.device.strip()


def failing_train(error: BaseException, after: int):
    def train(runs, *args, **kwargs):
        for step in range(after):
            yield Progress(step, 10, len(runs))
        raise error

    return train


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (DataError("wine: truncated"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nsecond line"), True),
        (MemoryError(), True),
        (OSError(28, "No space left on device"), True),
        (ValueError("x" * 1000), True),
        (KeyError("surprise"), True),
        (AssertionError("an invariant"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_becomes_an_event(error, retryable, after, monkeypatch):
    monkeypatch.setattr(workers.runner, "train", failing_train(error, after))
    whole = task(pack_id=7, attempt=3)
    *progress, failed = run_pack(replace(whole, runs=whole.runs[:1]))
    assert [event.step for event in progress] == list(range(after))
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.attempt, failed.retryable) == (7, 3, retryable)
    assert failed.reason.startswith(f"{type(error).__name__}: ")
    assert "\n" not in failed.reason
    assert len(failed.reason) <= 500
    assert "failing_train" not in failed.reason
    assert type(error).__name__ in failed.detail
    assert len(failed.detail) <= 8000


def test_mixed_packs_fail_for_good():
    one = task()
    mixed = replace(one, runs=(*one.runs, replace(one.runs[0], model=ModelConfig((5,)))))
    (failed,) = run_pack(mixed)
    assert isinstance(failed, PackFailed)
    assert not failed.retryable


def test_spoilt_data_fail_for_good(monkeypatch):
    read, scale = READERS["wine"]
    monkeypatch.setitem(READERS, "wine", (lambda: tuple(part[:50] for part in read()), scale))
    load.cache_clear()
    (failed,) = run_pack(task())
    assert isinstance(failed, PackFailed)
    assert failed.reason.startswith("DataError: wine: ")
    assert not failed.retryable


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_not_taken_for_a_failed_pack(stop, monkeypatch):
    monkeypatch.setattr(workers.runner, "train", failing_train(stop(), 0))
    with pytest.raises(stop):
        list(run_pack(task()))


def test_closing_the_stream_stops_the_training():
    events = run_pack(task(steps=ENDLESS, eval_every=1))
    assert isinstance(next(events), PackProgress)
    events.close()
    assert list(events) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_an_actor_has_the_threads_that_it_was_given(threads):
    before = torch.get_num_threads()
    try:
        *_, finished = PackActor(WorkerOptions(threads)).train(task())
    finally:
        torch.set_num_threads(before)
    assert isinstance(finished, PackFinished)
    assert finished.environment.versions["threads"] == str(threads)
    assert all_bits(finished.results) == expected(task())


class TestLocalExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self):
        executor = LocalExecutor()
        yield executor
        executor.close()

    def test_trains_one_pack_at_a_time(self, executor):
        assert executor.free_slots() == 1
        executor.submit(task(1))
        with pytest.raises(RuntimeError, match="free_slots"):
            executor.submit(task(2))

    def test_trains_only_when_polled_and_one_event_at_a_time(self, executor):
        executor.submit(task())
        steps = [executor.poll(0.0)[0].step for _ in range(3)]
        assert steps == [0, 5, 10]
        assert isinstance(executor.poll(0.0)[0], PackFinished)

    def test_close_stops_the_pack(self, executor):
        executor.submit(task(steps=ENDLESS, eval_every=1))
        executor.poll(0.0)
        executor.close()
        assert list(executor.poll(0.0)) == []
        assert executor.free_slots() == 1
