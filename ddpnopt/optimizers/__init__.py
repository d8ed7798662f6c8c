"""The optimizers, one table, one file each.

Adding one: a file with a class that has `Optimizer`'s methods, and a row in `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ddpnopt.config import OptimizerConfig, RunConfig
from ddpnopt.layers.activations import Activation
from ddpnopt.layers.losses import Loss
from ddpnopt.optimizers.base import Members, Optimizer
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.optimizers.sgd import SGD

OPTIMIZERS: Final[Mapping[tuple[str, str], Callable[[Members], Optimizer]]] = {
    ("sgd", "baseline"): SGD,
    ("sgd", "ddpnopt"): DDPNOpt,
}
"""(baseline, method) to the optimizer of a group of runs."""


def group_key(config: OptimizerConfig) -> tuple[object, ...]:
    """Return what members of one group share; learning rate and ε are per run."""
    feedback = None if config.feedback is None else config.feedback.resolved()
    return (config.baseline, config.method, feedback)


def make(runs: Sequence[RunConfig], members: Members) -> Optimizer:
    """Return the optimizer of a group, all of whose runs have one `group_key`."""
    config = runs[0].optimizer
    return OPTIMIZERS[config.baseline, config.method](members)


__all__ = ["OPTIMIZERS", "Activation", "Loss", "Members", "Optimizer", "group_key", "make"]
