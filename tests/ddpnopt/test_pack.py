"""Packs: a run's bits are its own, divergence stays with who diverges, and the loop counts right.

Everything twice: with lanes where there are some, and with tensors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from ddpnopt.config import EVAL_CHUNK, ModelConfig, OptimizerConfig, RunConfig
from ddpnopt.datasets.load import Dataset, load
from ddpnopt.errors import ConfigError
from ddpnopt.linalg import bmm
from ddpnopt.models import network
from ddpnopt.pack import engine, rng
from ddpnopt.pack.batches import BatchStream
from ddpnopt.pack.engine import Trainer, train
from ddpnopt.pack.stack import stack
from ddpnopt.results import METRICS, Finished, Progress, RunResult
from tests.ddpnopt.problems import (
    FEEDBACKS,
    PARTNERS,
    baseline,
    bits,
    ddpnopt,
    results,
    run,
    sgd,
    toy,
    updates,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["lanes", "tensors"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How runs train that could train in lanes."""
    if request.param == "tensors":
        monkeypatch.setattr(engine, "library", lambda dtype: None)
    elif engine.library("float32") is None:
        pytest.skip("no C compiler")
    chosen: str = request.param
    return chosen


DATA = toy()
WIDE = toy(samples=60, features=33)
IMAGES = toy(samples=60, features=36, shape=(1, 6, 6))

SHAPES = {
    # Each was a way to lose a bit: odd tails of vector loops, and products with a single row or column.
    "tanh": {"hidden": (10, 10), "dtype": "float32"},
    "tanh, batch of one": {"hidden": (33, 17), "batch_size": 1},
    "relu, a layer of one": {
        "hidden": (17, 1, 9),
        "activation": "relu",
        "dtype": "float32",
        "batch_size": 20,
    },
    "sigmoid": {"hidden": (9, 7, 17), "activation": "sigmoid", "dtype": "float32", "batch_size": 3},
    "sigmoid in float64": {"hidden": (5, 9, 2), "activation": "sigmoid", "batch_size": 7},
    "no hidden layer": {"hidden": (), "activation": "identity", "batch_size": 8},
    "gelu": {"hidden": (9, 11), "activation": "gelu", "dtype": "float32", "batch_size": 5},
    "leaky relu, mmc": {"hidden": (9, 11), "activation": "leaky_relu", "batch_size": 6, "loss": "mmc"},
    "cnn": {
        "hidden": (5,),
        "kind": "cnn",
        "channels": (3, 2),
        "dtype": "float32",
        "batch_size": 5,
        "steps": 4,
        "loss": "mse",
    },
}

NO_LANES = ("gelu", "cnn")

OPTIMIZERS = {"sgd": sgd(), **{name: ddpnopt(options=options) for name, options in FEEDBACKS.items()}}
EVERY = {
    **OPTIMIZERS,
    **{name: baseline(name, 0.02) for name in ("rmsprop", "adam", "kfac", "ekfac")},
    "momentum": baseline("sgd", momentum=0.9, weight_decay=0.01),
    **PARTNERS,
}


def members(shape: str) -> list[RunConfig]:
    """Runs of all optimizers, three of each: rates, ε and seeds differ."""
    rates, regs = (0.05, 0.2, 0.4), (1e-4, 0.0, 1e-2)
    found = []
    for i, optimizer in enumerate(EVERY.values()):
        if optimizer.baseline != "sgd":
            rates = (0.002, 0.01, 0.02)
        for j, (rate, reg) in enumerate(zip(rates, regs, strict=True)):
            reg_ = None if optimizer.feedback is None else reg
            found.append(
                run(replace(optimizer, learning_rate=rate, vxx_reg=reg_), (i + j) % 3, **SHAPES[shape])
            )
    return found


@cache
def alone(shape: str, path: str) -> list[RunResult]:
    return [results([one], data_of(shape))[0] for one in members(shape)]


