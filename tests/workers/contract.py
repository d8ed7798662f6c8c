"""What every executor keeps, written once: a test module subclasses it and brings the fixture `executor`."""

from __future__ import annotations

import pytest

from ddpnopt.config import TrainingConfig
from tests.workers.packs import ENDLESS, all_bits, collect, expected, task, wait_for_progress
from workers.protocol import PackFailed, PackFinished, PackProgress


class ExecutorContract:
    def test_an_idle_one_has_nothing_to_say(self, executor):
        slots = executor.free_slots()
        assert slots >= 1
        assert list(executor.poll(0.0)) == []
        assert executor.free_slots() == slots

    def test_a_packs_events_come_in_order_and_end_with_its_results(self, executor):
        slots, one = executor.free_slots(), task(pack_id=7, attempt=3)
        executor.submit(one)
        assert executor.free_slots() == slots - 1
        *progress, finished = collect(executor, ends=1)
        assert progress == [PackProgress(7, 3, step, 10, 3) for step in (0, 5, 10)]
        assert isinstance(finished, PackFinished)
        assert (finished.pack_id, finished.attempt) == (7, 3)
        assert all_bits(finished.results) == expected(one)
        assert executor.free_slots() == slots
        assert list(executor.poll(0.0)) == []

    @pytest.mark.parametrize(
        "changes",
        [{"dataset": "no such data"}, {"training": TrainingConfig(10, 1000, 5)}],
        ids=["dataset", "batch"],
    )
    def test_a_bad_configuration_fails_for_good_and_the_next_pack_trains(self, executor, changes):
        slots = executor.free_slots()
        executor.submit(task(pack_id=1, attempt=2, **changes))
        (failed,) = collect(executor, ends=1)
        assert isinstance(failed, PackFailed)
        assert (failed.pack_id, failed.attempt, failed.retryable) == (1, 2, False)
        assert failed.reason.startswith("ConfigError: ")
        assert "Traceback" in failed.detail
        assert executor.free_slots() == slots
        executor.submit(task(pack_id=2))
        assert isinstance(collect(executor, ends=1)[-1], PackFinished)

    def test_a_cancelled_attempt_is_never_heard_of_again(self, executor):
        slots, endless = executor.free_slots(), task(pack_id=4, steps=ENDLESS, eval_every=100)
        executor.submit(endless)
        wait_for_progress(executor, {4})
        executor.cancel(4, 2)  # another attempt at it, which this executor never had
        executor.cancel(5, 1)
        assert executor.free_slots() == slots - 1
        executor.cancel(4, 1)
        assert executor.free_slots() == slots
        for _ in range(5):
            assert list(executor.poll(0.2)) == []
        executor.cancel(4, 1)
        again = task(pack_id=4, attempt=2)
        executor.submit(again)
        *progress, finished = collect(executor, ends=1)
        assert isinstance(finished, PackFinished)
        assert {event.attempt for event in (*progress, finished)} == {2}
        assert all_bits(finished.results) == expected(again)
