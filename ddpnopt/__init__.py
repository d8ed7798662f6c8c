"""DDPNOpt: differential dynamic programming for training neural networks (Liu, Chen, Theodorou, ICLR 2021).

    from ddpnopt import DDPNOpt

The configuration (`ddpnopt.config`), the dataset catalogue (`ddpnopt.datasets.catalog`) and the results
(`ddpnopt.results`) import without torch, so that a service can speak of runs without being able to
train them. Everything else needs torch; nothing here knows of Ray, SQL or HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpnopt.torch_optimizer import BaselineOptimizer as BaselineOptimizer
    from ddpnopt.torch_optimizer import DDPNOpt as DDPNOpt

NUMERICS_VERSION = 2
"""Raised whenever a change alters the bits of any run's result; stored with every result."""

__all__ = ["NUMERICS_VERSION", "BaselineOptimizer", "DDPNOpt"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in ("BaselineOptimizer", "DDPNOpt"):
        from ddpnopt import torch_optimizer

        return getattr(torch_optimizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
