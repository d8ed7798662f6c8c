"""A pack that was interrupted goes on as if it had not been: every bit, at every step, of every optimizer.

And a file that is not this very pack's state, whole and sound, is no file at all.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddpnopt.pack.engine as engine
from ddpnopt.config import FeedbackConfig, OptimizerConfig, RunConfig
from ddpnopt.datasets.load import Dataset
from ddpnopt.pack.checkpoint import PARTIAL, Checkpoints, key_of, sealed
from ddpnopt.pack.engine import Trainer, train
from ddpnopt.results import Finished, Progress, RunResult, Stopped
from tests.ddpnopt.problems import baseline, bits, ddpnopt, run, sgd, toy
from tests.ddpnopt.test_pack import EVERY, poison

CPU = torch.device("cpu")
DATA = toy()
IMAGES = toy(samples=60, features=36, shape=(1, 6, 6))

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

AVERAGED = {"factor_decay": 0.7, "inverse_every": 3}
OPTIMIZERS: dict[str, OptimizerConfig] = {
    **EVERY,
    # What is only made anew at every third step has to be kept.
    "kfac, averaged": baseline("kfac", 0.02, **AVERAGED),
    "ekfac, averaged": baseline("ekfac", 0.02, momentum=0.9, **AVERAGED),
    "kfac partner, averaged": OptimizerConfig(
        "kfac", "ddpnopt", 0.02, 1e-3, FeedbackConfig("gauss_newton"), baseline("kfac", **AVERAGED).options
    ),
    "rmsprop with momentum": baseline("rmsprop", 0.01, momentum=0.9, second_moment="per_sample"),
}
OTHERS = {name: baseline(name, 0.02) for name in ("sgd_vgr", "emsa", "vanilla_ddp")}

SHAPES: dict[str, dict[str, Any]] = {
    "fcn": {"hidden": (6, 4), "batch_size": 16},
    "cnn": {"hidden": (5,), "kind": "cnn", "channels": (2, 2), "batch_size": 8, "dtype": "float32"},
}


def data_of(shape: str) -> Dataset:
    return IMAGES if shape == "cnn" else DATA


def mixed(shape: str) -> list[RunConfig]:
    """One of each optimizer, with running metrics and a longer way between points of the test set."""
    chosen = OPTIMIZERS if shape == "cnn" else OPTIMIZERS | OTHERS
    runs = [run(optimizer, i % 3, **SHAPES[shape]) for i, optimizer in enumerate(chosen.values())]
    return [timed(one, train_metrics="running", test_every=8) for one in runs]


def timed(one: RunConfig, **changes: Any) -> RunConfig:
    return replace(one, training=replace(one.training, **changes))


def all_bits(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    return [bits(result) for result in results]


def finished(events: Iterator[Any]) -> tuple[RunResult, ...]:
    (end,) = [event for event in events if isinstance(event, Finished)]
    return end.results


# --- the same bits ---

LEAVE = {2: ("sgd", "kfac"), 3: ("adam", "ekfac", "exact_full-batch_mean-clamp")}
"""Who is poisoned after the second update, and so diverges in the third, and who is cancelled after that."""


def drive(trainer: Trainer, saved: Callable[[Trainer], None] = lambda trainer: None) -> list[dict[str, Any]]:
    """Train to the end from where the trainer is, an update at a time; `saved` sees it before each point."""
    names = [*OPTIMIZERS, *OTHERS]
    points = set(trainer.training.points())
    start = trainer.step
    for step in range(start, trainer.training.steps + 1):
        trainer.advance(step)
        # What happened before it was saved is part of its state.
        if step == 2 > start:
            for name in LEAVE[2]:
                poison(trainer, names.index(name), np.nan)
        if step == 3 > start:
            trainer.cancel([names.index(name) for name in LEAVE[3]])
        saved(trainer)
        if step in points:
            trainer.take_metrics()
    return all_bits(trainer.results())


@cache
def whole(shape: str) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """A mixed pack that was never interrupted, and its state after each step."""
    states: dict[int, bytes] = {}

    class Kept(Checkpoints):
        def save(self, key: str, state: dict[str, Any]) -> None:
            file = io.BytesIO()
            torch.save({"key": key, "state": state}, file)
            states[trainer.step] = sealed(file.getvalue())

    trainer = Trainer(mixed(shape), data_of(shape), CPU)
    return drive(trainer, lambda trainer: trainer.save(Kept(Path()))), states


@pytest.mark.parametrize(
    ("shape", "step"),
    [*(("fcn", step) for step in range(11)), *(("cnn", step) for step in (1, 4, 6, 9))],
)
def test_a_pack_goes_on_from_any_step_with_every_bit(shape, step, tmp_path):
    expected, states = whole(shape)
    trainer = Trainer(mixed(shape), data_of(shape), CPU)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path(trainer.key).write_bytes(states[step])
    assert trainer.resume(checkpoints)
    assert trainer.step == step
    assert drive(trainer) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_who_had_left_is_told_of_all_the_same(shape):
    names = [*OPTIMIZERS, *OTHERS]
    found = dict(zip(names, whole(shape)[0], strict=False))
    for name, result in found.items():
        if name in LEAVE[2]:
            assert (result["divergence"]["step"], result["divergence"]["quantity"]) == (3, "batch_loss")
        else:
            assert result["divergence"] is None
            assert result["cancelled"] == (name in LEAVE[3])
            assert result["steps"] == (3 if name in LEAVE[3] else 10)


def test_saving_changes_nothing(tmp_path):
    expected, _ = whole("fcn")
    assert drive(Trainer(mixed("fcn"), DATA, CPU)) == expected
    checkpoints = Checkpoints(tmp_path)
    assert drive(Trainer(mixed("fcn"), DATA, CPU), lambda trainer: trainer.save(checkpoints)) == expected


def test_a_state_of_which_all_have_left(tmp_path):
    runs, checkpoints = [run(sgd()), run(baseline("kfac"))], Checkpoints(tmp_path)
    trainer = Trainer(runs, DATA, CPU)
    trainer.advance(3)
    trainer.cancel([0, 1])
    trainer.save(checkpoints)
    again = Trainer(runs, DATA, CPU)
    assert again.resume(checkpoints)
    assert (again.active, again.step, again.cancelled) == (0, 3, {0: 3, 1: 3})
    assert all_bits(again.results()) == all_bits(trainer.results())


# --- through `train` ---

PACK = [
    *(run(optimizer, seed) for seed in (0, 1) for optimizer in (sgd(), ddpnopt(), baseline("adam", 0.01))),
    run(baseline("kfac")),
    run(ddpnopt(1e200)),  # diverges before it is ever saved
]
AT_ONCE = 0.0
NEVER = 1e9


@pytest.mark.parametrize("train_metrics", ["full", "running"])
def test_a_pack_that_is_interrupted_at_every_point_ends_as_one_that_is_not(train_metrics, tmp_path):
    """A state is of the last update before the point, so that the point is told of again."""
    runs = [timed(one, train_metrics=train_metrics, test_every=8) for one in PACK]
    expected = finished(train(runs, DATA))
    checkpoints = Checkpoints(tmp_path, every=AT_ONCE)
    for point in (0, 4, 8, 10):
        events = train(runs, DATA, checkpoints=checkpoints)
        seen = []
        while not seen or seen[-1] < point:
            event = next(events)
            assert isinstance(event, Progress)
            seen.append(event.step)
        # After the first, each starts where the one before it was closed.
        assert seen == {0: [0], 4: [0, 4], 8: [4, 8], 10: [8, 10]}[point]
        events.close()
        assert len(list(tmp_path.iterdir())) == (point > 0)
    *progress, end = train(runs, DATA, checkpoints=checkpoints)
    assert [event.step for event in progress] == [10]
    assert isinstance(end, Finished)
    assert all_bits(end.results) == all_bits(expected)
    assert end.results[-1].state == "diverged"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train_metrics", ["full", "running"])
def test_a_pack_that_is_stopped_again_and_again_ends_as_one_that_is_not(train_metrics, tmp_path):
    """At its start, and after each of its stretches, of which one ends at each point."""
    runs = [timed(one, train_metrics=train_metrics, test_every=8) for one in PACK]
    expected = finished(train(runs, DATA))
    checkpoints, stops, points = Checkpoints(tmp_path, every=NEVER), [], []
    while True:
        # Each attempt may do one more stretch than it needs to get where the one before it was.
        asked = iter([False] * bool(stops) + [True])
        *progress, end = train(runs, DATA, checkpoints=checkpoints, stopping=lambda asked=asked: next(asked))
        points += [event.step for event in progress if event.step not in stops or event.step in (0, 4, 8, 10)]
        if isinstance(end, Finished):
            break
        assert end == Stopped(end.step, kept=True)
        assert len(list(tmp_path.iterdir())) == 1
        stops.append(end.step)
        assert len(stops) < 20
        if end.step == 10:  # nothing is left but the last point
            *progress, end = train(runs, DATA, checkpoints=checkpoints)
            points += [event.step for event in progress]
            break
    assert stops[0] == 0
    assert stops == sorted(stops)
    assert {4, 8, 10} <= set(stops)
    assert points == [0, 4, 8, 10]
    assert isinstance(end, Finished)
    assert all_bits(end.results) == all_bits(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_is_stopped_without_a_place_for_its_state_is_lost():
    answers = iter([False, False, True])
    *_, end = train(PACK, DATA, stopping=lambda: next(answers))
    assert isinstance(end, Stopped)
    assert end.step > 0
    assert not end.kept


def test_a_state_that_cannot_be_kept_when_the_pack_is_stopped(tmp_path, caplog):
    (tmp_path / "folder").write_text("a file")
    (end,) = train(PACK, DATA, checkpoints=Checkpoints(tmp_path / "folder"), stopping=lambda: True)
    assert end == Stopped(0, kept=False)
    assert "could not be written" in caplog.text


def test_runs_that_leave_and_an_interruption(tmp_path):
    """Who was cancelled before the state was written is not asked for again."""
    leave = {4: [0, 6], 8: [1]}
    expected = finished(train(PACK, DATA, leaving=lambda step: leave.get(step, [])))
    checkpoints = Checkpoints(tmp_path, every=AT_ONCE)
    events = train(PACK, DATA, checkpoints=checkpoints, leaving=lambda step: leave.get(step, []))
    assert [next(events).step for _ in range(3)] == [0, 4, 8]
    events.close()
    asked = []

    def leaving(step: int) -> list[int]:
        asked.append(step)
        return leave[step] if step == 8 else []

    found = finished(train(PACK, DATA, checkpoints=checkpoints, leaving=leaving))
    assert asked == [8]
    assert all_bits(found) == all_bits(expected)
    assert [result.state for result in found].count("cancelled") == 3


def test_a_state_is_written_when_its_time_has_come(tmp_path):
    assert list(train(PACK, DATA, checkpoints=Checkpoints(tmp_path / "never", every=NEVER)))
    assert not (tmp_path / "never").exists()
    events = train(PACK, DATA, checkpoints=Checkpoints(tmp_path / "at once", every=AT_ONCE))
    assert [next(events).step for _ in range(2)] == [0, 4]
    assert (tmp_path / "at once").exists()


def test_a_pack_that_has_ended_starts_afresh(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=AT_ONCE)
    first, second = (list(train(PACK, DATA, checkpoints=checkpoints)) for _ in range(2))
    assert [event.step for event in first[:-1]] == [event.step for event in second[:-1]] == [0, 4, 8, 10]
    assert list(tmp_path.iterdir()) == []


LAST = 600
LONG = [
    run(optimizer, seed, steps=LAST, eval_every=20)
    for seed, optimizer in enumerate((sgd(), ddpnopt(0.02), baseline("adam", 0.01), baseline("kfac", 0.01)))
]
ELSEWHERE = """
import sys
from pathlib import Path
import torch
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.pack.engine import train
from tests.ddpnopt.test_checkpoint import AT_ONCE, DATA, LONG

