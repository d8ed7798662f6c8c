"""Which runs train in lanes: by their configuration alone, so that a run's bits never depend on its company.

Importable without torch, for a planner that has to know what a run will cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ddpnopt.config import DType, LayerShape, Loss, ModelConfig, OptimizerConfig, RunConfig

ACTIVATIONS: Final = ("tanh", "relu", "sigmoid", "leaky_relu", "identity")
"""In the order of kernel.c."""
LOSSES: Final[tuple[Loss, ...]] = ("cross_entropy", "mse", "mmc")
"""In the order of kernel.c."""
PRECONDITIONERS: Final = ("sgd", "rmsprop", "adam")
"""The baselines whose M is the identity or diagonal, in the order of kernel.c."""

MAX_CONTROLS: Final = 20_000
"""Entries of u up to which lanes are the faster path: beyond, a block of runs does not stay in a core's
cache, and one that is not full costs more than it saves (docs/performance.md)."""

NUMBER_BYTES: Final[dict[DType, int]] = {"float32": 4, "float64": 8}


def measures(model: ModelConfig, shapes: Sequence[LayerShape]) -> bool:
    """Tell whether a net's metrics are taken in lanes.

    Args:
        model: the net.
        shapes: its layers on the dataset.
    """
    known = model.activation in ACTIVATIONS and model.output in ACTIVATIONS
    controls = sum(shape.outputs * (shape.inputs + 1) for shape in shapes)
    return not model.convolutional and known and controls <= MAX_CONTROLS


def trains(run: RunConfig, shapes: Sequence[LayerShape]) -> bool:
    """Tell whether a run's updates are done in lanes: first order, M the identity or diagonal, no probes.

    Args:
        run: the run.
        shapes: its layers on the dataset.
    """
    return not run.probes and measures(run.model, shapes) and _first_order(run.optimizer)


def _first_order(optimizer: OptimizerConfig) -> bool:
    feedback = optimizer.feedback
    dynamics = "first_order" if feedback is None or not feedback.feedback else feedback.dynamics
    return optimizer.baseline in PRECONDITIONERS and dynamics == "first_order"
