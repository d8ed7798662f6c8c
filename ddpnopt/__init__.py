"""DDPNOpt: differential dynamic programming for training neural networks (Liu, Chen, Theodorou, ICLR 2021).

    from ddpnopt import DDPNOpt

The configuration (`ddpnopt.config`), the dataset catalogue (`ddpnopt.datasets.catalog`) and the results
(`ddpnopt.results`) import without torch, so that a service can speak of runs without being able to
train them. Everything else needs torch; nothing here knows of Ray, SQL or HTTP.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ddpnopt.config import NUMERICS_VERSION as NUMERICS_VERSION

# Before MKL, torch's library on x86, is first used: without it a product's bits depend on where in memory its
# matrices lie, and so a run's on its place in a pack.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from ddpnopt.torch_optimizer import BaselineOptimizer as BaselineOptimizer
    from ddpnopt.torch_optimizer import DDPNOpt as DDPNOpt

__all__ = ["NUMERICS_VERSION", "BaselineOptimizer", "DDPNOpt"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in ("BaselineOptimizer", "DDPNOpt"):
        from ddpnopt import torch_optimizer

        return getattr(torch_optimizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