def data_of(shape: str) -> Dataset:
    return IMAGES if SHAPES[shape].get("kind") == "cnn" else WIDE


def assert_same_bits(actual: Sequence[RunResult], expected: Sequence[RunResult]) -> None:
    assert len(actual) == len(expected)
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.index == place
        assert bits(a) == bits(e), f"run {place}"


# --- a run's bits are its own ---


@pytest.mark.parametrize("shape", SHAPES)
@given(
    chosen=st.lists(st.integers(0, 3 * len(EVERY) - 1), min_size=1, max_size=60),
    threads=st.sampled_from((1, 2)),
)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking would take minutes
    suppress_health_check=(HealthCheck.function_scoped_fixture,),
)
def test_any_pack_gives_what_each_run_gives_alone(path, shape, chosen, threads):
    """Packs of any size, order and mix, with members twice, on one thread or two."""
    if path == "lanes" and shape in NO_LANES:
        pytest.skip("all of it is tensors")
    expected = [alone(shape, path)[i] for i in chosen]
    runs = [members(shape)[i] for i in chosen]
    torch.set_num_threads(threads)
    try:
        assert_same_bits(results(runs, data_of(shape)), expected)
    finally:
        torch.set_num_threads(1)


def fig4a(steps: int) -> list[RunConfig]:
    """The runs of examples/digits-fig4a-sgd.yaml, cut short."""
    rates, regs = (0.4, 0.6, 0.7, 0.8), (5e-5, 1e-4, 5e-4, 1e-3)
    optimizers: list[OptimizerConfig] = []
    for rate in rates:
        optimizers += [sgd(rate), *(ddpnopt(rate, reg) for reg in regs)]
    shape = {"dataset": "digits", "hidden": (10,) * 4, "dtype": "float32", "steps": steps, "eval_every": 20}
    return [run(optimizer, seed, **shape) for seed in range(10) for optimizer in optimizers]


@cache
def alone_in_fig4a(path: str) -> list[dict[str, Any]]:
    return [bits(results([one])[0]) for one in fig4a(steps=30)]


@pytest.fixture
def fig4a_alone(path):
    return alone_in_fig4a(path)


@pytest.mark.parametrize("size", [64, 200])
def test_the_200_runs_of_fig_4a_packed_are_those_one_at_a_time(size, fig4a_alone):
    runs = fig4a(steps=30)
    assert len(runs) == 200
    packs = [runs[i : i + size] for i in range(0, len(runs), size)]
    packed = [result for pack in packs for result in results(pack)]
    assert [bits(result) for result in packed] == fig4a_alone


def test_two_threads_give_what_one_gives(fig4a_alone):
    """In a pack so large that elementwise operations are divided among threads."""
    runs = fig4a(steps=30)[::4]
    torch.set_num_threads(2)
    assert [bits(result) for result in results(runs)] == fig4a_alone[::4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "k", "n"), [(33, 64, 1), (1, 64, 33), (64, 33, 1), (1, 65, 10), (1, 500, 1)])
def test_products_do_not_depend_on_how_many_there_are(m, k, n, dtype):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(7, m, k, generator=generator, dtype=dtype)
    right = torch.randn(7, k, n, generator=generator, dtype=dtype)
    whole = bmm(left, right)
    for count in (1, 2, 5):
        assert torch.equal(bmm(left[:count], right[:count]), whole[:count])
        assert torch.equal(bmm(left[-count:].mT.contiguous().mT, right[-count:]), whole[-count:])


def test_two_packs_in_training_at_once_do_not_meet():
    runs = [run(sgd(), 0), run(ddpnopt(), 1)]
    expected = [results([one], DATA) for one in runs]
    streams = [train([one], DATA) for one in runs]
    *_, last = zip(*streams, strict=True)
    for event, own in zip(last, expected, strict=True):
        assert_same_bits(event.results, own)


