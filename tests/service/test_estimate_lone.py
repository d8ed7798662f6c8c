"""Estimates of the baselines without a DDPNOpt partner, against measurements.

Memory is measured here, as in `test_estimate.py`.

Time was measured with torch 2.13, one thread of a Xeon that did other things too: that of an update, divided
by the runs of the pack (1 to 64). The estimates that these pinned were off by factors of 0.4 to 1.9.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final, get_args

import pytest

from benchmarks import memory
from benchmarks.memory import NETS, Case, Net, measured
from ddpnopt.config import BaselineOptions, LoneBaseline, ModelConfig
from ddpnopt.lanes.rules import NUMBER_BYTES
from service.sweeps import estimate, estimate_lone
from service.sweeps.estimate import Layer, Method
from service.sweeps.estimate_lone import Lone

FACTOR: Final = 3
WITHIN: Final = 0.25
SMALL, WIDE, IMAGES = "FCN 64-10x4-10", "FCN 64-256x2-10", "CNN 8-8-16-10 on 8x8"
WINE, DIGITS, LARGE_BATCH = "FCN 13-10x2-3", "FCN 64-10x2-10", "FCN 64-10x2-10, batch 64"
WIDE_INPUT, LONG_BATCH, READ_OUT = "FCN 300-8-10", "FCN 3-4x2-10", "FCN 64-10"
SPANNED, TALL, MNIST = "FCN 300-24x2-10, batch 16", "FCN 784-40-10, batch 4", "FCN 784-16x4-10, batch 32"
OWN: Final = {
    WINE: Net(ModelConfig((10, 10)), (13,), 32, 2),
    DIGITS: Net(ModelConfig((10, 10)), (64,), 16, 2),
    LARGE_BATCH: Net(ModelConfig((10, 10)), (64,), 64, 2),
    # Where metrics, the states of the batch, or the terminal V_XX take the most.
    WIDE_INPUT: Net(ModelConfig((8,)), (300,), 2, 2),
    LONG_BATCH: Net(ModelConfig((4, 4), "relu"), (3,), 200, 2),
    READ_OUT: Net(ModelConfig(()), (64,), 16, 2),
    # Where controls within the span of the batch, or those beside it.
    SPANNED: Net(ModelConfig((24, 24), "relu"), (300,), 16, 2),
    TALL: Net(ModelConfig((40,)), (784,), 4, 2),
    MNIST: Net(ModelConfig((16,) * 4, "relu"), (784,), 32, 2),
}


@pytest.fixture(autouse=True)
def more_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NETS", NETS | OWN)


def sizes(net: str) -> tuple[tuple[Layer, ...], int]:
    chosen = (NETS | OWN)[net]
    shapes, model = chosen.model.layers(chosen.shape, 10), chosen.model
    return estimate.layers(shapes, len(model.channels), model.activation, model.output), chosen.batch


def expected(case: Case, samples: int) -> int:
    baseline: Any = case.baseline
    lone = Lone(baseline, BaselineOptions(**case.options))
    numbers = estimate_lone.numbers(*sizes(case.net), lone, samples, runs=case.size, dtype=case.dtype)
    return NUMBER_BYTES[case.dtype] * numbers


def cases() -> Iterator[Case]:
    for net, options in product((SMALL, WIDE, IMAGES), ({}, {"momentum": 0.9, "weight_decay": 0.1})):
        yield lone_case(net, "sgd_vgr", options, runs=2)
    for net, runs in product((SMALL, WIDE, IMAGES), (1, 3)):
        yield lone_case(net, "emsa", {}, runs=runs)
    yield lone_case(WIDE, "emsa", {"lbfgs_steps": 30, "weight_decay": 0.1}, runs=2)
    yield lone_case("FCN 64-48x8-10, GELU", "emsa", {}, runs=2)
    for net in (SMALL, WINE, WIDE_INPUT, LONG_BATCH, READ_OUT):
        yield lone_case(net, "vanilla_ddp", {}, runs=2)
    need = estimate_lone.matrices(*sizes(LONG_BATCH), "float32")
    for at_once in (1, 2):
        yield lone_case(LONG_BATCH, "vanilla_ddp", {"memory_limit": at_once * need}, runs=4)
    for net, decay in product((WIDE_INPUT, SPANNED, TALL), (0.0, 0.1)):
        need = estimate_lone.matrices(*sizes(net), "float32")
        yield lone_case(net, "vanilla_ddp", {"memory_limit": need, "weight_decay": decay}, runs=3)
    for baseline in get_args(LoneBaseline):
        yield lone_case(SMALL, baseline, {}, dtype="float64", runs=2)


def lone_case(net: str, baseline: Any, options: dict[str, Any], **rest: Any) -> Case:
    return Case(net, baseline, None, options, **rest)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.net}: {case.name}, {case.size} runs")
def test_memory_is_what_torch_allocates(case: Case) -> None:
    updates, metrics = measured(case)
    assert expected(case, 0) == pytest.approx(updates, rel=WITHIN)
    assert expected(case, memory.SAMPLES) == pytest.approx(max(updates, metrics), rel=WITHIN)


def test_a_search_that_ends_early_takes_less_than_expected() -> None:
    case = lone_case("FCN 784-32x4-10", "emsa", {"lbfgs_steps": 30}, runs=1)
    updates, _ = measured(case)
    assert updates < expected(case, 0) < 4 * updates


MEASURED: Final[list[tuple[str, LoneBaseline, float, dict[str, Any]]]] = [
    (SMALL, "sgd_vgr", 43, {}),
    ("FCN 784-32x4-10", "sgd_vgr", 648, {}),
    (WIDE, "sgd_vgr", 1144, {}),
    (IMAGES, "sgd_vgr", 1356, {}),
    ("CNN 32x4-32-10 on 28x28", "sgd_vgr", 207_392, {}),
    (WINE, "emsa", 6499, {}),
    (SMALL, "emsa", 11_254, {}),
    (SMALL, "emsa", 3292, {"lbfgs_steps": 1}),
    (SMALL, "emsa", 45_884, {"lbfgs_steps": 20}),
    ("FCN 784-32x4-10", "emsa", 29_018, {}),
    (WIDE, "emsa", 23_027, {}),
    (IMAGES, "emsa", 22_496, {}),
    (WINE, "vanilla_ddp", 5389, {}),
    (DIGITS, "vanilla_ddp", 1380, {}),
    (SMALL, "vanilla_ddp", 2772, {}),
    (LARGE_BATCH, "vanilla_ddp", 22_266, {}),
    (SPANNED, "vanilla_ddp", 9120, {}),
    (MNIST, "vanilla_ddp", 23_270, {}),
    ("FCN 784-32x4-10", "vanilla_ddp", 4_052_062, {}),
]
"""Net, baseline, microseconds a step, and the baseline's options."""


