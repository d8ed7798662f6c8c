"""Diagonal M: RMSprop (Table 2) and Adam, equal to torch.optim's where the feedback is off."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpnopt.config import BaselineOptions
from ddpnopt.linalg import FactoredInverse
from ddpnopt.preconditioners.base import LayerBatch
from ddpnopt.preconditioners.memory import Memory


class _Diagonal(Memory):
    """M from a running average of the gradient's second moment."""

    def __init__(self, options: BaselineOptions) -> None:
        super().__init__()
        self.options = options
        self._inverse: dict[int, Tensor] = {}

    def second_moment(self, batch: LayerBatch) -> Tensor:
        """Return E[Q_u]², as torch does, or E[Q_u ⊙ Q_u] as Table 2 writes it: (R, o, ī)."""
        mean = batch.mean_gradient()
        if self.options.second_moment == "batch":
            return mean * mean
        square = batch.mean_square(FactoredInverse())
        if batch.decay is None:
            return square
        # E[(g + λu)²] = E[g²] + 2 λu E[g] + (λu)² with E[g] + λu the mean gradient.
        shift = batch.decay * batch.u
        return square + shift * (2 * mean - shift)

    def average(self, t: int, batch: LayerBatch, decay: float) -> Tensor:
        """Return v ← decay v + (1 - decay) s₂, from v = 0."""
        entries = self.layer(t)
        moment = (1 - decay) * self.second_moment(batch)
        entries["v"] = moment if "v" not in entries else decay * entries["v"] + moment
        entries["runs"] = len(batch.u)
        v: Tensor = entries["v"]
        return v

    def inverse(self, t: int) -> FactoredInverse:
        """Return diag(1/M)."""
        return FactoredInverse(scale=self._inverse[t])

    def select(self, keep: Tensor) -> None:
        """See `Preconditioner.select`."""
        super().select(keep)
        self._inverse = {t: inverse[keep] for t, inverse in self._inverse.items()}


class RMSprop(_Diagonal):
    """M = sqrt(v) + eps with v ← ρ v + (1 - ρ) s₂."""

    def observe(self, t: int, batch: LayerBatch) -> None:
        """See `Preconditioner.observe`."""
        v = self.average(t, batch, self.options.rho)
        self._inverse[t] = _reciprocal(torch.sqrt(v) + self.options.eps)

    def precondition(self, t: int, direction: Tensor) -> Tensor:
        """See `Preconditioner.precondition`."""
        return direction * self._inverse[t]


class Adam(_Diagonal):
    """M = sqrt(v / (1 - β₂ᵏ)) + eps; the first moment is that of the direction d (Fig. 9)."""

    def observe(self, t: int, batch: LayerBatch) -> None:
        """See `Preconditioner.observe`."""
        beta2 = self.options.betas[1]
        v = self.average(t, batch, beta2)
        entries = self.layer(t)
        entries["step"] = entries.get("step", 0) + 1
        corrected = torch.sqrt(v / (1 - beta2 ** entries["step"]))
        self._inverse[t] = _reciprocal(corrected + self.options.eps)

    def precondition(self, t: int, direction: Tensor) -> Tensor:
        """See `Preconditioner.precondition`."""
        beta1 = self.options.betas[0]
        entries = self.layer(t)
        new = (1 - beta1) * direction
        entries["m"] = new if "m" not in entries else beta1 * entries["m"] + new
        step: Tensor = entries["m"] * self._inverse[t] / (1 - beta1 ** entries["step"])
        return step


def _reciprocal(M: Tensor) -> Tensor:
    # NaN where M is infinite: zero would hold its entry of u for good.
    return torch.where(torch.isinf(M), torch.nan, M.reciprocal())
