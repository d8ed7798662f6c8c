"""One pack in this process: its events, how failures are told, and the local executor."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import workers.runner
from ddpnopt.config import ModelConfig
from ddpnopt.datasets.load import READERS, load
from ddpnopt.errors import DataError
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.results import Divergence, Progress
from tests.workers.contract import ExecutorContract
from tests.workers.packs import ENDLESS, all_bits, collect, expected, task
from workers.actor import PackActor
from workers.local import LocalExecutor
from workers.output import LoggedOnly
from workers.protocol import (
    Environment,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    PackStopped,
    Pool,
    WorkerOptions,
)
from workers.runner import Site, run_pack


def finished_event() -> PackFinished:
    *_, finished = run_pack(task())
    assert isinstance(finished, PackFinished)
    return finished


@pytest.mark.parametrize(
    "value",
    [
        task(),
        Environment("a CPU", {"torch": "2"}, "0" * 64),
        PackStarted(1, 2, "a node", "a CPU"),
        PackProgress(1, 2, 3, 4, 5, "said"),
        PackFailed(1, 2, "why", "where", retryable=True),
        PackStopped(1, 2, kept=True),
        replace(task(), pool=Pool("gpu", "H100", "red"), share=0.5, known=(None, "0" * 64, None)),
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
    started, *progress, finished = run_pack(one, site=Site("a node"))
    assert isinstance(finished, PackFinished)
    assert started == PackStarted(7, 3, "a node", finished.environment.device)
    assert progress == [PackProgress(7, 3, step, 10, 3, 3) for step in (0, 5, 10)]
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
    _, *progress, failed = run_pack(replace(whole, runs=whole.runs[:1]))
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
    _, failed = run_pack(mixed)
    assert isinstance(failed, PackFailed)
    assert not failed.retryable


def test_spoilt_data_fail_for_good(monkeypatch):
    read, scale = READERS["wine"]
    monkeypatch.setitem(READERS, "wine", (lambda: tuple(part[:50] for part in read()), scale))
    load.cache_clear()
    _, failed = run_pack(task())
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
    assert isinstance(next(events), PackStarted)
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


# --- stopping ---


@pytest.mark.parametrize("asked", range(8))
def test_a_stopped_pack_goes_on_with_every_bit(asked, tmp_path):
    one, checkpoints = task(steps=20), Checkpoints(tmp_path)
    answers = iter([False] * asked + [True])
    *before, stopped = run_pack(one, checkpoints, Site(stopping=lambda: next(answers)))
    assert stopped == PackStopped(1, 1, kept=True, step=stopped.step)
    assert len([*tmp_path.iterdir()]) == 1
    started, *after, finished = run_pack(replace(one, attempt=2), checkpoints)
    assert isinstance(started, PackStarted)
    assert isinstance(finished, PackFinished)
    steps = [event.step for event in (*before[1:], *after)]
    assert sorted({*steps, stopped.step}) == sorted({0, 5, 10, 15, 20, stopped.step})
    # Every update is told of once: the second attempt begins where the first one ended.
    assert after[0].step == stopped.step
    assert steps == sorted(steps)
    assert all_bits(finished.results) == expected(one)
    assert [*tmp_path.iterdir()] == []


def test_without_a_folder_a_stopped_pack_is_lost():
    *_, stopped = run_pack(task(), site=Site(stopping=lambda: True))
    assert stopped == PackStopped(1, 1, kept=False, step=0)


def test_a_state_that_cannot_be_written_is_not_kept(tmp_path):
    (tmp_path / "folder").write_text("a file")
    *_, stopped = run_pack(task(), Checkpoints(tmp_path / "folder"), Site(stopping=lambda: True))
    assert stopped == PackStopped(1, 1, kept=False, step=0)


def test_an_actor_stops_the_attempt_that_it_is_asked_to_and_no_other(tmp_path):
    actor = PackActor(WorkerOptions(checkpoints=str(tmp_path)))
    actor.stop(1, 1)
    assert isinstance([*actor.train(task(attempt=2))][-1], PackFinished)
    actor.stop(1, 3)  # before it has begun
    assert [*actor.train(task(attempt=3))][-1] == PackStopped(1, 3, kept=True, step=0)


# --- what is known ---


def test_what_is_known_under_another_key_is_trained():
    *_, finished = run_pack(replace(task(), known=(("0" * 64,), (), ("1" * 64, "2" * 64))))
    assert isinstance(finished, PackFinished)
    assert finished.reused == ()
    assert all_bits(finished.results) == expected(task())


@pytest.mark.parametrize("known", [(True, True, False), (True, True, True)], ids=["some", "all"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_a_pack_is_reused_as_a_whole_or_not_at_all(known, device, monkeypatch):
    """Its bits depend there on who shares the pack."""
    train = workers.runner.train
    monkeypatch.setattr(workers.runner, "device_name", lambda device: f"a {device}")
    monkeypatch.setattr(
        workers.runner, "train", lambda runs, data, device, **options: train(runs, data, "cpu", **options)
    )
    *_, first = run_pack(task(), site=Site(device=device))
    assert isinstance(first, PackFinished)
    assert first.environment.device == f"a {device}"
    key = first.environment.key()
    *_, finished = run_pack(
        replace(task(), known=tuple((key,) if one else () for one in known)), site=Site(device=device)
    )
    assert isinstance(finished, PackFinished)
    reused = () if device == "cuda" and not all(known) else tuple(np.flatnonzero(known).tolist())
    assert finished.reused == reused
    assert [result.index for result in finished.results] == [i for i in range(3) if i not in reused]


# --- logs ---


def test_a_pack_says_what_it_does(tmp_path, caplog):
    caplog.set_level("INFO")
    one, checkpoints = task(steps=20), Checkpoints(tmp_path)
    answers = iter([False] * 5 + [True])
    list(run_pack(one, checkpoints, Site(stopping=lambda: next(answers))))
    assert "3 runs on wine for 20 steps; on " in caplog.text
    assert "its state is kept" in caplog.text
    caplog.clear()
    *_, finished = run_pack(one, checkpoints)
    assert "goes on from its state at step " in caplog.text
    assert "done after " in caplog.text
    caplog.clear()
    list(run_pack(replace(one, known=((finished.environment.key(),), (), ()))))
    assert "2 runs on wine for 20 steps, 1 more are known already" in caplog.text


def test_every_event_bears_what_was_written_before_it():
    written = iter(["first", "", "then", "last"])
    started, *events = run_pack(task(), site=Site(written=lambda: next(written)))
    assert isinstance(started, PackStarted)
    assert [event.log for event in events] == ["first", "", "then", "last"]
    *_, failed = run_pack(task(dataset="no such data"), site=Site(written=lambda: "why"))
    assert failed.log == "why"


def test_the_local_executors_log_is_that_of_the_projects_loggers():
    executor = LocalExecutor()
    logger = logging.getLogger("workers")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        executor.submit(task())
        events = collect(executor, ends=1)
    finally:
        logger.setLevel(level)
    text = "".join(event.log for event in events[1:])
    assert "3 runs on wine" in text
    assert "done after" in text
    assert not any(isinstance(handler, LoggedOnly) for handler in logger.handlers)


class TestLocalExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self, tmp_path):
        executor = LocalExecutor(WorkerOptions(checkpoints=str(tmp_path)))
        yield executor
        executor.close()

    def test_two_have_nothing_in_common(self, executor):
        assert LocalExecutor().cluster != executor.cluster

    def test_trains_one_pack_after_another_in_their_order(self, executor):
        executor.submit(task(2))
        executor.submit(task(1))
        assert [event.pack_id for event in collect(executor, ends=2)] == [2] * 5 + [1] * 5

    def test_trains_only_when_polled_and_one_event_at_a_time(self, executor):
        executor.submit(task())
        assert isinstance(executor.poll(0.0)[0], PackStarted)
        steps = [executor.poll(0.0)[0].step for _ in range(3)]
        assert steps == [0, 5, 10]
        assert isinstance(executor.poll(0.0)[0], PackFinished)

    def test_close_stops_the_pack(self, executor):
        executor.submit(task(steps=ENDLESS, eval_every=1))
        executor.poll(0.0)
        executor.close()
        assert list(executor.poll(0.0)) == []