torch.set_num_threads(1)
for event in train(LONG, DATA, checkpoints=Checkpoints(Path(sys.argv[1]), every=AT_ONCE)):
    print(event.step, flush=True)
"""


def test_a_process_that_was_killed_is_carried_on_by_another(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        while int(process.stdout.readline()) < 40:
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    *progress, end = train(LONG, DATA, checkpoints=Checkpoints(tmp_path, every=NEVER))
    assert 40 <= progress[0].step < LAST
    assert isinstance(end, Finished)
    assert all_bits(end.results) == all_bits(finished(train(LONG, DATA)))
    assert [path for path in tmp_path.iterdir() if path.suffix != PARTIAL] == []


# --- whose state it is ---

TWO = [run(sgd()), run(baseline("kfac"), 1)]


def advanced(runs: Sequence[RunConfig] = TWO, steps: int = 3) -> Trainer:
    trainer = Trainer(runs, DATA, CPU)
    trainer.advance(steps)
    return trainer


def assert_starts_afresh(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning that names the file, and with the results of a pack that never saw it."""
    trainer = Trainer(TWO, DATA, CPU)
    with caplog.at_level(logging.WARNING):
        assert not trainer.resume(checkpoints)
    (record,) = caplog.records
    assert str(checkpoints.path(trainer.key)) in record.getMessage()
    assert "the pack starts afresh" in record.getMessage()
    assert trainer.step == 0
    found = finished(train(TWO, DATA, checkpoints=replace(checkpoints, every=NEVER)))
    assert all_bits(found) == all_bits(finished(train(TWO, DATA)))


