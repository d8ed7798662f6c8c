"""The interface of a preconditioner over a pack, and the statistics of a batch that it learns from.

Index legend: t layer, r run in the pack, b sample, o outputs, ī inputs and the constant one, n block of
controls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ddpnopt.config import BaselineOptions, Convention
from ddpnopt.layers.base import Affine
from ddpnopt.linalg import FactoredInverse, eigenbasis


@dataclass(frozen=True, slots=True)
class Units:
    """How per-sample quantities add up, by the convention of `docs/units.md`.

    Attributes:
        weight: 1 where Σ̄ sums over the batch (V_x in units of J), 1/B where it averages.
        to_loss: factor that turns V_h into units of φ: B resp. 1.
        share: part of ℓ(u) that each sample's Q bears, so that Σ̄ of all is ℓ: 1/B resp. 1.
    """

    weight: float
    to_loss: float
    share: float

    @classmethod
    def of(cls, convention: Convention, batch: int) -> Units:
        """Return the units of a convention for a batch of B samples."""
        if convention == "batch_mean":
            return cls(weight=1.0, to_loss=float(batch), share=1.0 / batch)
        return cls(weight=1.0 / batch, to_loss=1.0, share=1.0)


@dataclass(slots=True)
class LayerBatch:
    """One layer on one batch, as a preconditioner sees it; each statistic is computed when asked for.

    Attributes:
        affine: g_t.
        inputs: x_t, prepared.
        u: u_t before the update.
        V_h: (R, B, *outputs).
        units: of V_h.
        decay: λ, (R, 1, 1); None is zero.
    """

    affine: Affine
    inputs: Tensor
    u: Tensor
    V_h: Tensor
    units: Units
    decay: Tensor | None
    _gradient: Tensor | None = field(default=None, init=False)

    def mean_gradient(self) -> Tensor:
        """Return E[Q_u] = Σ̄_b V_h x̄ᵀ + λu, (R, o, ī)."""
        if self._gradient is None:
            self._gradient = direction(
                self.affine.gradient(self.V_h, self.inputs, self.u), self.u, self.units, self.decay
            )
        return self._gradient

    def mean_square(self, basis: FactoredInverse) -> Tensor:
        """Return E[(U_oᵀ ∇_u φ U_i)²] over the samples in units of φ, without λu: (N, o, ī)."""
        square = self.affine.mean_square(self.V_h, self.inputs, self.u, basis)
        return square * self.units.to_loss**2

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Return E[x̄ x̄ᵀ] (N, ī, ī) and E[V_h V_hᵀ] (N, o, o) in units of φ (Eq. 15)."""
        inputs, outputs = self.affine.covariances(self.V_h, self.inputs)
        return inputs, outputs * self.units.to_loss**2

    def covariance_bases(self) -> tuple[Tensor, Tensor]:
        """Return the factors' eigenvectors within what the batch spans, (N, ī, p) and (N, o, q)."""
        inputs, outputs = self.affine.covariance_rows(self.V_h, self.inputs)
        return eigenbasis(inputs), eigenbasis(outputs)


def direction(gradient: Tensor, u: Tensor, units: Units, decay: Tensor | None) -> Tensor:
    """Return Σ̄ + λu of a sum over the batch (R, o, ī)."""
    if units.weight != 1:
        gradient = gradient * units.weight
    return gradient if decay is None else gradient + decay * u


class Preconditioner(Protocol):
    """M_t of every layer t, for the members of one group of a pack."""

    def __init__(self, options: BaselineOptions) -> None: ...

    def observe(self, t: int, batch: LayerBatch) -> None:
        """Take in layer t's batch before its M_t is used."""
        ...

    def inverse(self, t: int) -> FactoredInverse:
        """Return M_t⁻¹, which stands for Q_uu⁻¹/η in the backward pass."""
        ...

    def precondition(self, t: int, direction: Tensor) -> Tensor:
        """Return M_t⁻¹ d for a direction d (R, o, ī), first moments included."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what is remembered between steps: tensors (R, …) or (N, …) by name, and counters."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        ...

    def select(self, keep: Tensor) -> None:
        """Keep only the members of these indices (K,)."""
        ...