def test_inference_mode_is_off_between_events():
    for _ in train([run(sgd())], DATA):
        assert not torch.is_inference_mode_enabled()


# --- divergence ---

WILD = run(sgd(1e30), 1, activation="relu", dtype="float32")
MILD = [
    replace(WILD, optimizer=optimizer, seed=seed) for seed, optimizer in product((0, 1), OPTIMIZERS.values())
]


@pytest.mark.parametrize("place", [0, 5, len(MILD)])
def test_a_run_that_blows_up_is_diverged_and_alone_in_that(place):
    runs = [*MILD[:place], WILD, *MILD[place:]]
    found = list(results(runs, DATA))
    wild = found.pop(place)
    expected = results(MILD, DATA)
    assert [bits(result) for result in found] == [bits(result) for result in expected]
    assert all(result.state == "completed" for result in expected)
    assert (wild.state, wild.index, wild.metrics, wild.weights_digest) == ("diverged", place, {}, "")
    assert wild.divergence is not None
    assert wild.divergence.quantity == "batch_loss"
    assert wild.divergence.kind in ("nan", "+inf")
    assert wild.divergence.last_finite is not None
    assert np.isfinite(wild.divergence.last_finite)
    assert 1 < wild.divergence.step <= 10
    assert wild.steps == wild.divergence.step - 1
    assert wild.curve_steps.tolist() == [step for step in (0, 4, 8) if step < wild.divergence.step]
    assert all(np.isfinite(curve).all() for curve in wild.curves.values())
    assert bits(wild) == bits(results([WILD], DATA)[0])


def poison(trainer: Trainer, index: int, number: float) -> None:
    """Put a number into a bias of the last layer of a run, so that every sample meets it."""
    controls = trainer.controls_of(index)
    controls[-1][0, -1] = number
    trainer.set_controls_of(index, controls)


def trained_by_hand(runs: list[RunConfig], poisons: dict[tuple[int, int], float]) -> tuple[RunResult, ...]:
    """Train as `train` does, putting numbers into runs' weights; the keys are (after update, run)."""
    trainer, training = Trainer(runs, DATA, CPU), runs[0].training
    trainer.take_metrics()
    for step in updates(trainer, training.steps):
        for (update, index), number in poisons.items():
            if update == step:
                poison(trainer, index, number)
        trainer.take_metrics()
    return trainer.results()


ALL = [run(optimizer, seed) for seed, optimizer in product((0, 1), OPTIMIZERS.values())]


def test_training_by_hand_is_training():
    assert_same_bits(trained_by_hand(ALL, {}), results(ALL, DATA))


@pytest.mark.parametrize(
    ("after", "number", "step", "quantity", "kind"),
    [
        (1, np.nan, 2, "batch_loss", "nan"),
        (5, np.nan, 6, "batch_loss", "nan"),
        (5, np.inf, 6, "batch_loss", "nan"),  # inf - inf in the softmax
        (4, np.nan, 4, "train_loss", "nan"),  # a point of the curves sees it at once
        (10, np.nan, 10, "train_loss", "nan"),  # as does the end
        (10, -np.inf, 10, "train_loss", "+inf"),
    ],
)
@pytest.mark.parametrize("index", [0, 7, len(ALL) - 1])
def test_a_poisoned_member_diverges_at_once_and_leaves_the_others_alone(
    index, after, number, step, quantity, kind
):
    found = list(trained_by_hand(ALL, {(after, index): number}))
    expected = list(results(ALL, DATA))
    poisoned, healthy = found.pop(index), expected.pop(index)
    assert [bits(result) for result in found] == [bits(result) for result in expected]
    assert poisoned.divergence is not None
    assert (poisoned.divergence.step, poisoned.divergence.quantity) == (step, quantity)
    assert poisoned.divergence.kind == kind
    before = [s for s in (0, 4, 8) if s < step or (s == step and quantity == "batch_loss")]
    assert poisoned.curve_steps.tolist() == before
    for name in METRICS:
        assert poisoned.curves[name].tolist() == healthy.curves[name][: len(before)].tolist()


