"""The planner's picture of lanes against what they hold and how long they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.memory import allocated
from ddpnopt.config import BaselineOptions as Options
from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.datasets.load import load
from ddpnopt.lanes import rules
from ddpnopt.lanes.library import library
from ddpnopt.lanes.program import compiled
from ddpnopt.pack.engine import Trainer
from service.sweeps import estimate, estimate_lanes
from service.sweeps.estimate import Method

if library("float32") is None:
    pytest.skip("no C compiler", allow_module_level=True)

NETS = {
    "64-16x4-10": (ModelConfig((16,) * 4), 64, 10),
    "64-10x4-10": (ModelConfig((10,) * 4), 64, 10),
    "13-3": (ModelConfig(()), 13, 3),
    "5-40-7-3": (ModelConfig((40, 7), "relu"), 5, 3),
}
FEEDBACKS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "outer": {"terminal_hessian": "gauss_newton"},
    "full": {},
    "psd": {"safeguard": "psd"},
    "psd outer": {"terminal_hessian": "gauss_newton", "safeguard": "psd"},
    "off": {"feedback": False},
}


def method_of(
    baseline: str, feedback: dict[str, Any] | None, **options: Any
) -> tuple[OptimizerConfig, Method]:
    chosen = None if feedback is None else FeedbackConfig(**feedback)
    optimizer = OptimizerConfig(
        baseline,
        "baseline" if chosen is None else "ddpnopt",
        0.1,
        None if chosen is None else 1e-4,
        chosen,
        Options(**options),
    )
    return optimizer, Method.of(baseline, Options(**options), None if chosen is None else chosen.resolved())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("baseline", rules.PRECONDITIONERS)
@pytest.mark.parametrize("net", NETS)
def test_the_workspace_is_the_kernels(net, baseline, feedback, batch, dtype):
    model, features, classes = NETS[net]
    optimizer, method = method_of(baseline, FEEDBACKS[feedback])
    run = RunConfig("toy", model, "cross_entropy", TrainingConfig(10, batch, 10), optimizer, 0, dtype)
    shapes = model.layers((features,), classes)
    assert rules.trains(run, shapes)
    kernel = library(dtype)
    if kernel.lanes * rules.NUMBER_BYTES[dtype] != estimate_lanes.VECTOR_BYTES:
        pytest.skip("this machine's vectors are shorter, and its blocks smaller")
    sizes = estimate.layers(shapes, 0)
    held = compiled(kernel, run, shapes).workspace
    planned = estimate_lanes.workspace(sizes, batch, method, rules.NUMBER_BYTES[dtype])
    assert held <= planned <= 1.05 * held + 64


@pytest.mark.parametrize(
    ("baseline", "options"),
    [("sgd", {}), ("sgd", {"momentum": 0.9}), ("rmsprop", {}), ("adam", {})],
)
def test_the_state_is_what_torch_allocates(baseline, options):
    """At the peak of making a pack, training it, taking its metrics, and losing half of it."""
    optimizer, method = method_of(baseline, None, **options)
    model, training = ModelConfig((16,) * 4), TrainingConfig(4, 8, 2)
    runs = [RunConfig("digits", model, "cross_entropy", training, optimizer, seed) for seed in range(64)]
    data, made = load("digits"), []

    def train() -> None:
        made.append(Trainer(runs, data, torch.device("cpu"), threads=1))
        made[0].advance(2)
        made[0].take_metrics()
        made[0].cancel(range(0, 64, 2))

    (peak,) = allocated(train)
    samples = 4 * (data.train_inputs.size + data.test_inputs.size)
    sizes = estimate.layers(model.layers((64,), 10), 0)
    planned = 64 * 4 * estimate_lanes.state(sizes, method) + estimate_lanes.workspace(sizes, 8, method, 4)
    assert 0.75 < planned / (peak - samples) < 1.25


MEASURED = {
    # Microseconds a run and step on an EPYC of Zen 4, packs of 192.
    ("64-16x4-10", 8): {"sgd baseline": 2.3, "sgd outer": 3.8, "sgd full": 11.4, "sgd psd": 18.4},
    ("64-10x4-10", 16): {"sgd baseline": 3.1, "sgd outer": 4.8, "sgd full": 10.5, "adam outer": 6.4},
}


@pytest.mark.parametrize(
    ("net", "batch", "name", "microseconds"),
    [(net, batch, name, us) for (net, batch), found in MEASURED.items() for name, us in found.items()],
)
def test_times_are_near_what_was_measured(net, batch, name, microseconds):
    model, features, classes = NETS[net]
    baseline, _, feedback = name.partition(" ")
    _, method = method_of(baseline, FEEDBACKS[feedback])
    sizes = estimate.layers(model.layers((features,), classes), 0)
    assert 0.5 < estimate_lanes.seconds(sizes, batch, method) * 1e6 / microseconds < 2
