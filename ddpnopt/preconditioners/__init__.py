"""Preconditioners M_t (Table 2): what stands for Q_uu, so that Q_uu⁻¹ is η M_t⁻¹ everywhere.

Adding one: a file with a class that has `Preconditioner`'s methods, and a row in `PRECONDITIONERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ddpnopt.config import BaselineOptions
from ddpnopt.preconditioners.base import LayerBatch, Preconditioner, Units, direction
from ddpnopt.preconditioners.diagonal import Adam, RMSprop
from ddpnopt.preconditioners.identity import Identity
from ddpnopt.preconditioners.kronecker import EKFAC, KFAC

PRECONDITIONERS: Final[Mapping[str, Callable[[BaselineOptions], Preconditioner]]] = {
    "identity": Identity,
    "rmsprop": RMSprop,
    "adam": Adam,
    "kfac": KFAC,
    "ekfac": EKFAC,
}
"""Each preconditioner by name; `config.PRECONDITIONER_OF` says which baseline has which."""

__all__ = ["PRECONDITIONERS", "LayerBatch", "Preconditioner", "Units", "direction"]