def plain_logits(controls: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run one tanh net forward by torch's own layers."""
    for u in controls[:-1]:
        x = torch.tanh(nn.functional.linear(x, u[:, :-1], u[:, -1]))
    return nn.functional.linear(x, controls[-1][:, :-1], controls[-1][:, -1])


def test_the_last_finite_loss_is_that_of_the_batch_before():
    trainer, index = Trainer(ALL, DATA, CPU), 3
    for step in updates(trainer, 7):
        if step == 5:
            rows = rng.epoch_batches(ALL[index].seed, 5 // 3, 60, 16)[5 % 3]
            logits = plain_logits(trainer.controls_of(index), torch.from_numpy(DATA.train_inputs[rows]))
            expected = float(nn.functional.cross_entropy(logits, torch.from_numpy(DATA.train_targets[rows])))
        if step == 6:
            poison(trainer, index, np.nan)
    assert trainer.diverged[index].step == 7
    assert trainer.diverged[index].last_finite == pytest.approx(expected, rel=1e-12)


def test_the_last_finite_loss_is_the_runs_own_after_another_has_left():
    runs = [replace(one, training=replace(one.training, eval_every=1)) for one in ALL]
    losses = {}
    for i, one in enumerate(runs):
        alone = Trainer([one], DATA, CPU)
        for _ in updates(alone, 1):
            poison(alone, 0, np.nan)
        alone.advance(2)
        losses[i] = alone.diverged[0].last_finite
    trainer = Trainer(runs, DATA, CPU)
    for step in updates(trainer, 2):
        if step == 1:
            poison(trainer, 0, np.nan)
            trainer.take_metrics()
            assert trainer.diverged[0].quantity == "train_loss"
            for index in range(1, len(ALL)):
                poison(trainer, index, np.nan)
    assert None not in losses.values()
    assert {i: d.last_finite for i, d in trainer.diverged.items() if i > 0} == {
        i: loss for i, loss in losses.items() if i > 0
    }


def test_runs_that_fail_different_metrics_at_one_point_keep_them_apart():
    """Loss over the training set for one, over the test set alone for others; the rest go on."""
    far = DATA.test_inputs.copy()
    far[7] = 1e30
    runs = [run(sgd(), seed, hidden=(), dtype="float32") for seed in range(6)]
    trainer = Trainer(runs, replace(DATA, test_inputs=far), CPU)
    for place, factor in ((1, np.inf), (3, 1e10), (4, 1e10)):
        (u,) = trainer.controls_of(place)
        trainer.set_controls_of(place, [torch.full_like(u, 3e38) if place == 1 else u * factor])
    trainer.take_metrics()
    assert {i: d.quantity for i, d in trainer.diverged.items()} == {
        1: "train_loss",
        3: "test_loss",
        4: "test_loss",
    }
    assert [place for part in trainer.parts for place in part.index.tolist()] == [0, 2, 5]


def test_several_leave_at_once_and_one_by_one():
    group = len(OPTIMIZERS)  # of two members, both of which go
    poisons = {(2, 1): np.nan, (2, 9): np.inf, (4, 0): np.nan, (5, 3): np.nan, (10, 3 + group): np.nan}
    found = trained_by_hand(ALL, poisons)
    gone = {index for _, index in poisons}
    assert {result.index for result in found if result.state == "diverged"} == gone
    expected = results(ALL, DATA)
    stayed = [i for i in range(len(ALL)) if i not in gone]
    assert [bits(found[i]) for i in stayed] == [bits(expected[i]) for i in stayed]


def test_a_metric_that_is_not_finite_ends_its_run():
    """All weights and batch losses are finite, the loss over the test set is not."""
    far = DATA.test_inputs.copy()
    far[7] = np.inf
    (found,) = results([run(sgd())], replace(DATA, test_inputs=far))
    assert found.divergence is not None
    assert (found.divergence.step, found.divergence.quantity) == (0, "test_loss")
    assert (found.curve_steps.tolist(), found.test_steps.tolist()) == ([0], [])


def test_a_pack_of_which_nothing_is_left_ends_early():
    runs = [replace(WILD, seed=seed, training=replace(WILD.training, steps=10_000)) for seed in range(3)]
    *progress, finished = train(runs, DATA)
    assert all(isinstance(event, Progress) and event.step < 12 for event in progress)
    assert isinstance(finished, Finished)
    assert [result.state for result in finished.results] == ["diverged"] * 3


# --- batches and initial weights ---


def test_an_epoch_visits_without_replacement_and_drops_what_is_left_over():
    for epoch in range(3):
        drawn = rng.epoch_batches(seed=5, epoch=epoch, samples=23, batch_size=4)
        assert drawn.shape == (5, 4)
        assert len(np.unique(drawn)) == 20
        assert drawn.min() >= 0
        assert drawn.max() < 23


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [rng.epoch_batches(seed, epoch, 60, 16) for seed, epoch in product((0, 1, 2**62), (0, 1, 2))]
    assert len({order.tobytes() for order in orders}) == 9


def test_batches_follow_one_another_through_the_epochs():
    seeds = (3, 8)
    stream = BatchStream(seeds, samples=23, batch_size=4, device=CPU)
    for update in [*range(12), 2]:
        expected = [rng.epoch_batches(seed, update // 5, 23, 4)[update % 5] for seed in seeds]
        stretch = stream.stretch(update + 1, 100)
        assert stretch.last == 5 * (update // 5 + 1)
        assert stretch.rows(update + 1).tolist() == np.stack(expected).tolist()
        assert stretch.rows(stretch.last).tolist() == stretch.batches[:, -1].tolist()


def test_a_pair_shares_batches_and_initial_weights_and_other_seeds_do_not():
    runs = [run(optimizer, seed) for seed in (4, 9) for optimizer in (sgd(), ddpnopt(), ddpnopt(0.3))]
    model = runs[0].model
    packed = stack(runs, network(model, (5,), 3), model.layers((5,), 3), CPU)
    place = {index: row for row, index in enumerate(packed.index.tolist())}
    for u in packed.controls:
        assert torch.equal(u[place[0]], u[place[1]])
        assert torch.equal(u[place[0]], u[place[2]])
        assert not torch.equal(u[place[0]], u[place[3]])
    rows = packed.seed_row.tolist()
    assert [packed.seeds[rows[place[i]]] for i in range(6)] == [4, 4, 4, 9, 9, 9]


def test_weights_start_as_torchs_linear_does():
    layers = ModelConfig((10, 300)).layers((64,), 10)
    for u, inputs in zip(rng.initial_controls(0, layers), (64, 10, 300), strict=True):
        bound = 1 / np.sqrt(inputs)
        assert np.abs(u).max() <= bound
        assert abs(u.std() - bound / np.sqrt(3)) < 0.05 * bound


def test_streams_do_not_meet_at_large_seeds():
    """A seed above 2**32 has two words, which must not be read as a smaller seed with a stream behind it."""
    low, batches, weights = 5, rng.Stream.BATCHES, rng.Stream.WEIGHTS
    keys = [
        (seed, stream, *epoch)
        for seed in (low, low + 2**32, low + 2**33)
        for stream, epoch in (
            (weights, ()),
            (weights, (0,)),
            (batches, ()),
            (batches, (0,)),
            (batches, (1,)),
            (batches, (2**32,)),
        )
    ]
    draws = {rng.generator(*key).bytes(16) for key in keys}
    assert len(draws) == len(keys)


def test_what_a_seed_draws_is_fixed_for_good():
    """A change here is a change of `ddpnopt.NUMERICS_VERSION`."""
    u = rng.initial_controls(7, ModelConfig((2,)).layers((3,), 2))
    assert hashlib.sha256(b"".join(layer.tobytes() for layer in u)).hexdigest()[:16] == "a422e881e17f42d8"
    order = rng.epoch_batches(7, 1, 60, 16)
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == "255f894e387caa49"


# --- events, curves, metrics ---


@pytest.mark.parametrize(
    ("steps", "every", "points"),
    [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8]), (3, 1, [0, 1, 2, 3]), (3, 100, [0, 3]), (1, 1, [0, 1])],
)
def test_points_of_the_curves(steps, every, points):
    runs = [run(sgd(), steps=steps, eval_every=every), run(ddpnopt(), steps=steps, eval_every=every)]
    *progress, finished = train(runs, DATA)
    assert progress == [Progress(step, steps, 2) for step in points]
    assert isinstance(finished, Finished)
    for result in finished.results:
        assert (result.steps, result.curve_steps.tolist()) == (steps, points)
        assert set(result.curves) == set(result.metrics) == set(METRICS)
        for name, curve in result.curves.items():
            assert curve.dtype == np.float32
            assert curve[-1] == np.float32(result.metrics[name])


def test_metrics_are_those_of_a_plain_evaluation():
    """On more samples than are evaluated at once, with an odd rest."""
    data = load("digits")
    assert len(data.train_targets) % EVAL_CHUNK > 0
    runs = [
        run(optimizer, dataset="digits", steps=20, eval_every=5) for optimizer in (sgd(0.3), ddpnopt(0.3))
    ]
    trainer = Trainer(runs, data, CPU)
    for _ in updates(trainer, 20):
        pass
    trainer.take_metrics()
    for result in trainer.results():
        own = trainer.controls_of(result.index)
        for part, names in (("train", METRICS[:2]), ("test", METRICS[2:])):
            x = torch.from_numpy(getattr(data, f"{part}_inputs"))
            y = torch.from_numpy(getattr(data, f"{part}_targets"))
            logits = plain_logits(own, x)
            loss = float(nn.functional.cross_entropy(logits, y))
            accuracy = 100 * float((logits.argmax(-1) == y).double().mean())
            assert result.metrics[names[0]] == pytest.approx(loss, rel=1e-12)
            assert result.metrics[names[1]] == pytest.approx(accuracy, rel=1e-12)


def test_the_digest_is_of_the_final_weights():
    runs = [run(sgd()), run(sgd(0.2)), run(sgd(), 1), run(sgd(), steps=10)]
    digests = [result.weights_digest for result in results(runs, DATA)]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    trainer = Trainer(runs[:1], DATA, CPU)
    for _ in updates(trainer, 10):
        pass
    weights = b"".join(u.numpy().tobytes() for u in trainer.controls_of(0))
    assert digests[0] == hashlib.sha256(weights).hexdigest()


# --- what is refused ---


@pytest.mark.parametrize(
    ("runs", "field"),
    [
        ([], "runs"),
        ([run(sgd()), run(sgd(), hidden=(6, 5))], "runs"),
        ([run(sgd()), run(sgd(), activation="relu")], "runs"),
        ([run(sgd()), run(sgd(), steps=11)], "runs"),
        ([run(sgd()), run(sgd(), dtype="float32")], "runs"),
        ([run(sgd()), run(sgd(), dataset="wine")], "runs"),
        ([run(sgd(), batch_size=61)], "training.batch_size"),
    ],
    ids=["none", "widths", "activation", "training", "dtype", "dataset", "batch"],
)
def test_runs_that_cannot_be_a_pack_are_refused(runs, field):
    with pytest.raises(ConfigError) as caught:
        results(runs, DATA)
    assert caught.value.field == field


def test_a_batch_may_be_the_whole_training_set():
    (result,) = results([run(sgd(), batch_size=60)], DATA)
    assert result.state == "completed"
