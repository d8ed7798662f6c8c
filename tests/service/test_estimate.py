"""Estimates against measurements: rough, but never absurd.

Measured on a Xeon with torch 2.13, one thread: how much the process's resident memory grew at most over an
update and a point of the curves, and the processor time of an update, each divided by the runs of the pack (1
to 64, as many as made the process grow by megabytes). The estimates that these pinned were off by factors of
0.7 to 1.5 in memory and 0.5 to 2.5 in time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import pytest

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


class Measured(NamedTuple):
    """A run: net, baseline, options of DDPNOpt (None for the baseline itself), MiB, microseconds a step."""

    net: Net
    baseline: PairedBaseline
    feedback: dict[str, Any] | None
    memory: float
    time: float
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never written to


MEASURED = [
    Measured(FIG_4A, "sgd", None, 0.18, 18),
    Measured(FIG_4A, "sgd", {}, 0.12, 104),
    Measured(FIG_4A, "sgd", GAUSS_NEWTON, 0.17, 31),
    Measured(FIG_4A, "sgd", {"feedback": False}, 0.12, 20),
    Measured(FIG_4A, "sgd", PSD, 0.21, 215),
    Measured(FIG_4A, "sgd", SECOND, 0.18, 190),
    Measured(FIG_4A, "adam", {}, 0.16, 97),
    Measured(FIG_4A, "kfac", None, 0.20, 95),
    Measured(FIG_4A, "ekfac", None, 0.21, 330),
    Measured(FIG_4A, "ekfac", GAUSS_NEWTON, 0.22, 353),
    Measured(RELU_32, "sgd", {}, 7.8, 6552),
    Measured(RELU_32, "adam", GAUSS_NEWTON, 2.1, 1145),
    Measured(RELU_32, "ekfac", None, 13.9, 47_120),
    Measured(RELU_32, "ekfac", None, 11.4, 7912, {"inverse_every": 20}),
    Measured(WIDE, "sgd", {}, 83, 101_141),
    Measured(WIDE, "sgd", PSD, 99, 160_273),
    Measured(WIDE, "sgd", SECOND, 150, 284_733),
    Measured(WIDE, "ekfac", SECOND, 152, 614_204),
    Measured(WIDE, "kfac", None, 6.3, 5771),
    Measured(SMALL_CNN, "sgd", None, 3.8, 672),
    Measured(SMALL_CNN, "ekfac", {}, 5.0, 3628),
    Measured(SMALL_CNN, "sgd", EXACT, 86, 232_393),
    Measured(SMALL_CNN, "sgd", SECOND, 151, 582_270),
    Measured(SMALL_CNN, "adam", EXACT, 92, 236_565, {"second_moment": "per_sample"}),
    Measured(ZOO_CNN, "sgd", None, 199, 185_707),
    Measured(ZOO_CNN, "sgd", {}, 451, 724_507),
    Measured(ZOO_CNN, "adam", None, 364, 496_198, {"second_moment": "per_sample"}),
    Measured(ZOO_CNN, "ekfac", {}, 446, 1_841_834),
    Measured(COLOUR_CNN, "sgd", {}, 506, 1_016_002),
]


@pytest.mark.parametrize(
    "case", MEASURED, ids=lambda case: f"{case.net[0].kind}-{case.baseline}-{case.feedback}"
)
def test_estimates_are_near_what_was_measured(case: Measured) -> None:
    model, shape, batch = case.net
    net = estimate.layers(model.layers(shape, 10), len(model.channels))
    feedback = None
    if case.feedback is not None:
        feedback = FeedbackConfig(**case.feedback).resolved(convolutional=model.convolutional)
    method = Method.of(case.baseline, BaselineOptions(**case.options), feedback)
    memory = estimate.numbers(net, batch, method) * 4 / 2**20
    assert 1 / FACTOR < memory / case.memory < FACTOR
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
    assert set(estimate.CONTROLS_HELD) == set(PRECONDITIONER_OF.values())


def test_what_is_switched_off_costs_nothing() -> None:
    model, shape, batch = FIG_4A
    net = estimate.layers(model.layers(shape, 10), 0)
    options = BaselineOptions()
    off = FeedbackConfig(feedback=False, dynamics="second_order").resolved()
    assert Method.of("adam", options, off) == Method.of("adam", options, None)
    rare = Method.of("ekfac", BaselineOptions(inverse_every=100), None)
    assert (
        estimate.seconds(net, batch, rare)
        < estimate.seconds(net, batch, Method.of("ekfac", options, None)) / 2
    )