@pytest.mark.parametrize(
    "other",
    [
        TWO[:1],
        TWO[::-1],
        [TWO[0], run(baseline("kfac"), 2)],
        [run(sgd(0.2)), TWO[1]],
        [timed(one, steps=11) for one in TWO],
        [replace(one, dtype="float32") for one in TWO],
    ],
    ids=["fewer", "order", "seed", "rate", "steps", "dtype"],
)
def test_another_packs_state_is_not_taken(other, tmp_path, caplog):
    checkpoints, trainer = Checkpoints(tmp_path), advanced(other)
    trainer.save(checkpoints)
    own = Trainer(TWO, DATA, CPU)
    assert checkpoints.path(own.key) != checkpoints.path(trainer.key)
    assert not own.resume(checkpoints)
    checkpoints.path(trainer.key).rename(checkpoints.path(own.key))
    assert_starts_afresh(checkpoints, caplog)


@pytest.mark.parametrize("what", ["numerics", "torch", "kernel", "data"])
def test_a_state_of_other_circumstances_is_not_taken(what, tmp_path, caplog, monkeypatch):
    checkpoints, trainer = Checkpoints(tmp_path), advanced()
    trainer.save(checkpoints)
    assert Trainer(TWO, DATA, CPU).key == trainer.key
    with monkeypatch.context() as patch:
        of = DATA
        if what == "numerics":
            patch.setattr(engine, "NUMERICS_VERSION", engine.NUMERICS_VERSION + 1)
        elif what == "torch":
            patch.setattr(torch, "__version__", "0.1")
        elif what == "kernel":
            if engine.library("float64") is None:
                pytest.skip("no C compiler")
            patch.setattr(engine, "library", lambda dtype: None)
        else:
            of = replace(DATA, checksum="another")
        other = Trainer(TWO, of, CPU)
        assert other.key != trainer.key
        assert not other.resume(checkpoints)
        other.save(checkpoints)
    checkpoints.path(other.key).replace(checkpoints.path(trainer.key))
    assert_starts_afresh(checkpoints, caplog)