@pytest.mark.parametrize(("net", "baseline", "time", "options"), MEASURED)
def test_time_is_near_what_was_measured(
    net: str, baseline: LoneBaseline, time: float, options: dict[str, Any]
) -> None:
    lone = Lone(baseline, BaselineOptions(**options))
    assert 1 / FACTOR < estimate_lone.seconds(*sizes(net), lone) * 1e6 / time < FACTOR


@pytest.mark.parametrize("baseline", get_args(LoneBaseline))
def test_a_pack_of_the_most_runs_fits(baseline: LoneBaseline) -> None:
    net, batch = sizes(DIGITS)
    for memory_limit, limit in product((7 * 10**6, 2**31), (10**5, 10**7, 10**8, 10**9)):
        lone = Lone(baseline, BaselineOptions(memory_limit=memory_limit))
        runs = estimate_lone.most_runs(net, batch, lone, limit)
        assert runs * estimate_lone.numbers(net, batch, lone, runs=max(runs, 1)) <= limit
        alone = estimate_lone.numbers(net, batch, lone)
        assert runs >= limit // alone


def test_sgd_vgr_takes_more_than_sgd_and_less_than_twice_that() -> None:
    net, batch = sizes(WIDE)
    options = BaselineOptions(momentum=0.9)
    plain = estimate.numbers(net, batch, Method.of("sgd", options, None), 0)
    assert plain < estimate_lone.numbers(net, batch, Lone("sgd_vgr", options), 0) < 2 * plain
