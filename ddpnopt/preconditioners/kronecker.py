"""Kronecker-factored M = E[x̄ x̄ᵀ] ⊗ E[V_h V_hᵀ] (Eq. 15): KFAC (Martens & Grosse, 2015) and EKFAC.

EKFAC (George et al., 2018) keeps the factors' eigenvectors and takes the second moments of the gradient
along them. Factors are averaged over steps by `factor_decay` (0: the current batch alone) and taken apart
every `inverse_every` steps. Convolutions: the factors of KFC (Grosse & Martens, 2016).

Index legend: n block of controls, o outputs, ī inputs and the constant one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpnopt.config import BaselineOptions
from ddpnopt.linalg import FactoredInverse, eigenvectors, eye_like, inverse_root
from ddpnopt.preconditioners.base import LayerBatch
from ddpnopt.preconditioners.memory import Memory, running_average


class _Kronecker(Memory):
    """Running averages of the two factors, and what was last made of them."""

    def __init__(self, options: BaselineOptions) -> None:
        super().__init__()
        self.options = options

    def update_factors(self, t: int, batch: LayerBatch) -> bool:
        """Average in the batch's factors; return whether this step takes them apart anew."""
        entries, decay = self.layer(t), self.options.factor_decay
        inputs, outputs = batch.covariances()
        entries["inputs"] = running_average(entries.get("inputs"), inputs, decay)
        entries["outputs"] = running_average(entries.get("outputs"), outputs, decay)
        step = entries.get("step", 0)
        entries["step"], entries["runs"] = step + 1, len(batch.u)
        if step % self.options.inverse_every == 0:
            return True
        # What was made of older factors does not outlive factors that are gone.
        for factor, root in ((inputs, "U_i"), (outputs, "U_o")):
            finite = torch.isfinite(factor).flatten(1).all(dim=1).reshape(-1, 1, 1)
            entries[root] = torch.where(finite, entries[root], torch.nan)
        return False

    def inverse(self, t: int) -> FactoredInverse:
        """See `Preconditioner.inverse`."""
        entries = self.layer(t)
        return FactoredInverse(entries["U_i"], entries["U_o"], entries.get("scale"), entries.get("rest"))

    def precondition(self, t: int, direction: Tensor) -> Tensor:
        """See `Preconditioner.precondition`."""
        return self.inverse(t).apply(direction)


class KFAC(_Kronecker):
    """M = (Ā + π√γ I) ⊗ (Ḡ + √γ/π I), with π² the ratio of the factors' mean eigenvalues and γ the damping.

    A factor that is not positive definite, which takes γ = 0 or numbers that are not finite, makes the
    update of its own run NaN.
    """

    def observe(self, t: int, batch: LayerBatch) -> None:
        """See `Preconditioner.observe`."""
        if not self.update_factors(t, batch):
            return
        entries = self.layer(t)
        inputs, outputs = entries["inputs"], entries["outputs"]
        pi = torch.sqrt(_mean_eigenvalue(inputs) / _mean_eigenvalue(outputs))
        root = self.options.damping**0.5
        # Where all activations or all gradients vanish, no ratio says how to share the damping.
        pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, 1.0)
        entries["U_i"] = inverse_root(inputs + pi * root * eye_like(inputs))
        entries["U_o"] = inverse_root(outputs + root / pi * eye_like(outputs))


class EKFAC(_Kronecker):
    """M = (U_o ⊗ U_i) diag(s + γ) (U_o ⊗ U_i)ᵀ with the factors' eigenvectors U.

    s = E[(U_oᵀ ∇_u φ U_i)²] are the second moments along them, γ is the damping.

    Of the current batch alone, factors of B samples have at most B eigenvalues that are not zero, and no
    gradient has a part beside their eigenvectors: M is γ there, and only these are computed. M is the same.

    Otherwise an eigenvalue that several eigenvectors share leaves their choice to the eigensolver, and M with
    it: with fewer samples than inputs and `inverse_every` above 1, say, two libraries differ by more than
    rounding (about 1e-4 of an update, seen between a CPU and a GPU, and after a change of 1e-14 in the data).
    """

    def observe(self, t: int, batch: LayerBatch) -> None:
        """See `Preconditioner.observe`."""
        entries, options = self.layer(t), self.options
        if options.factor_decay == 0 and options.inverse_every == 1 and options.damping > 0:
            self._observe_span(entries, batch)
            return
        if self.update_factors(t, batch):
            entries["U_i"] = eigenvectors(entries["inputs"])
            entries["U_o"] = eigenvectors(entries["outputs"])
        square = batch.mean_square(FactoredInverse(entries["U_i"], entries["U_o"]))
        entries["moments"] = running_average(entries.get("moments"), square, self.options.factor_decay)
        M = entries["moments"] + self.options.damping
        entries["scale"] = torch.where(torch.isinf(M), torch.nan, M.reciprocal())

    def _observe_span(self, entries: dict[str, Any], batch: LayerBatch) -> None:
        """Make M⁻¹ = I/γ + U (1/(s + γ) - 1/γ) Uᵀ, which has a zero where s has."""
        U_i, U_o = batch.covariance_bases()
        square = batch.mean_square(FactoredInverse(U_i, U_o))
        damping = self.options.damping
        M = square + damping
        finite = torch.where(torch.isinf(M), torch.nan, M.reciprocal())
        entries |= {"U_i": U_i, "U_o": U_o, "runs": len(batch.u), "step": entries.get("step", 0) + 1}
        whole = U_i.shape[1] == U_i.shape[2] and U_o.shape[1] == U_o.shape[2]
        entries["scale"] = finite if whole else square * finite * (-1 / damping)
        entries["rest"] = None if whole else 1 / damping


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1).reshape(-1, 1, 1)
