"""M = I: the partner of plain SGD. It has no state."""

from __future__ import annotations

from torch import Tensor


class Identity:
    """M_t = I."""

    def observe(self, t: int, V_h: Tensor, x_bar: Tensor) -> None:
        """Nothing to learn from a batch."""

    def contraction(self, t: int, x_bar: Tensor) -> Tensor:
        """Return |x̄|², (R, B, 1): the same for every output unit."""
        return (x_bar * x_bar).sum(dim=-1, keepdim=True)

    def apply(self, t: int, direction: Tensor) -> Tensor:
        """Return the direction itself."""
        return direction

    def select(self, keep: Tensor) -> None:
        """Nothing to keep."""
