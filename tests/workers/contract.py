"""What every executor keeps, written once: a test module subclasses it and brings the fixture `executor`.

The executor keeps its packs' states, in a folder of the fixture's choice.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddpnopt.config import TrainingConfig
from tests.ddpnopt.problems import bits
from tests.workers.packs import (
    ENDLESS,
    all_bits,
    collect,
    expected,
    progress_of,
    task,
    wait_for_progress,
)
from workers.protocol import PackFailed, PackFinished, PackProgress, PackStarted, PackStopped


class ExecutorContract:
    def test_an_idle_one_has_nothing_to_say(self, executor):
        nodes = executor.nodes()
        assert sum(node.devices for node in nodes) >= 1
        assert len({node.id for node in nodes}) == len({node.name for node in nodes}) == len(nodes)
        assert executor.backlog() == 0
        assert list(executor.poll(0.0)) == []
        assert executor.nodes() == nodes

    def test_its_name_is_its_own(self, executor):
        assert executor.cluster
        assert executor.cluster == executor.cluster

    def test_a_packs_events_come_in_order_and_end_with_its_results(self, executor):
        one = task(pack_id=7, attempt=3)
        executor.submit(one)
        started, *progress, finished = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert (started.pack_id, started.attempt) == (7, 3)
        assert started.node in {node.name for node in executor.nodes()}
        assert progress_of(progress) == [PackProgress(7, 3, step, 10, 3, 3) for step in (0, 5, 10)]
        assert len(progress) == 3
        assert isinstance(finished, PackFinished)
        assert (finished.pack_id, finished.attempt, finished.reused) == (7, 3, ())
        assert finished.environment.device == started.device
        assert all_bits(finished.results) == expected(one)
        assert list(executor.poll(0.0)) == []

    def test_a_pool_of_its_nodes_is_where_a_pack_trains(self, executor):
        one = replace(task(pack_id=8), pool=executor.nodes()[0].pool)
        executor.submit(one)
        started, *_, finished = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert started.node == executor.nodes()[0].name
        assert isinstance(finished, PackFinished)
        assert all_bits(finished.results) == expected(one)

    @pytest.mark.parametrize(
        "changes",
        [{"dataset": "no such data"}, {"training": TrainingConfig(10, 1000, 5)}],
        ids=["dataset", "batch"],
    )
    def test_a_bad_configuration_fails_for_good_and_the_next_pack_trains(self, executor, changes):
        executor.submit(task(pack_id=1, attempt=2, **changes))
        started, failed = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert isinstance(failed, PackFailed)
        assert (failed.pack_id, failed.attempt, failed.retryable) == (1, 2, False)
        assert failed.reason.startswith("ConfigError: ")
        assert "Traceback" in failed.detail
        executor.submit(task(pack_id=2))
        assert isinstance(collect(executor, ends=1)[-1], PackFinished)

    def test_a_cancelled_attempt_is_never_heard_of_again(self, executor):
        endless = task(pack_id=4, steps=ENDLESS, eval_every=100)
        executor.submit(endless)
        wait_for_progress(executor, {4})
        executor.cancel(4, 2)  # another attempt at it, which this executor never had
        executor.cancel(5, 1)
        wait_for_progress(executor, {4})
        executor.cancel(4, 1)
        for _ in range(5):
            assert list(executor.poll(0.2)) == []
        executor.cancel(4, 1)
        again = task(pack_id=4, attempt=2)
        executor.submit(again)
        *others, finished = collect(executor, ends=1)
        assert isinstance(finished, PackFinished)
        assert {event.attempt for event in (*others, finished)} == {2}
        assert all_bits(finished.results) == expected(again)

    def test_a_stopped_attempt_keeps_its_state_and_the_next_one_goes_on(self, executor):
        one = task(pack_id=6, steps=4000, eval_every=100)
        executor.submit(one)
        wait_for_progress(executor, {6})
        executor.stop(6, 2)  # neither this attempt
        executor.stop(5, 1)  # nor this pack
        executor.stop(6, 1)
        executor.stop(6, 1)
        *before, stopped = collect(executor, ends=1)
        assert isinstance(stopped, PackStopped)
        assert (stopped.pack_id, stopped.attempt, stopped.kept) == (6, 1, True)
        assert all(event.step < 4000 for event in before)
        executor.stop(6, 1)
        assert list(executor.poll(0.2)) == []
        executor.submit(replace(one, attempt=2))
        started, first, *_, finished = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert isinstance(first, PackProgress)
        assert first.step >= 100
        assert isinstance(finished, PackFinished)
        assert all_bits(finished.results) == expected(one)

    def test_an_attempt_is_stopped_before_it_has_begun(self, executor):
        for pack_id in (1, 2, 3):
            executor.submit(task(pack_id, steps=ENDLESS, eval_every=100))
        for pack_id in (3, 2, 1):
            executor.stop(pack_id, 1)
        ends = [event for event in collect(executor, ends=3) if isinstance(event, PackStopped)]
        assert {event.pack_id for event in ends} == {1, 2, 3}
        executor.submit(task(pack_id=4))
        assert isinstance(collect(executor, ends=1)[-1], PackFinished)

    def test_what_is_known_is_not_trained_again(self, executor):
        one = task(pack_id=9)
        executor.submit(one)
        *_, finished = collect(executor, ends=1)
        assert isinstance(finished, PackFinished)
        key = finished.environment.key()
        executor.submit(replace(one, attempt=2, known=((), ("1" * 64, key), ("0" * 64,))))
        started, *progress, partly = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert progress_of(progress) == [PackProgress(9, 2, step, 10, 2, 2) for step in (0, 5, 10)]
        assert isinstance(partly, PackFinished)
        assert partly.reused == (1,)
        assert [result.index for result in partly.results] == [0, 2]
        trained = all_bits(finished.results)
        assert [bits(result) for result in partly.results] == [trained[0], trained[2]]
        executor.submit(replace(one, attempt=3, known=((key,),) * 3))
        started, last = collect(executor, ends=1)
        assert isinstance(started, PackStarted)
        assert isinstance(last, PackFinished)
        assert (last.results, last.reused, last.environment) == ((), (0, 1, 2), finished.environment)

    def test_more_packs_than_devices_wait_for_their_turn(self, executor):
        count = int(sum(node.devices for node in executor.nodes())) + 3
        tasks = {pack_id: task(pack_id) for pack_id in range(20, 20 + count)}
        for one in tasks.values():
            executor.submit(one)
        events = collect(executor, ends=count)
        for pack_id, one in tasks.items():
            started, *progress, finished = [event for event in events if event.pack_id == pack_id]
            assert isinstance(started, PackStarted)
            assert [event.step for event in progress] == [0, 5, 10]
            assert isinstance(finished, PackFinished)
            assert all_bits(finished.results) == expected(one)
