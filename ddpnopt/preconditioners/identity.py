"""M = I: the partner of plain SGD. It has no state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddpnopt.config import BaselineOptions
from ddpnopt.linalg import FactoredInverse
from ddpnopt.preconditioners.base import LayerBatch

_ONE = FactoredInverse()


class Identity:
    """M_t = I."""

    def __init__(self, options: BaselineOptions) -> None:
        del options

    def observe(self, t: int, batch: LayerBatch) -> None:
        """Nothing to learn from a batch."""

    def inverse(self, t: int) -> FactoredInverse:
        """Return the identity."""
        return _ONE

    def precondition(self, t: int, direction: Tensor) -> Tensor:
        """Return the direction itself."""
        return direction

    def state(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""

    def select(self, keep: Tensor) -> None:
        """Nothing to keep."""
