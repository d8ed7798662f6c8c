"""The optimizers, one table.

Adding one: a file with a class that has `Optimizer`'s methods, and a row in `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, get_args

from ddpnopt.config import OptimizerConfig, PairedBaseline
from ddpnopt.optimizers.base import Members, Optimizer
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.optimizers.emsa import EMSA
from ddpnopt.optimizers.preconditioned import Preconditioned
from ddpnopt.optimizers.sgd_vgr import SGDVGR
from ddpnopt.optimizers.vanilla_ddp import VanillaDDP

_PAIRED: Final = get_args(PairedBaseline)

OPTIMIZERS: Final[Mapping[tuple[str, str], Callable[[Members], Optimizer]]] = {
    **{(baseline, "baseline"): Preconditioned for baseline in _PAIRED},
    **{(baseline, "ddpnopt"): DDPNOpt for baseline in _PAIRED},
    ("sgd_vgr", "baseline"): SGDVGR,
    ("emsa", "baseline"): EMSA,
    ("vanilla_ddp", "baseline"): VanillaDDP,
}
"""(baseline, method) to the optimizer of a group of runs."""


def group_key(config: OptimizerConfig, *, convolutional: bool = False) -> tuple[object, ...]:
    """Return what members of one group share; learning rate, ε, weight decay and momentum are each run's own.

    Whether the last two are zero is shared, since what is zero is not computed.
    """
    feedback = None if config.feedback is None else config.feedback.resolved(convolutional=convolutional)
    options = replace(
        config.options,
        weight_decay=float(config.options.weight_decay > 0),
        momentum=0.5 * (config.options.momentum > 0),
    )
    return (config.baseline, config.method, options, feedback)


def make(members: Members) -> Optimizer:
    """Return the optimizer of a group."""
    config = members.config
    return OPTIMIZERS[config.baseline, config.method](members)


__all__ = ["OPTIMIZERS", "Members", "Optimizer", "group_key", "make"]
