"""The preconditioners M_t of one layer as dense (p, p) matrices, with their state across steps (Table 2).

Each is a dataclass: its constructor takes the numbers of the method, the fields below "state" begin empty. A
fresh copy serves one layer for a whole run: `observe` takes the layer's batch in the backward pass and
returns M_t, `direction` takes the update direction d_t in the second forward pass and returns what M_t⁻¹ is
applied to.

Index legend: b sample of B, o outputs, ī inputs and the constant one (if the layer has a bias), p = o·ī
controls in row-major order of (o, ī), l positions at which the weights are applied (one in a fully connected
layer), c groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What the backward pass knows of one layer and one batch, in units of φ whatever the convention.

    Attributes:
        u: (o, ī), the control.
        weight_decay: λ.
        x_bar: (B, c, l, ī), what the weights of each group are applied to at each position.
        v: (B, o, l), V_h: the value's gradient in h, that of φ if the convention were `per_sample`.
        data_gradients: (B, p), u's gradient by V_h alone: Σ_l v_l x̄_lᵀ.
    """

    u: Tensor
    weight_decay: float
    x_bar: Tensor
    v: Tensor
    data_gradients: Tensor

    @property
    def gradients(self) -> Tensor:
        """Per-sample gradients of φ + λ/2 |u|², (B, p); their mean is Σ̄ Q_u under either convention."""
        return self.data_gradients + self.weight_decay * self.u.flatten()

    def groups(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield per group x̄ (B, l, ī), v (B, o/c, l) and the gradients by V_h (B, o/c, ī)."""
        count = self.x_bar.shape[1]
        gradients = self.data_gradients.reshape(len(self.v), *self.u.shape)
        yield from zip(
            self.x_bar.unbind(1), self.v.chunk(count, dim=1), gradients.chunk(count, dim=1), strict=True
        )


@dataclass
class Identity:
    """M = I."""

    def observe(self, seen: Observation) -> Tensor:
        return torch.eye(seen.u.numel(), dtype=seen.u.dtype)

    def direction(self, d: Tensor) -> Tensor:
        return d


def second_moment(seen: Observation, kind: str) -> Tensor:
    """Return s₂ (p,): "batch" is (Σ̄ Q_u)², "per_sample" the mean of the samples' squared gradients."""
    if kind == "batch":
        return seen.gradients.mean(0) ** 2
    if kind == "per_sample":
        return (seen.gradients**2).mean(0)
    raise ValueError(f"second_moment is {kind!r}, not 'batch' or 'per_sample'")


@dataclass
class RMSprop:
    """M = diag(√v + eps), v ← ρ v + (1 - ρ) s₂, v = 0 at first."""

    second_moment: str = "batch"
    rho: float = 0.99
    eps: float = 1e-8
    # state
    v: Tensor | float = field(default=0.0, init=False)

    def observe(self, seen: Observation) -> Tensor:
        self.v = self.rho * self.v + (1 - self.rho) * second_moment(seen, self.second_moment)
        return torch.diag(self.v.sqrt() + self.eps)

    def direction(self, d: Tensor) -> Tensor:
        return d


@dataclass
class Adam:
    """M = diag(√(v / (1 - β₂ᵏ)) + eps) at the k-th call, v as RMSprop's, with β₂ for ρ.

    The direction is m / (1 - β₁ᵏ), m ← β₁ m + (1 - β₁) d, m = 0 at first.
    """

    second_moment: str = "batch"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # state
    k: int = field(default=0, init=False)
    v: Tensor | float = field(default=0.0, init=False)
    m: Tensor | float = field(default=0.0, init=False)

    def observe(self, seen: Observation) -> Tensor:
        self.k += 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * second_moment(seen, self.second_moment)
        return torch.diag((self.v / (1 - self.beta2**self.k)).sqrt() + self.eps)

    def direction(self, d: Tensor) -> Tensor:
        self.m = self.beta1 * self.m + (1 - self.beta1) * d
        return self.m / (1 - self.beta1**self.k)


def average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """Return the running average: the first call takes the new value whole."""
    return new if old is None else decay * old + (1 - decay) * new


@dataclass
class KFAC:
    """M = (Ḡ + √γ/π I) ⊗ (Ā + π√γ I), π² = (tr Ā / dim Ā) / (tr Ḡ / dim Ḡ), block diagonal over groups.

    Ā = mean_b Σ_l x̄_l x̄_lᵀ and Ḡ = mean_{b,l} v_l v_lᵀ go into running averages at every call, and from
    there into M at the calls 1, 1 + inverse_every, 1 + 2 inverse_every, ...
    """

    damping: float = 1e-2
    factor_decay: float = 0.0
    inverse_every: int = 1
    # state
    calls: int = field(default=0, init=False)
    factors: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list, init=False)
    M: Tensor | None = field(default=None, init=False)

    def update_factors(self, seen: Observation) -> bool:
        """Take a batch into each group's Ā (ī, ī) and Ḡ (o/c, o/c); return whether to use them now."""
        self.calls += 1
        self.factors = self.factors or [(None, None)] * seen.x_bar.shape[1]
        batch, _, positions, _ = seen.x_bar.shape
        updated = []
        for (A, G), (x_bar, v, _) in zip(self.factors, seen.groups(), strict=True):
            new_A = torch.einsum("bli,blj->ij", x_bar, x_bar) / batch
            new_G = torch.einsum("bol,bql->oq", v, v) / (batch * positions)
            updated.append((average(A, new_A, self.factor_decay), average(G, new_G, self.factor_decay)))
        self.factors = updated
        return (self.calls - 1) % self.inverse_every == 0

    def damped(self, A: Tensor, G: Tensor) -> Tensor:
        """Return one group's block of M from Ā and Ḡ."""
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        root = self.damping**0.5
        eye_A, eye_G = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
        return torch.kron(G + root / pi * eye_G, A + pi * root * eye_A)

    def observe(self, seen: Observation) -> Tensor:
        if self.update_factors(seen):
            self.M = torch.block_diag(*[self.damped(A, G) for A, G in self.factors])
        return self.M

    def direction(self, d: Tensor) -> Tensor:
        return d


@dataclass
class EKFAC(KFAC):
    """M = (U_G ⊗ U_A) diag(s + γ) (U_G ⊗ U_A)ᵀ, block diagonal over groups.

    U_A, U_G are eigenvectors of KFAC's running averages, undamped, found anew when KFAC finds its M anew;
    s is the running average, at every call, of mean_b (U_Gᵀ g_b U_A)², g_b the sample's gradient by V_h. It
    goes on as it is when the basis changes.

    Where Ā or Ḡ has an eigenvalue twice, as zero in small batches, the basis is not determined by the
    factors. M still is if the g_b that s has seen have no share in such a space, as when factor_decay = 0
    and inverse_every = 1 and the eigenvalue is zero.
    """

    basis: list[Tensor] = field(default_factory=list, init=False)
    s: list[Tensor | None] = field(default_factory=list, init=False)

    def observe(self, seen: Observation) -> Tensor:
        if self.update_factors(seen):
            self.basis = [
                torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
                for A, G in self.factors
            ]
        self.s = self.s or [None] * len(self.basis)
        self.s = [
            average(old, ((g.flatten(1) @ U) ** 2).mean(0), self.factor_decay)
            for old, U, (_, _, g) in zip(self.s, self.basis, seen.groups(), strict=True)
        ]
        blocks = zip(self.basis, self.s, strict=True)
        return torch.block_diag(*[U @ torch.diag(s + self.damping) @ U.T for U, s in blocks])