def test_the_format_is_part_of_a_packs_name(monkeypatch):
    before = key_of(TWO, "a")
    assert key_of(TWO, "a") == before != key_of(TWO, "b")
    monkeypatch.setattr("ddpnopt.pack.checkpoint.FORMAT", 0)
    assert key_of(TWO, "a") != before


def saved_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"key": "k", "state": {"u": torch.zeros(100)}}, file)
    return sealed(file.getvalue())


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "nothing of interest")
    return file.getvalue()


def a_list() -> bytes:
    file = io.BytesIO()
    torch.save([1, 2, 3], file)
    return file.getvalue()


RUBBISH = {
    "nothing": b"",
    "one byte": b"P",
    "text": b"these are not the numbers you are looking for\n",
    "zeros": bytes(10_000),
    "noise": np.random.default_rng(0).bytes(10_000),
    # Each of these is taken for an old format, and fails in another way.
    "ends too early": b"\x80\x02.",
    "unknown memory": b"\x80\x02h\x13.",
    "a short number": b"\x80\x02G\x00",
    "empty stack": b"a",
    "a pickle": pickle.dumps({"key": "k", "state": {}}),
    "an archive of something else": a_zip(),
    "not a state": a_list(),
}


@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "bare"])
@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_not_taken(name, seal, tmp_path, caplog):
    """Nor if its checksum is right, as that of another program's file could be."""
    checkpoints = Checkpoints(tmp_path)
    content = sealed(RUBBISH[name]) if seal else RUBBISH[name]
    checkpoints.path(Trainer(TWO, DATA, CPU).key).write_bytes(content)
    assert_starts_afresh(checkpoints, caplog)


def test_a_flipped_bit_is_noticed(tmp_path, caplog):
    checkpoints, trainer = Checkpoints(tmp_path), advanced()
    trainer.save(checkpoints)
    path = checkpoints.path(trainer.key)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_starts_afresh(checkpoints, caplog)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.7, 0.99])
