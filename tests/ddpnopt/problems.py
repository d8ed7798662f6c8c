"""Small problems that the tests of the numerics share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ddpnopt.config import (
    PRECONDITIONER_OF,
    BaselineOptions,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from ddpnopt.datasets.load import Dataset
from ddpnopt.pack.engine import Trainer, train
from ddpnopt.results import Finished, RunResult

FORMS: Final[dict[str, dict[str, Any]]] = {
    "exact_full": {"terminal_hessian": "exact", "factorized": False},
    "gn_full": {"terminal_hessian": "gauss_newton", "factorized": False},
    "gn_outer_product": {"terminal_hessian": "gauss_newton", "factorized": True},
}
CONVENTIONS: Final = ("batch_mean", "per_sample")
SAFEGUARDS: Final = ("clamp", "psd")

FEEDBACKS: Final = {
    f"{form}-{convention}-{safeguard}": FeedbackConfig(
        **FORMS[form], convention=convention, safeguard=safeguard
    )
    for form, convention, safeguard in product(FORMS, CONVENTIONS, SAFEGUARDS)
}
"""Every DDPNOpt of first order that there is, by name."""

PARTNERS: Final = {
    f"{baseline}-{name}": OptimizerConfig(baseline, "ddpnopt", 0.05, 1e-4, feedback)
    for baseline in PRECONDITIONER_OF
    for name, feedback in {
        "full": FeedbackConfig(),
        "outer_product": FeedbackConfig("gauss_newton"),
        "second_order": FeedbackConfig(dynamics="second_order"),
    }.items()
}
"""Every preconditioner with each way to hold V_xx."""


def toy(
    samples: int = 60, features: int = 5, classes: int = 3, seed: int = 0, shape: tuple[int, ...] = ()
) -> Dataset:
    """Gaussian clusters, one per class, half as many in the test set as in the training set."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features))
    targets = np.arange(samples + samples // 2) % classes
    inputs = centres[targets] + rng.normal(size=(len(targets), features))
    return Dataset(
        "toy", inputs[:samples], targets[:samples], inputs[samples:], targets[samples:], "none", shape
    )


def baseline(name: str, learning_rate: float = 0.1, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name, "baseline", learning_rate, options=BaselineOptions(**options))


def sgd(learning_rate: float = 0.1) -> OptimizerConfig:
    return baseline("sgd", learning_rate)


def ddpnopt(
    learning_rate: float = 0.1,
    vxx_reg: float = 1e-3,
    options: FeedbackConfig = FeedbackConfig(),  # noqa: B008 - frozen
    **changes: Any,
) -> OptimizerConfig:
    return OptimizerConfig("sgd", "ddpnopt", learning_rate, vxx_reg, replace(options, **changes))


def run(optimizer: OptimizerConfig, seed: int = 0, **changes: Any) -> RunConfig:
    """A short run in float64; `changes` go to the model, the training or the run itself by their names."""
    model: dict[str, Any] = {"hidden": (6, 4), "activation": "tanh", "kind": "fcn", "channels": ()}
    training: dict[str, Any] = {"steps": 10, "batch_size": 16, "eval_every": 4}
    rest: dict[str, Any] = {"dataset": "toy", "loss": "cross_entropy", "dtype": "float64"}
    for name, value in changes.items():
        next(part for part in (model, training, rest) if name in part)[name] = value
    return RunConfig(
        model=ModelConfig(**model),
        training=TrainingConfig(**training),
        optimizer=optimizer,
        seed=seed,
        **rest,
    )


def results(runs: Sequence[RunConfig], data: Dataset | None = None) -> tuple[RunResult, ...]:
    """Train a pack to its end."""
    (finished,) = [event for event in train(runs, data) if isinstance(event, Finished)]
    return finished.results


def updates(trainer: Trainer, steps: int) -> Iterator[int]:
    """Drive a trainer by hand, yielding after each update."""
    for step in range(1, steps + 1):
        trainer.advance(step)
        yield step


def bits(result: RunResult) -> dict[str, Any]:
    """All of a result but its place in the pack, as values that are equal only if every bit is."""
    return asdict(result) | {
        "index": None,
        "metrics": {name: value.hex() for name, value in result.metrics.items()},
        "curve_steps": result.curve_steps.tolist(),
        "test_steps": result.test_steps.tolist(),
        "curves": {name: curve.tobytes() for name, curve in result.curves.items()},
        "records": {
            name: (record.steps.tolist(), record.values.shape, record.values.tobytes())
            for name, record in result.records.items()
        },
    }


def assert_close(
    actual: Tensor, expected: Tensor, relative: float, what: str, absolute: float = 1e-15
) -> None:
    """Compare by the largest deviation over the largest entry; say which entries deviate.

    Entries that ought to be zero may be rounding errors, far below anything that a step is made of.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    allowed = relative * float(expected.abs().max()) + absolute
    wrong = ((actual - expected).abs() > allowed) | ~torch.isfinite(actual)
    if bool(wrong.any()):
        lines = [
            f"  {index}: {float(actual[tuple(index)]):.17g}, expected {float(expected[tuple(index)]):.17g}"
            for index in wrong.nonzero().tolist()[:10]
        ]
        count = f"{int(wrong.sum())} of {wrong.numel()} entries deviate by more than {allowed:.2g}"
        raise AssertionError("\n".join([f"{what}: {count}", *lines]))
