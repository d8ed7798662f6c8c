"""Preconditioners M_t (Table 2): what stands for Q_uu, so that Q_uu⁻¹ is η M_t⁻¹ everywhere.

Adding one: a file with a class that has `Preconditioner`'s methods, and a row in `PRECONDITIONERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ddpnopt.preconditioners.base import Preconditioner
from ddpnopt.preconditioners.identity import Identity

PRECONDITIONERS: Final[Mapping[str, Callable[[], Preconditioner]]] = {
    "sgd": Identity,
}
"""The preconditioner of each baseline, and so of its DDPNOpt partner."""

__all__ = ["PRECONDITIONERS", "Preconditioner"]
