"""The numbers that each run of a pack has of its own, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rates:
    """What one layer's update takes.

    Attributes:
        learning_rate: η, (R, 1, 1).
        vxx_reg: ε, (R, 1, 1), added to V_xx before the layer (Alg. 3, line 12).
        decay: λ of ℓ(u) = λ/2 |u|², (R, 1, 1); None is zero.
        momentum: μ in v ← μ v + M⁻¹ d, u ← u - η v, (R, 1, 1); None is zero.
        regularised: whether any ε may differ from zero.
    """

    learning_rate: Tensor
    vxx_reg: Tensor
    decay: Tensor | None = None
    momentum: Tensor | None = None
    regularised: bool = True

    def select(self, keep: Tensor) -> Rates:
        """Return the numbers of the members of these indices (K,)."""
        decay = None if self.decay is None else self.decay[keep]
        momentum = None if self.momentum is None else self.momentum[keep]
        return Rates(self.learning_rate[keep], self.vxx_reg[keep], decay, momentum, self.regularised)
