"""Estimates against measurements.

Memory is measured here: every allocation of torch's CPU allocator, which is the same on every run.

Time was measured with torch 2.13, one thread: that of an update, divided by the runs of the pack (1 to 64),
of KFAC and EKFAC on an EPYC, of the others on a Xeon. The estimates that these pinned were off by factors of
0.4 to 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final, NamedTuple

import pytest

from benchmarks.memory import Case, expected, measured
from ddpnopt.config import (
    PRECONDITIONER_OF,
    BaselineOptions,
    FeedbackConfig,
    ModelConfig,
    PairedBaseline,
)
from service.sweeps import estimate
from service.sweeps.estimate import Method

FACTOR: Final = 3
WITHIN: Final = 0.25
FIG_4A = ModelConfig((10,) * 4), (64,), 16
RELU_32 = ModelConfig((32,) * 4, "relu"), (784,), 128
WIDE = ModelConfig((256, 256)), (64,), 64
SMALL_CNN = ModelConfig((16,), "relu", "cnn", (8, 8)), (1, 8, 8), 16
ZOO_CNN = ModelConfig((32,), "relu", "cnn", (32,) * 4), (1, 28, 28), 128
COLOUR_CNN = ModelConfig((32,), "relu", "cnn", (32,) * 4), (3, 32, 32), 128
Net = tuple[ModelConfig, tuple[int, ...], int]
EXACT: dict[str, Any] = {"terminal_hessian": "exact"}
GAUSS_NEWTON: dict[str, Any] = {"terminal_hessian": "gauss_newton"}
SECOND: dict[str, Any] = {"dynamics": "second_order"}
PSD: dict[str, Any] = {"safeguard": "psd"}
BASELINES: Final[tuple[PairedBaseline, ...]] = ("sgd", "rmsprop", "adam", "kfac", "ekfac")


def cases() -> Iterator[Case]:
    """Every preconditioner with every way to hold V_xx on a small net; on larger ones what differs there."""
    small, wide, images = "FCN 64-10x4-10", "FCN 64-256x2-10", "CNN 8-8-16-10 on 8x8"
    for baseline, feedback in product(
        BASELINES, (None, "outer product", "exact", "exact, psd", "2nd order", "2nd order, psd", "off")
    ):
        yield Case(small, baseline, feedback, runs=8)
    for baseline, feedback in product(BASELINES, (None, "outer product")):
        yield Case(images, baseline, feedback, runs=2)
        yield Case(wide, baseline, feedback, {"weight_decay": 0.1}, runs=2)
        yield Case("FCN 784-32x4-10", baseline, feedback, runs=2)
        yield Case(small, baseline, feedback, dtype="float64", runs=8)
    for runs, dtype in product((1, 4), ("float32", "float64")):
        yield Case(images, "sgd", None, dtype=dtype, runs=runs)
    for options in ({"momentum": 0.9}, {"factor_decay": 0.9}, {"inverse_every": 20}):
        yield Case(wide, "ekfac", None, options, runs=2)
    for baseline in ("rmsprop", "adam"):
        yield Case(images, baseline, None, {"second_moment": "per_sample"}, runs=2)
    for net, feedback in product(
        ("FCN 64-48x8-10, GELU", "FCN 13-10x4-10, sigmoid"), (None, "outer product")
    ):
        yield Case(net, "sgd", feedback, runs=4)
    yield Case("FCN 784-32x4-10", "sgd", "exact", runs=2)
    yield Case(wide, "sgd", "exact", runs=1)
    yield Case(images, "rmsprop", "exact", runs=1)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.net}: {case.name}, {case.size} runs")
def test_memory_is_what_torch_allocates(case: Case) -> None:
    updates, metrics = measured(case)
    assert expected(case, samples=0) == pytest.approx(updates, rel=WITHIN)
    assert expected(case) == pytest.approx(max(updates, metrics), rel=WITHIN)


class Measured(NamedTuple):
    """A run: net, baseline, options of DDPNOpt (None for the baseline itself), microseconds a step."""

    net: Net
    baseline: PairedBaseline
    feedback: dict[str, Any] | None
    time: float
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written to


MEASURED = [
    Measured(FIG_4A, "sgd", None, 18),
    Measured(FIG_4A, "sgd", {}, 104),
    Measured(FIG_4A, "sgd", GAUSS_NEWTON, 31),
    Measured(FIG_4A, "sgd", {"feedback": False}, 20),
    Measured(FIG_4A, "sgd", PSD, 215),
    Measured(FIG_4A, "sgd", SECOND, 190),
    Measured(FIG_4A, "adam", {}, 97),
    Measured(FIG_4A, "kfac", None, 153),
    Measured(FIG_4A, "ekfac", None, 92),
    Measured(FIG_4A, "ekfac", GAUSS_NEWTON, 120),
    Measured(RELU_32, "sgd", {}, 6552),
    Measured(RELU_32, "adam", GAUSS_NEWTON, 1145),
    Measured(RELU_32, "ekfac", None, 3374),
    Measured(RELU_32, "ekfac", None, 15_842, {"inverse_every": 20}),
    Measured(WIDE, "sgd", {}, 101_141),
    Measured(WIDE, "sgd", PSD, 160_273),
    Measured(WIDE, "sgd", SECOND, 284_733),
    Measured(WIDE, "ekfac", SECOND, 301_499),
    Measured(WIDE, "kfac", None, 9265),
    Measured(SMALL_CNN, "sgd", None, 672),
    Measured(SMALL_CNN, "ekfac", {}, 3192),
    Measured(SMALL_CNN, "sgd", EXACT, 232_393),
    Measured(SMALL_CNN, "sgd", SECOND, 582_270),
    Measured(SMALL_CNN, "adam", EXACT, 236_565, {"second_moment": "per_sample"}),
    Measured(ZOO_CNN, "sgd", None, 185_707),
    Measured(ZOO_CNN, "sgd", {}, 724_507),
    Measured(ZOO_CNN, "adam", None, 496_198, {"second_moment": "per_sample"}),
    Measured(ZOO_CNN, "ekfac", {}, 1_770_093),
    Measured(COLOUR_CNN, "sgd", {}, 1_016_002),
]


@pytest.mark.parametrize(
    "case", MEASURED, ids=lambda case: f"{case.net[0].kind}-{case.baseline}-{case.feedback}"
)
def test_time_is_near_what_was_measured(case: Measured) -> None:
    model, shape, batch = case.net
    net = estimate.layers(model.layers(shape, 10), len(model.channels), model.activation)
    feedback = None
    if case.feedback is not None:
        feedback = FeedbackConfig(**case.feedback).resolved(convolutional=model.convolutional)
    method = Method.of(case.baseline, BaselineOptions(**case.options), feedback)
    assert 1 / FACTOR < estimate.seconds(net, batch, method) * 1e6 / case.time < FACTOR


@pytest.mark.parametrize(
    ("net", "samples", "milliseconds"),
    [(FIG_4A, 1437, 1.2), (RELU_32, 4096, 19), (SMALL_CNN, 1437, 32), (ZOO_CNN, 1024, 1761)],
)
def test_points_of_curves_are_near_what_was_measured(net: Net, samples: int, milliseconds: float) -> None:
    model, shape, _ = net
    sizes = estimate.layers(model.layers(shape, 10), len(model.channels))
    assert 1 / FACTOR < estimate.metrics_seconds(sizes, samples) * 1e3 / milliseconds < FACTOR


def test_every_preconditioner_has_a_cost() -> None:
    costs = (
        estimate.CONTROLS_HELD,
        estimate.FACTORS_HELD,
        estimate.MOMENTS_PASSING,
        estimate.STEP_PASSING,
    )
    for cost in costs:
        assert set(cost) == set(PRECONDITIONER_OF.values())


def test_what_is_switched_off_costs_nothing() -> None:
    model, shape, batch = FIG_4A
    net = estimate.layers(model.layers(shape, 10), 0)
    options = BaselineOptions()
    off = FeedbackConfig(feedback=False, dynamics="second_order").resolved()
    baseline, open_loop = Method.of("adam", options, None), Method.of("adam", options, off)
    assert not open_loop.full
    assert not open_loop.second_order
    assert estimate.seconds(net, batch, open_loop) < 1.5 * estimate.seconds(net, batch, baseline)
    # Averaged factors have to be taken apart in full; those of a batch alone within what it spans.
    every, rare, spanned = (
        estimate.seconds(net, batch, Method.of("ekfac", BaselineOptions(**chosen), None))
        for chosen in ({"factor_decay": 0.5}, {"factor_decay": 0.5, "inverse_every": 100}, {})
    )
    assert rare < every / 2
    assert spanned < every / 2


def test_metrics_of_few_samples_take_less() -> None:
    model, shape, batch = FIG_4A
    net = estimate.layers(model.layers(shape, 10), 0)
    method = Method.of("sgd", BaselineOptions(), None)
    chunk, small, none = (estimate.numbers(net, batch, method, samples) for samples in (10**6, 142, 0))
    assert chunk == estimate.numbers(net, batch, method) > small > none


@pytest.mark.parametrize(("net", "convolutions"), [(RELU_32, 0), (SMALL_CNN, 2), (ZOO_CNN, 4)])
def test_a_pack_of_the_most_runs_fits(net: Net, convolutions: int) -> None:
    model, shape, batch = net
    sizes = estimate.layers(model.layers(shape, 10), convolutions, model.activation)
    for baseline, limit in product(BASELINES, (10**5, 10**7, 10**8, 10**9)):
        method = Method.of(baseline, BaselineOptions(), None)
        runs = estimate.most_runs(sizes, batch, method, limit)
        assert runs * estimate.numbers(sizes, batch, method, runs=max(runs, 1)) <= limit
        assert (runs + 2) * estimate.numbers(sizes, batch, method, runs=runs + 2) > limit
