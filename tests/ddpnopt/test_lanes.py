"""Lanes against tensors: two programs for the same mathematics, of which the tensor path is the oracle.

That a run's bits are its own in either path is for `test_pack.py`, which trains everything both ways.

Tolerances. The paths add up in different orders and have elementary functions of their own, each a few units
in the last place off. In float64 that makes some 1e-13 of the largest weight after a few steps, in float32
some 2e-7. What amplifies roundings takes more: steps of RMSprop and Adam divide by sqrt(v) + 1e-8, which is
small where a gradient is, and (I + S V_hh)⁻¹ is solved with pivots by one path and without by the other.
`CLOSE` and `CLOSE_IN_FLOAT32` have room for these. A run that is about to diverge amplifies without bounds:
of such nothing is compared but when and by what it leaves.
"""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from ddpnopt.config import (
    MAX_DEPTH,
    BaselineOptions,
    FeedbackConfig,
    LayerShape,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from ddpnopt.datasets.load import Dataset
from ddpnopt.lanes import library as library_module
from ddpnopt.lanes import rules
from ddpnopt.lanes.library import library
from ddpnopt.lanes.program import block_key
from ddpnopt.pack import engine, rng
from ddpnopt.pack.engine import Trainer, train
from ddpnopt.pack.lanes import LanePart
from ddpnopt.pack.tensors import TensorPart
from ddpnopt.results import METRICS, Finished, Progress, RunResult
from tests.ddpnopt.problems import (
    CONVENTIONS,
    FEEDBACKS,
    FORMS,
    PARTNERS,
    SAFEGUARDS,
    assert_close,
    baseline,
    bits,
    ddpnopt,
    run,
    sgd,
    toy,
    updates,
)
from tests.ddpnopt.test_imports import python
from tests.ddpnopt.test_pack import plain_logits, poison

CLOSE = 1e-9
CLOSE_IN_FLOAT32 = 3e-6
CPU = torch.device("cpu")


@pytest.fixture
def kernel() -> None:
    if library("float32") is None or library("float64") is None:
        pytest.skip("no C compiler")


needs_kernel = pytest.mark.usefixtures("kernel")


@cache
def data(features: int = 5, classes: int = 3) -> Dataset:
    return toy(features=features, classes=classes)


def timed(one: RunConfig, **changes: Any) -> RunConfig:
    return replace(one, training=replace(one.training, **changes))


def layers_of(one: RunConfig, of: Dataset) -> tuple[LayerShape, ...]:
    return one.model.layers(of.shape, int(of.train_targets.max()) + 1)


def trained(runs: Sequence[RunConfig], of: Dataset, steps: int, **how: Any) -> Trainer:
    trainer = Trainer(runs, of, CPU, **how)
    trainer.advance(steps)
    return trainer


def both_ways(runs: Sequence[RunConfig], of: Dataset, steps: int) -> tuple[Trainer, Trainer]:
    """Train in lanes, all of them, and as tensors."""
    fast, plain = (Trainer(runs, of, CPU, lanes=lanes) for lanes in (True, False))
    assert [type(part) for part in fast.parts] == [LanePart]
    assert [type(part) for part in plain.parts] == [TensorPart]
    for trainer in (fast, plain):
        trainer.advance(steps)
    return fast, plain


def left(trainer: Trainer) -> dict[int, tuple[int, str]]:
    """When each run left the finite numbers, and by which quantity."""
    return {place: (found.step, found.quantity) for place, found in trainer.diverged.items()}


def largest(trainer: Trainer, place: int) -> float:
    return max(float(u.abs().max()) for u in trainer.controls_of(place))


def assert_same_weights(fast: Trainer, plain: Trainer, place: int, relative: float) -> None:
    one = fast.runs[place]
    pairs = zip(fast.controls_of(place), plain.controls_of(place), strict=True)
    for t, (actual, expected) in enumerate(pairs):
        assert_close(actual, expected, relative, f"u of layer {t} of run {place}, {one}")


def by_train(runs: Sequence[RunConfig], of: Dataset, *, lanes: bool) -> tuple[RunResult, ...]:
    """What `train` makes of runs, in lanes or as tensors."""
    with pytest.MonkeyPatch.context() as patch:
        if not lanes:
            patch.setattr(engine, "library", lambda dtype: None)
        return finished(train(runs, of))


def finished(events: Iterator[Any]) -> tuple[RunResult, ...]:
    (end,) = [event for event in events if isinstance(event, Finished)]
    return end.results


def all_bits(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    return [bits(result) for result in results]


# --- the same mathematics, in float64 ---

SCALES = (1.0, 0.5, 2.0)
KINDS: dict[str, FeedbackConfig | None] = {
    "baseline": None,
    "feedback off": FeedbackConfig(feedback=False),
    "second order, feedback off": FeedbackConfig(feedback=False, dynamics="second_order"),
    **{name: replace(f, curvature_scale=SCALES[i % 3]) for i, (name, f) in enumerate(FEEDBACKS.items())},
}
NUMBERS: dict[str, tuple[dict[str, Any], ...]] = {
    "sgd": (
        {},
        {"weight_decay": 0.05},
        {"momentum": 0.9},
        {"momentum": 0.5, "weight_decay": 0.01},
    ),
    "rmsprop": (
        {},
        {"weight_decay": 0.05, "rho": 0.9},
        {"momentum": 0.9, "second_moment": "per_sample"},
        {"momentum": 0.5, "weight_decay": 0.01, "second_moment": "per_sample", "eps": 1e-4},
    ),
    "adam": (
        {},
        {"weight_decay": 0.05, "betas": (0.5, 0.9)},
        {"second_moment": "per_sample"},
        {"weight_decay": 0.01, "second_moment": "per_sample", "eps": 1e-4},
    ),
}
RATES = {"sgd": 0.02, "rmsprop": 2e-3, "adam": 2e-3}


def optimizer_of(name: str, kind: str, numbers: int, vxx_reg: float) -> OptimizerConfig:
    options = BaselineOptions(**NUMBERS[name][numbers])
    if (feedback := KINDS[kind]) is None:
        return OptimizerConfig(name, "baseline", RATES[name], options=options)
    return OptimizerConfig(name, "ddpnopt", RATES[name], vxx_reg, feedback, options)


def every_kind(first: int) -> list[OptimizerConfig]:
    """M, form of V_xx, convention and safeguard in all combinations; their numbers and ε take turns."""
    return [
        optimizer_of(name, kind, (first + i) % 4, (1e-2, 0.0)[(first + i // 4) % 2])
        for name in rules.PRECONDITIONERS
        for i, kind in enumerate(KINDS)
    ]


CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    # What the model and the training are, features, classes. Widths are no multiples of a tile's sides.
    "tanh": ({"hidden": (7, 5)}, 5, 3),
    "ten classes, wide": ({"hidden": (33, 17), "batch_size": 20}, 33, 10),
    "relu, a layer of one": ({"hidden": (9, 1, 5), "activation": "relu", "batch_size": 3}, 5, 3),
    "sigmoid, mse": ({"hidden": (5, 9, 2), "activation": "sigmoid", "loss": "mse", "batch_size": 7}, 5, 3),
    "leaky relu, mmc": (
        {"hidden": (9, 11), "activation": "leaky_relu", "loss": "mmc", "batch_size": 6},
        5,
        3,
    ),
    "identity": ({"hidden": (6, 7), "activation": "identity", "loss": "mse"}, 5, 3),
    "no hidden layer": ({"hidden": (), "batch_size": 8}, 5, 3),
    "no hidden layer, tanh of the output": ({"hidden": (), "output": "tanh", "loss": "mse"}, 5, 3),
    "sigmoid of the output": ({"hidden": (6,), "output": "sigmoid"}, 5, 3),
    "relu of the output": ({"hidden": (7,), "output": "relu", "loss": "mse"}, 5, 3),
    "leaky relu of the output, mmc": ({"hidden": (7,), "output": "leaky_relu", "loss": "mmc"}, 5, 3),
    "tanh of the output, mmc": (
        {"hidden": (3, 3), "activation": "leaky_relu", "output": "tanh", "loss": "mmc"},
        5,
        3,
    ),
    "batch of one": ({"hidden": (7, 6), "batch_size": 1}, 5, 3),
    "all of it one wide": ({"hidden": (1, 1, 1), "batch_size": 5}, 1, 2),
    "the whole training set": ({"hidden": (4,), "batch_size": 60}, 5, 3),
    "twelve layers": ({"hidden": (3,) * 12, "batch_size": 4}, 5, 3),
}


def cases(name: str) -> tuple[Callable[[OptimizerConfig], RunConfig], Dataset]:
    changes, features, classes = CASES[name]
    changes = dict(changes)
    output = changes.pop("output", "identity")

    def make(optimizer: OptimizerConfig) -> RunConfig:
        one = run(optimizer, **changes)
        return replace(one, model=replace(one.model, output=output))

    return make, data(features, classes)


def assert_paths_agree(runs: Sequence[RunConfig], of: Dataset, steps: int = 6) -> None:
    fast, plain = both_ways(runs, of, steps)
    assert fast.diverged == plain.diverged == {}
    for place in range(len(runs)):
        # A case in which a run blows up would say nothing.
        assert largest(plain, place) < 100, runs[place]
        assert_same_weights(fast, plain, place, CLOSE)


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_lanes_do_what_tensors_do(name):
    """Six steps, in which epochs end; batches, seeds and numbers differ within a pack."""
    make, of = cases(name)
    first = list(CASES).index(name)
    runs = [replace(make(o), seed=i % 3) for i, o in enumerate(every_kind(first))]
    assert_paths_agree(runs, of)


@needs_kernel
def test_lanes_do_what_tensors_do_with_all_numbers():
    make, of = cases("tanh")
    optimizers = [
        optimizer_of(name, kind, numbers, vxx_reg)
        for name in rules.PRECONDITIONERS
        for kind in KINDS
        for numbers, vxx_reg in zip(range(4), (0.0, 1e-2, 0.0, 1e-1), strict=True)
    ]
    assert_paths_agree([make(optimizer) for optimizer in optimizers], of)


@needs_kernel
def test_the_deepest_net_there_is():
    """Its layers pass everything on, so that a number that is lost in the first is missed in the last."""
    eye = torch.eye(3, dtype=torch.float64)
    layer = torch.cat((eye, torch.full((3, 1), 0.1, dtype=torch.float64)), dim=1)
    optimizers = [
        baseline("sgd", 0.01),
        ddpnopt(0.01),
        ddpnopt(0.01, terminal_hessian="gauss_newton"),
        baseline("adam", 0.01),
    ]
    runs = [
        run(o, hidden=(3,) * MAX_DEPTH, activation="leaky_relu", batch_size=4, eval_every=1)
        for o in optimizers
    ]
    paths = [Trainer(runs, data(3), CPU, lanes=lanes) for lanes in (True, False)]
    for trainer in paths:
        for place in range(len(runs)):
            trainer.set_controls_of(place, [layer] * (MAX_DEPTH + 1))
        trainer.advance(3)
    for place in range(len(runs)):
        assert_same_weights(*paths, place, CLOSE)


ACTIVATIONS = st.sampled_from(rules.ACTIVATIONS)


@st.composite
def optimizers_of_lanes(draw: st.DrawFn) -> OptimizerConfig:
    name = draw(st.sampled_from(rules.PRECONDITIONERS))
    options: dict[str, Any] = {"weight_decay": draw(st.sampled_from((0.0, 0.003, 0.1)))}
    if name != "adam":
        options["momentum"] = draw(st.sampled_from((0.0, 0.3, 0.9)))
    if name != "sgd":
        options["second_moment"] = draw(st.sampled_from(("batch", "per_sample")))
        options["eps"] = draw(st.sampled_from((1e-8, 1e-5)))
    rate = RATES[name] * draw(st.sampled_from((0.3, 1.0, 3.0)))
    if draw(st.integers(0, 4)) == 0:
        return OptimizerConfig(name, "baseline", rate, options=BaselineOptions(**options))
    feedback = FeedbackConfig(
        **FORMS[draw(st.sampled_from(sorted(FORMS)))],
        convention=draw(st.sampled_from(CONVENTIONS)),
        safeguard=draw(st.sampled_from(SAFEGUARDS)),
        curvature_scale=draw(st.sampled_from((0.0, 0.3, 1.0, 2.0))),
        feedback=draw(st.integers(0, 7)) > 0,
    )
    vxx_reg = draw(st.sampled_from((0.0, 1e-3, 0.1)))
    return OptimizerConfig(name, "ddpnopt", rate, vxx_reg, feedback, BaselineOptions(**options))


@st.composite
def packs_of_lanes(draw: st.DrawFn) -> tuple[list[RunConfig], Dataset]:
    features, classes = draw(st.sampled_from((1, 3, 5, 16))), draw(st.sampled_from((2, 3, 7)))
    changes = {
        "hidden": tuple(draw(st.lists(st.integers(1, 13), max_size=4))),
        "activation": draw(ACTIVATIONS),
        "loss": draw(st.sampled_from(rules.LOSSES)),
        "batch_size": draw(st.sampled_from((1, 2, 5, 16, 60))),
    }
    output = draw(st.one_of(st.just("identity"), ACTIVATIONS))
    chosen = draw(st.lists(optimizers_of_lanes(), min_size=1, max_size=8))
    runs = [run(optimizer, seed=i % 2, **changes) for i, optimizer in enumerate(chosen)]
    return [replace(one, model=replace(one.model, output=output)) for one in runs], data(features, classes)


@needs_kernel
@given(pack=packs_of_lanes())
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking would take minutes
    suppress_health_check=(HealthCheck.function_scoped_fixture,),
)
def test_any_run_in_lanes_does_what_it_does_as_tensors(pack):
    runs, of = pack
    fast, plain = both_ways(runs, of, 5)
    for place in range(len(runs)):
        # One that is about to blow up amplifies roundings without bounds.
        if place not in plain.diverged and largest(plain, place) < 10:
            assert place not in fast.diverged, runs[place]
            assert_same_weights(fast, plain, place, CLOSE)


# --- in float32 ---


@needs_kernel
@pytest.mark.parametrize("activation", rules.ACTIVATIONS)
def test_in_float32_ten_steps_of_sgd_and_its_partners_are_close(activation):
    optimizers = [
        sgd(),
        baseline("sgd", momentum=0.9, weight_decay=0.01),
        *(
            ddpnopt(0.1, reg, options)
            for reg, options in zip((1e-3, 0.0) * 6, FEEDBACKS.values(), strict=True)
        ),
    ]
    shape = {"hidden": (10, 10), "activation": activation, "dtype": "float32"}
    runs = [run(optimizer, seed, **shape) for seed in range(3) for optimizer in optimizers]
    fast, plain = both_ways(runs, data(33), 10)
    assert fast.diverged == plain.diverged == {}
    for place in range(len(runs)):
        assert_same_weights(fast, plain, place, CLOSE_IN_FLOAT32)


# --- metrics ---

MEASURED = [
    *(
        optimizer_of(name, kind, 3, 1e-3)
        for name in rules.PRECONDITIONERS
        for kind in ("baseline", "exact_full-batch_mean-clamp", "gn_outer_product-per_sample-psd")
    ),
    baseline("kfac", 0.05),  # trained as tensors, measured in lanes
]


@needs_kernel
@pytest.mark.parametrize("train_metrics", ["full", "running"])
@pytest.mark.parametrize("loss", rules.LOSSES)
def test_metrics_agree(loss, train_metrics):
    runs = [
        timed(run(optimizer, i % 3, loss=loss), train_metrics=train_metrics, test_every=8)
        for i, optimizer in enumerate(MEASURED)
    ]
    fast, plain = (by_train(runs, data(), lanes=lanes) for lanes in (True, False))
    for actual, expected in zip(fast, plain, strict=True):
        assert actual.state == expected.state == "completed"
        points = [0, 4, 8, 10] if train_metrics == "full" else [4, 8, 10]
        assert actual.curve_steps.tolist() == expected.curve_steps.tolist() == points
        assert actual.test_steps.tolist() == expected.test_steps.tolist() == [0, 8, 10]
        for name in METRICS:
            assert actual.metrics[name] == pytest.approx(expected.metrics[name], rel=CLOSE)
            assert actual.curves[name] == pytest.approx(expected.curves[name], rel=1e-6)


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
def test_running_metrics_are_means_over_the_batches_since_the_last_point(lanes):
    """Each batch by the weights before its update. Looking at the metrics in between changes nothing."""
    runs = [
        timed(run(optimizer, seed), train_metrics="running")
        for seed, optimizer in enumerate((sgd(0.3), ddpnopt(0.3), baseline("adam", 0.02)))
    ]
    trainer = Trainer(runs, data(), CPU, lanes=lanes)
    losses, rights = np.zeros((2, len(runs), 10))
    trainer.take_metrics()
    for update in range(10):
        for place, one in enumerate(runs):
            rows = rng.epoch_batches(one.seed, update // 3, 60, 16)[update % 3]
            logits = plain_logits(trainer.controls_of(place), torch.from_numpy(data().train_inputs[rows]))
            targets = torch.from_numpy(data().train_targets[rows])
            losses[place, update] = float(nn.functional.cross_entropy(logits, targets))
            rights[place, update] = float((logits.argmax(-1) == targets).double().mean())
        trainer.advance(update + 1)
        trainer.take_metrics()
    for result in trainer.results():
        assert result.curve_steps.tolist() == [4, 8, 10]
        assert result.test_steps.tolist() == [0, 4, 8, 10]
        for name, per_batch in (
            ("train_loss", losses[result.index]),
            ("train_accuracy", 100 * rights[result.index]),
        ):
            means = [per_batch[:4].mean(), per_batch[4:8].mean(), per_batch[8:].mean()]
            assert result.metrics[name] == pytest.approx(means[-1], rel=CLOSE)
            assert result.curves[name].tolist() == pytest.approx(means, rel=1e-6)


# --- who leaves, and by what ---

WILD_OPTIMIZERS = [
    *(baseline(name, 1.0, **options) for name in rules.PRECONDITIONERS for options in NUMBERS[name][::3]),
    # Not psd: (I + S V_hh)⁻¹ of a matrix that is singular but for its last digit is made of roundings.
    *(
        OptimizerConfig(name, "ddpnopt", 1.0, 1e-3, options)
        for name in rules.PRECONDITIONERS
        for options in FEEDBACKS.values()
        if options.safeguard == "clamp"
    ),
]
WILD_RATES = {"float32": (1e3, 1e10, 1e20, 3e38), "float64": (1e10, 1e100, 1e200, 1e308)}


@needs_kernel
@pytest.mark.parametrize("dtype", WILD_RATES)
@pytest.mark.parametrize(
    ("activation", "loss"), [("tanh", "cross_entropy"), ("relu", "mse"), ("identity", "mmc")]
)
def test_both_paths_say_the_same_of_a_run_that_diverges(activation, loss, dtype):
    shape = {"hidden": (4, 3), "activation": activation, "loss": loss, "dtype": dtype}
    runs = [
        run(replace(optimizer, learning_rate=rate), **shape)
        for optimizer, rate in product(WILD_OPTIMIZERS, WILD_RATES[dtype])
    ]
    fast, plain = both_ways(runs, data(), 10)
    assert left(fast) == left(plain)
    # It is not always the same that blows up first.
    assert len({quantity for _, quantity in left(plain).values()}) >= 5
    for place, expected in plain.diverged.items():
        actual = fast.diverged[place].last_finite
        assert (actual is None) == (expected.last_finite is None)
        assert actual is None or actual == pytest.approx(expected.last_finite, rel=1e-3), runs[place]


POISONS = (np.nan, -np.inf, 1e160)


@needs_kernel
@pytest.mark.parametrize("layer", [0, 2])
def test_both_paths_say_the_same_of_a_poisoned_run(layer):
    """A number in a bias after three steps: what is not finite next depends on number and optimizer."""
    optimizers = every_kind(0)
    runs = [run(optimizer, activation="leaky_relu") for optimizer in optimizers for _ in POISONS]
    paths = [trained(runs, data(), 3, lanes=lanes) for lanes in (True, False)]
    for trainer in paths:
        for place in range(len(runs)):
            controls = trainer.controls_of(place)
            controls[layer][1, -1] = POISONS[place % len(POISONS)]
            trainer.set_controls_of(place, controls)
        trainer.advance(6)
    assert left(paths[0]) == left(paths[1])
    found = left(paths[0])
    assert all(found[place] == (4, "batch_loss") for place in range(0, len(runs), len(POISONS)))
    assert len({quantity for _, quantity in found.values()}) >= 3


def lane_part(trainer: Trainer) -> LanePart:
    (part,) = trainer.parts
    assert isinstance(part, LanePart)
    return part


@needs_kernel
def test_who_left_is_gone_and_who_stays_moves_together():
    """More runs of one program than fit a block, of which most leave at two steps."""
    runs = [run(replace(baseline("adam"), learning_rate=1e-3 * (i + 1)), i % 3) for i in range(40)]
    leaving = {
        3: [0, 5, 17, 18, 39],
        6: [place for place in range(40) if place % 4 == 1 and place != 5 and place != 17],
    }
    gone = {place for places in leaving.values() for place in places}
    trainer, untouched = (Trainer(runs, data(), CPU) for _ in range(2))
    for step in updates(trainer, 10):
        for place in leaving.get(step, ()):
            poison(trainer, place, np.nan)
        part = lane_part(trainer)
        left_before = {place for at, places in leaving.items() if at < step for place in places}
        assert sorted(part.index) == [place for place in range(40) if place not in left_before]
        (blocks,) = part._blocks
        assert blocks.size == len(part.index) == len(blocks.state("u")) == len(blocks.state("moment1"))
        lanes = blocks.compiled.library.lanes
        assert len(blocks._blocks) == -(-blocks.size // lanes)
    untouched.advance(10)
    for each in (trainer, untouched):
        each.take_metrics()
    found, expected = all_bits(trainer.results()), all_bits(untouched.results())
    for place in range(40):
        if place in gone:
            step = next(step for step, places in leaving.items() if place in places)
            assert left(trainer)[place] == (step + 1, "batch_loss")
        else:
            assert found[place] == expected[place]


@needs_kernel
def test_programs_and_parts_without_members_are_gone():
    runs = [run(sgd()), run(ddpnopt()), run(ddpnopt(), 1), run(baseline("kfac"))]
    trainer = trained(runs, data(), 3)
    lanes, tensors = trainer.parts
    assert isinstance(lanes, LanePart)
    assert len(lanes._blocks) == 2
    trainer.cancel([0])
    assert [blocks.size for blocks in lanes._blocks] == [2]
    trainer.cancel([1, 2])
    assert trainer.parts == [tensors]
    trainer.cancel([3])
    assert (trainer.parts, trainer.active) == ([], 0)
    trainer.advance(10)
    assert trainer.step == 3


CANCELLED = [
    *(run(optimizer, seed) for seed in (0, 1) for optimizer in (sgd(), ddpnopt(), baseline("adam", 0.01))),
    run(ddpnopt(1e200)),  # leaves by itself
    run(baseline("kfac"), 1),
    run(PARTNERS["ekfac-outer_product"], 1),
]
DIVERGING = 6


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
def test_runs_that_are_told_to_go_leave_the_others_alone(lanes, monkeypatch):
    if not lanes:
        monkeypatch.setattr(engine, "library", lambda dtype: None)
    everyone = finished(train(CANCELLED, data()))
    leave = {4: {0, 2, 7}, 8: {1, 2, DIVERGING, 99}}
    asked = []

    def leaving(step: int) -> set[int]:
        asked.append(step)
        return leave.get(step, set())

    *progress, end = train(CANCELLED, data(), leaving=leaving)
    assert asked == [0, 4, 8]
    assert progress == [Progress(step, 10, active) for step, active in ((0, 9), (4, 5), (8, 4), (10, 4))]
    assert isinstance(end, Finished)
    for result, whole in zip(end.results, everyone, strict=True):
        step = next((step for step, places in leave.items() if result.index in places), None)
        if step is None or result.index == DIVERGING:
            assert bits(result) == bits(whole)
            continue
        assert (result.state, result.steps, result.metrics, result.weights_digest) == (
            "cancelled",
            step,
            {},
            "",
        )
        assert result.divergence is None
        points = step // 4 + 1
        assert result.curve_steps.tolist() == result.test_steps.tolist() == [0, 4, 8][:points]
        for name in METRICS:
            assert result.curves[name].tolist() == whole.curves[name][:points].tolist()
    assert everyone[DIVERGING].state == "diverged"


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
def test_a_pack_that_all_have_left_ends(lanes, monkeypatch):
    if not lanes:
        monkeypatch.setattr(engine, "library", lambda dtype: None)
    *progress, end = train(CANCELLED, data(), leaving=lambda step: range(9) if step == 4 else ())
    assert [(event.step, event.active) for event in progress] == [(0, 9), (4, 0)]
    assert [result.state for result in end.results].count("cancelled") == 8
    assert end.results[DIVERGING].state == "diverged"


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
def test_a_run_can_leave_between_two_points(lanes):
    trainer, whole = (Trainer(CANCELLED, data(), CPU, lanes=lanes) for _ in range(2))
    for step in updates(trainer, 10):
        if step == 5:
            trainer.cancel([3, 8])
        trainer.take_metrics()
    for _ in updates(whole, 10):
        whole.take_metrics()
    found, expected = trainer.results(), whole.results()
    for place, (result, other) in enumerate(zip(found, expected, strict=True)):
        if place in (3, 8):
            assert (result.state, result.steps, result.curve_steps.tolist()) == ("cancelled", 5, [4])
        else:
            assert bits(result) == bits(other)


# --- what does not matter ---

ONCE = {"dtype": "float32", "eval_every": 10}  # nothing but epochs interrupts the updates
MANY = [
    run(replace(optimizer, learning_rate=optimizer.learning_rate * (1 + i / 10)), i % 4, **ONCE)
    for i in range(20)
    for optimizer in (sgd(), ddpnopt(), ddpnopt(terminal_hessian="gauss_newton"), baseline("adam", 0.01))
]
MANY[7:7] = [run(ddpnopt(rate), **ONCE) for rate in (1e10, 1e30)]


@cache
def many(lanes: bool) -> list[dict[str, Any]]:
    return all_bits(by_points(Trainer(MANY, data(), CPU, lanes=lanes, threads=1)))


def by_points(trainer: Trainer, *, every: int = 10) -> tuple[RunResult, ...]:
    """Train to the end, so many updates at a time, with a stop at every point of the curves."""
    for point in trainer.training.points():
        while trainer.step < point:
            trainer.advance(min(point, trainer.step + every))
        trainer.take_metrics()
    return trainer.results()


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    trainer = Trainer(MANY, data(), CPU, threads=threads)
    assert {blocks.threads for blocks in lane_part(trainer)._blocks} == {threads}
    assert max(len(blocks._blocks) for blocks in lane_part(trainer)._blocks) > 1
    assert all_bits(by_points(trainer)) == many(lanes=True)
    assert {"completed", "diverged"} == {result.state for result in trainer.results()}


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_how_updates_are_cut_changes_no_bit(every, lanes):
    trainer = Trainer(MANY, data(), CPU, lanes=lanes)
    assert all_bits(by_points(trainer, every=every)) == many(lanes)


def own_numbers() -> list[RunConfig]:
    found = []
    for i, (decay, momentum) in enumerate(product((0.0, 1e-3, 0.1), (0.0, 0.3, 0.9))):
        both = BaselineOptions(weight_decay=decay, momentum=momentum)
        scaled = replace(both, second_moment="per_sample")
        found += [
            run(OptimizerConfig("sgd", "baseline", 0.1, options=both), i % 2),
            run(OptimizerConfig("rmsprop", "baseline", 0.01, options=scaled), i % 2),
            *(
                run(OptimizerConfig(name, "ddpnopt", rate, 1e-3, FeedbackConfig(hessian), options), i % 2)
                for name, rate, options in (("sgd", 0.1, both), ("rmsprop", 0.01, scaled))
                for hessian in ("exact", "gauss_newton")
            ),
            run(OptimizerConfig("adam", "baseline", 0.01, options=BaselineOptions(weight_decay=decay)), i),
        ]
    return found


@needs_kernel
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "tensors"])
def test_weight_decay_and_momentum_are_each_runs_own(lanes):
    runs = [timed(replace(one, dtype="float32"), eval_every=10) for one in own_numbers()]
    packed = by_train(runs, data(), lanes=lanes)
    assert len({result.weights_digest for result in packed}) == len(runs)
    for one, result in zip(runs, packed, strict=True):
        (alone,) = by_train([one], data(), lanes=lanes)
        assert bits(result) == bits(alone), one


# --- which runs train in lanes ---

TAKEN = {
    **{name: baseline(name) for name in rules.PRECONDITIONERS},
    **{
        f"{name}, {kind}": optimizer_of(name, kind, 3, 0.0)
        for name in rules.PRECONDITIONERS
        for kind in KINDS
    },
}
REFUSED_OPTIMIZERS = {
    **{name: baseline(name) for name in ("kfac", "ekfac", "emsa", "vanilla_ddp", "sgd_vgr")},
    **{name: PARTNERS[name] for name in PARTNERS if name.startswith(("kfac", "ekfac"))},
    **{name: PARTNERS[name] for name in PARTNERS if name.endswith("second_order")},
}
MODELS: dict[str, dict[str, Any]] = {
    **{activation: {"activation": activation} for activation in rules.ACTIVATIONS},
    "gelu": {"activation": "gelu"},
    "cnn": {"kind": "cnn", "channels": (2,)},
}


@pytest.mark.parametrize("name", TAKEN)
def test_first_order_with_a_diagonal_preconditioner_trains_in_lanes(name):
    one = run(TAKEN[name])
    assert rules.trains(one, layers_of(one, data()))


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_other_optimizers_do_not(name):
    one = run(REFUSED_OPTIMIZERS[name])
    assert rules.measures(one.model, layers_of(one, data()))
    assert not rules.trains(one, layers_of(one, data()))


@pytest.mark.parametrize("name", MODELS)
def test_nets_of_lanes(name):
    one, of = run(sgd(), **MODELS[name]), toy(features=16, shape=(1, 4, 4))
    known = name in rules.ACTIVATIONS
    assert rules.measures(one.model, layers_of(one, of)) == known
    assert rules.trains(one, layers_of(one, of)) == known
    ending = replace(one, model=ModelConfig((4,), output=MODELS[name].get("activation", "gelu")))
    assert rules.trains(ending, layers_of(ending, of)) == known


@pytest.mark.parametrize(("more", "taken"), [(0, True), (1, False)])
def test_nets_of_lanes_are_small(more, taken):
    size = rules.MAX_CONTROLS - 1 + more
    shapes = (LayerShape(outputs=1, inputs=size, positions=1, state=size),)
    assert rules.measures(run(sgd()).model, shapes) == taken
    assert rules.trains(run(sgd()), shapes) == taken


@needs_kernel
def test_the_engine_goes_by_the_rules():
    optimizers = [*REFUSED_OPTIMIZERS.values(), *TAKEN.values()]
    trainer = Trainer([run(optimizer) for optimizer in optimizers], data(), CPU)
    fast, slow = trainer.parts
    assert (type(fast), type(slow)) == (LanePart, TensorPart)
    assert sorted(slow.index) == list(range(len(REFUSED_OPTIMIZERS)))
    assert sorted(fast.index) == list(range(len(REFUSED_OPTIMIZERS), len(optimizers)))


def test_runs_of_a_block_differ_in_numbers_alone():
    """Whether a number is zero is no such difference: what is zero is not computed."""
    alike = [ddpnopt(0.1, 1e-3), ddpnopt(0.4, 1e-2), ddpnopt(0.1, 1e-3, curvature_scale=0.5)]
    assert len({block_key(optimizer) for optimizer in alike}) == 1
    apart = [
        sgd(),
        baseline("sgd", momentum=0.9),
        baseline("sgd", weight_decay=0.1),
        baseline("rmsprop"),
        baseline("rmsprop", second_moment="per_sample"),
        ddpnopt(0.1, 0.0),
        ddpnopt(0.1, 1e-3),
        *(
            ddpnopt(0.1, 1e-2, options)
            for name, options in FEEDBACKS.items()
            if name != "exact_full-batch_mean-clamp"
        ),
        ddpnopt(0.1, 1e-3, feedback=False),
    ]
    assert len({block_key(optimizer) for optimizer in apart}) == len(apart)


def test_a_planner_knows_without_torch():
    program = (
        "import sys\n"
        "from ddpnopt.lanes import rules\n"
        "from ddpnopt.config import ModelConfig\n"
        "model = ModelConfig((4,))\n"
        "assert rules.measures(model, model.layers((5,), 3))\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = python("torch,ray,fastapi,sqlalchemy,sklearn,pydantic", program)
    assert done.returncode == 0, done.stderr


# --- elementary functions ---

EXACT: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "sigmoid": lambda h: 1 / (1 + np.exp(-h)),
    "relu": lambda h: np.maximum(h, 0),
    "leaky_relu": lambda h: np.where(h > 0, h, h * 0.01),
}
NUMBER = {"float32": np.float32, "float64": np.float64}
ULPS = {"tanh": 4, "sigmoid": 4, "relu": 0, "leaky_relu": 1}


def arguments(number: type) -> np.ndarray:
    """From the smallest number there is to the largest, dense where something happens."""
    limits = np.finfo(number)
    low, high = np.log10(float(limits.smallest_subnormal)), np.log10(float(limits.max))
    ends = [float(limits.max), float(limits.smallest_subnormal), float(limits.tiny), float(limits.eps), 0.0]
    edges = np.log(float(limits.max)) + np.array([-2, -1, -0.5, 0, 0.5, 1, 2, 20])
    sizes = [*np.logspace(low, high - 0.01, 300), *np.linspace(0.01, 25, 300), *edges, *ends]
    with np.errstate(under="ignore"):
        return np.array([sign * size for size in sizes for sign in (1, -1)]).astype(number)


def one_sample(label: int = 1, classes: int = 2) -> Dataset:
    """A sample that is zero, so that biases alone speak, in as many classes."""
    inputs, targets = np.zeros((2, 1)), np.array([label, classes - 1])
    return Dataset("one", inputs, targets, inputs, targets, "none")


def activated(kind: str, h: np.ndarray) -> np.ndarray:
    """Let lanes take σ(h): SGD's first step from a read-out of zero, at rate one, leaves it there."""
    one = run(
        sgd(1.0), hidden=(len(h),), activation=kind, loss="mse", batch_size=1, dtype=str(h.dtype), steps=1
    )
    trainer = Trainer([one], one_sample(), CPU)
    assert isinstance(trainer.parts[0], LanePart)
    bias = torch.from_numpy(h).unsqueeze(1)
    read_out = bias.new_zeros(2, len(h) + 1)
    trainer.set_controls_of(0, [torch.cat((torch.zeros_like(bias), bias), dim=1), read_out])
    trainer.advance(1)
    assert not trainer.diverged
    return trainer.controls_of(0)[1][1, :-1].numpy()


@needs_kernel
@pytest.mark.parametrize("dtype", NUMBER)
@pytest.mark.parametrize("kind", EXACT)
def test_activations_are_right_to_a_few_units_in_the_last_place(kind, dtype):
    h = arguments(NUMBER[dtype])
    with np.errstate(over="ignore", under="ignore"):
        exact = EXACT[kind](h.astype(np.longdouble))
        # Below the smallest normal number there are fewer digits; the exponential ends a little above it.
        ulp = np.maximum(np.spacing(np.abs(exact).astype(NUMBER[dtype])), np.finfo(NUMBER[dtype]).tiny)
        found = activated(kind, h).astype(np.longdouble)
        off = np.abs(found - exact) / ulp
    worst = int(np.argmax(off))
    assert off[worst] <= ULPS[kind], f"{kind}({h[worst]!r}) is {found[worst]!r}, not {exact[worst]!r}"


@needs_kernel
@pytest.mark.parametrize("dtype", NUMBER)
@pytest.mark.parametrize("kind", rules.ACTIVATIONS)
def test_nan_goes_through_every_activation(kind, dtype):
    """Also where the number behind it is zero, as here, and with other numbers around it."""
    one = run(sgd(1.0), hidden=(3,), activation=kind, loss="mse", batch_size=1, dtype=dtype, steps=1)
    for place in range(3):
        trainer = Trainer([one, one], one_sample(), CPU)
        first, read_out = trainer.controls_of(0)
        first[place, -1] = torch.nan
        trainer.set_controls_of(0, [first, torch.zeros_like(read_out)])
        trainer.advance(1)
        assert {i: (d.quantity, d.kind) for i, d in trainer.diverged.items()} == {0: ("batch_loss", "nan")}


def measured(outputs: Sequence[Sequence[float]], loss: str, dtype: str, *, output: str = "identity") -> Any:
    """Loss and accuracy of nets that put out these numbers, (R, 2) by lanes and by tensors."""
    classes = len(outputs[0])
    one = run(sgd(), hidden=(), loss=loss, dtype=dtype, batch_size=1)
    one = replace(one, model=replace(one.model, output=output))
    both = []
    for lanes in (True, False):
        trainer = Trainer([one] * len(outputs), one_sample(1, classes), CPU, lanes=lanes)
        for place, biases in enumerate(outputs):
            (u,) = trainer.controls_of(place)
            u.zero_()
            u[:, -1] = torch.tensor(biases, dtype=torch.float64)
            trainer.set_controls_of(place, [u])
        both.append(trainer.parts[0].measure(trainer.train_set))
    return both


@needs_kernel
@pytest.mark.parametrize("dtype", NUMBER)
@pytest.mark.parametrize("kind", rules.ACTIVATIONS)
def test_infinite_numbers_are_activated_as_by_torch(kind, dtype):
    ends = (np.inf, -np.inf, np.nan, 1e30, -1e30)
    fast, plain = measured([(a, b) for a, b in product(ends, ends)], "mse", dtype, output=kind)
    assert torch.allclose(fast[:, 0], plain[:, 0], rtol=1e-6, atol=1e-30, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", NUMBER)
@pytest.mark.parametrize("loss", rules.LOSSES)
def test_losses_of_outputs_of_all_sizes(loss, dtype):
    sizes = (0.0, 1e-30, 1e-5, 0.3, 1.0, 20.0, 87.0, 104.0, 700.0, 1e6, 1e30)
    outputs = [(a, -b, b) for a in (*sizes, *(-size for size in sizes)) for b in sizes]
    fast, plain = measured(outputs, loss, dtype)
    close = {"float32": 1e-6, "float64": 1e-14}[dtype]
    assert torch.allclose(fast[:, 0], plain[:, 0], rtol=close, atol=close, equal_nan=True)
    assert torch.equal(fast[:, 1], plain[:, 1])
    assert bool(torch.isinf(plain).any()) == (dtype == "float32" and loss != "cross_entropy")


@needs_kernel
def test_of_equal_outputs_the_first_counts():
    outputs = [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)]
    fast, plain = measured(outputs, "cross_entropy", "float32")
    # One of the two samples has the second class and one the third.
    assert fast[:, 1].tolist() == plain[:, 1].tolist() == [0.0, 0.0, 50.0, 50.0, 0.0]


# --- the compiler ---

COMPILER = library_module._compiler()

LOAD = """
import logging
from ddpnopt.lanes.library import library
logging.basicConfig(level=logging.WARNING)
found = library("float32")
print(found.lanes, found.name, flush=True)
"""


@pytest.fixture
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own; nothing is loaded yet, and nothing of it stays loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library_module.VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library.cache_clear()
    yield tmp_path / "cache" / "ddpnopt"
    library.cache_clear()


def compiler(folder: Path, name: str, before: str = "", version: str = "") -> Path:
    """Write a compiler: the real one without its optimisations, which take long, after `before` is done.

    It keeps a line in `compiled` for every call that is no question for its version.
    """
    if COMPILER is None:
        pytest.skip("no C compiler")
    path = folder / name
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then {version or f"exec {COMPILER} --version"}; exit; fi
echo "$$" >> {folder}/compiled
{before}
for argument; do
    shift
    [ "$argument" = -O3 ] && argument=-O0
    set -- "$@" "$argument"
done
exec {COMPILER} "$@"
"""
    )
    path.chmod(stat.S_IRWXU)
    return path


def compiled(folder: Path) -> int:
    log = folder / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def load_elsewhere(cc: Path) -> subprocess.Popen[str]:
    """Load the library in another process; `LOAD` is what it does."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD],
        env=os.environ | {"CC": str(cc)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_compiles_nothing(cache_folder, tmp_path):
    cc = compiler(tmp_path, "cc")
    first, second = (answer(load_elsewhere(cc)) for _ in range(2))
    assert first == second
    assert compiled(tmp_path) == 1
    (name,) = files(cache_folder)
    assert name.startswith("lanes-float32-")
    assert stat.S_IMODE(cache_folder.stat().st_mode) == 0o700


def test_two_processes_may_compile_at_once(cache_folder, tmp_path):
    """Each waits, with nothing compiled yet, until the other has come as far."""
    together = f"""
for wait in $(seq 300); do
    [ $(wc -l < {tmp_path}/compiled) -ge 2 ] && break
    sleep 0.1
done"""
    cc = compiler(tmp_path, "cc", before=together)
    processes = [load_elsewhere(cc) for _ in range(2)]
    first, second = map(answer, processes)
    assert first == second
    assert compiled(tmp_path) == 2
    assert len(files(cache_folder)) == 1
    assert answer(load_elsewhere(cc)) == first
    assert compiled(tmp_path) == 2


def test_another_compiler_and_another_kind_of_numbers_have_files_of_their_own(
    cache_folder, tmp_path, monkeypatch
):
    names = set()
    for version in ("1.0", "2.0"):
        cc = compiler(tmp_path, f"cc-{version}", version=f"echo cc {version}")
        monkeypatch.setenv("CC", str(cc))
        for dtype in ("float32", "float64"):
            library.cache_clear()
            found = library(dtype)
            assert found is not None
            assert version in found.name
            names.add(found.name)
    assert compiled(tmp_path) == len(names) == len(files(cache_folder)) == 4


@pytest.mark.parametrize("why", ["a file is in its place", "it cannot be made", "there is no home"])
def test_without_a_cache_it_is_compiled_all_the_same(why, cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(compiler(tmp_path, "cc")))
    if why == "there is no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "file").write_text("")
        taken = tmp_path / "file" if why == "a file is in its place" else Path("/proc/nowhere")
        monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    assert library("float32") is not None
    assert compiled(tmp_path) == 1
    assert not cache_folder.exists()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_is_not_there_is_passed_over(cache_folder, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler(tmp_path, "gcc").rename(folder / "gcc")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda name: str(folder / "gcc") if name == "gcc" else None)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library("float32") is not None
    assert compiled(tmp_path) == 1


def assert_trains_as_tensors() -> None:
    runs = [run(sgd(), dtype="float32"), run(ddpnopt(), dtype="float32")]
    trainer = Trainer(runs, data(), CPU)
    assert [type(part) for part in trainer.parts] == [TensorPart]
    expected = by_points(Trainer(runs, data(), CPU, lanes=False))
    assert all_bits(by_points(trainer)) == all_bits(expected)


def test_without_a_compiler_all_is_tensors_and_a_warning_says_so(cache_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert library("float32") is None
    (record,) = caplog.records
    assert "no C compiler" in record.getMessage()
    assert_trains_as_tensors()
    assert not cache_folder.exists()


def test_lanes_can_be_switched_off(cache_folder, monkeypatch, caplog):
    monkeypatch.setenv(library_module.VARIABLE, "0")
    with caplog.at_level(logging.WARNING):
        assert library("float32") is None
    assert caplog.records == []
    assert_trains_as_tensors()
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"before": "echo vectors are sold out >&2; exit 1"}, "vectors are sold out"),
        ({"before": "kill $$"}, "cc: "),
        ({"version": "echo no licence >&2; exit 3"}, "exit status 3"),
        ({"before": "exec sleep 30"}, "timed out"),
        ({"before": 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"; exit 0'}, "lanes-float32-"),
    ],
    ids=["it says why", "it dies", "it has no version", "it hangs", "it makes rubbish"],
)
def test_a_compiler_that_fails_is_told_and_done_without(
    how, said, cache_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("CC", str(compiler(tmp_path, "cc", **how)))
    if said == "timed out":
        monkeypatch.setattr(library_module, "COMPILE_SECONDS", 1)
    with caplog.at_level(logging.WARNING):
        assert library("float32") is None
    (record,) = caplog.records
    assert "the fast path could not be compiled" in record.getMessage()
    assert said in record.getMessage()
    assert_trains_as_tensors()
    left_over = files(cache_folder) if cache_folder.exists() else []
    assert [name for name in left_over if not name.endswith(".so")] == []


def test_a_compiler_is_asked_once_in_a_process(cache_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(compiler(tmp_path, "cc")))
    assert library("float32") is library("float32")
    assert compiled(tmp_path) == 1