def test_part_of_a_state_is_not_taken(part, tmp_path, caplog):
    checkpoints, trainer = Checkpoints(tmp_path), advanced()
    trainer.save(checkpoints)
    path = checkpoints.path(trainer.key)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert_starts_afresh(checkpoints, caplog)


def test_no_single_cut_and_no_noise_is_an_error(tmp_path, caplog):
    checkpoints, content = Checkpoints(tmp_path), saved_bytes()
    random = np.random.default_rng(1)
    noise = [random.bytes(int(random.integers(1, 60))) for _ in range(300)]
    cuts = [content[:length] for length in range(0, len(content), 37)]
    for rubbish in (*map(sealed, noise), *cuts, *(sealed(cut[32:]) for cut in cuts)):
        checkpoints.path("k").write_bytes(rubbish)
        assert checkpoints.load("k") is None
    checkpoints.path("k").write_bytes(content)
    assert checkpoints.load("k") is not None


def test_a_folder_in_the_place_of_a_state_is_not_taken(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path(advanced().key).mkdir()
    with caplog.at_level(logging.WARNING):
        assert not Trainer(TWO, DATA, CPU).resume(checkpoints)
    assert "cannot be read" in caplog.text


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_no_code_comes_out_of_a_file(how, tmp_path, caplog):
    checkpoints, mark = Checkpoints(tmp_path / "states"), tmp_path / "mark"
    checkpoints.folder.mkdir()
    key = Trainer(TWO, DATA, CPU).key
    document = {"key": key, "state": Bomb(mark)}
    file = io.BytesIO()
    torch.save(document, file) if how == "torch" else pickle.dump(document, file)
    checkpoints.path(key).write_bytes(sealed(file.getvalue()))
    assert_starts_afresh(checkpoints, caplog)
    assert not mark.exists()
    # It would have gone off.
    file = io.BytesIO()
    torch.save(document, file)
    file.seek(0)
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_no_state_is_no_cause_for_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert not Trainer(TWO, DATA, CPU).resume(Checkpoints(tmp_path / "nowhere"))
    assert caplog.records == []
    assert not (tmp_path / "nowhere").exists()


# --- the file ---


def test_states_are_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        checkpoints, trainer = Checkpoints(tmp_path / "a" / "states"), advanced()
        trainer.save(checkpoints)
    finally:
        os.umask(before)
    assert stat.S_IMODE(checkpoints.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(checkpoints.path(trainer.key).stat().st_mode) == 0o600


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_the_state_before(tmp_path, monkeypatch):
    checkpoints, trainer = Checkpoints(tmp_path), advanced()
    trainer.save(checkpoints)
    path = checkpoints.path(trainer.key)
    before = path.read_bytes()
    trainer.advance(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            trainer.save(checkpoints)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    again = Trainer(TWO, DATA, CPU)
    assert again.resume(checkpoints)
    assert again.step == 3
    trainer.save(checkpoints)
    assert path.read_bytes() != before


def test_a_state_that_is_interrupted_by_a_signal_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        advanced().save(Checkpoints(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_is_discarded_is_gone_and_may_be_gone_before(tmp_path):
    checkpoints, trainer, other = Checkpoints(tmp_path), advanced(), advanced(TWO[:1])
    for each in (trainer, other):
        each.save(checkpoints)
    for _ in range(2):
        checkpoints.discard(trainer.key)
        assert list(tmp_path.iterdir()) == [checkpoints.path(other.key)]


def test_what_nobody_has_come_back_for_is_swept_away(tmp_path):
    old, new = time.time() - 1000, time.time() - 10
    ages = {"a.pt": old, "b.pt": new, f"c{PARTIAL}": old, f"d{PARTIAL}": new, "notes.txt": old}
    for name, age in ages.items():
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (age, age))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.sweep() == 0
    assert checkpoints.sweep(older_than=100) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pt", f"d{PARTIAL}", "notes.txt"]
    assert checkpoints.sweep(older_than=100) == 0
    assert Checkpoints(tmp_path / "nowhere").sweep() == 0


def test_training_goes_on_where_no_state_can_be_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", full_disk)
    events = train(TWO, DATA, checkpoints=Checkpoints(tmp_path, every=0))
    assert all_bits(finished(events)) == all_bits(finished(train(TWO, DATA)))
    assert "could not be written" in caplog.text
    assert list(tmp_path.iterdir()) == []
