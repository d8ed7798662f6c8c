"""V_xx and K as operators on the states of a batch: nothing of size (controls × states) is built unasked.

Per sample, K = -η M⁻¹ Q_ux = -η M⁻¹ (g_uᵀ A + E) with A (outputs × inputs) and, of second-order dynamics,
E = V_h · g_ux (Eq. 4, 12, 26): the factors that the backward pass leaves in a layer's policy.

Index legend: b sample, o outputs, ī inputs and the constant one, p = o·ī controls, n entries of the state
that enters the layer, *shape its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from ddpnopt.ddp.backward import Gains
from ddpnopt.ddp.outer_product import OuterProductGains
from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Affine, Shape
from ddpnopt.layers.network import pull_back, push_forward
from ddpnopt.linalg import FactoredInverse

GRAM_ENTRIES: Final = 2**27
"""Most entries that the matrices KᵀK of a layer's gains may have together: 1 GiB in float64."""


@dataclass(frozen=True, slots=True)
class DenseHessian:
    """V_xx of the full forms, ε included (Alg. 3, line 12).

    Attributes:
        matrix: (B, n, n).
    """

    matrix: Tensor

    def dense(self) -> Tensor:
        """Return V_xx, (B, n, n)."""
        return self.matrix

    def matvec(self, dx: Tensor) -> Tensor:
        """Return V_xx δx, (B, *shape) to the same."""
        flat = dx.reshape(len(self.matrix), -1, 1)
        return torch.bmm(self.matrix, flat).reshape(dx.shape)


@dataclass(frozen=True, slots=True)
class OuterProductHessian:
    """V_xx = z zᵀ (Prop. 3). ε is not in it: it acts in the feedback gain of the layer below alone.

    Attributes:
        z: (B, *shape).
    """

    z: Tensor

    def dense(self) -> Tensor:
        """Return z zᵀ, (B, n, n)."""
        z = self.z.flatten(1)
        return z.unsqueeze(2) * z.unsqueeze(1)

    def matvec(self, dx: Tensor) -> Tensor:
        """Return z (zᵀ δx), (B, *shape) to the same."""
        overlap = (self.z * dx).flatten(1).sum(dim=1)
        return self.z * overlap.reshape(-1, *(1,) * (self.z.dim() - 1))


Hessian: TypeAlias = DenseHessian | OuterProductHessian


@dataclass(frozen=True, slots=True)
class Place:
    """A layer at its nominal point, with each sample as a run of its own: nothing is summed over the batch.

    Attributes:
        affine: g.
        shape: of one sample of the state.
        inputs: x, prepared, (B, 1, …).
        u: (B, o, ī), a view of one (o, ī).
        inverse: M⁻¹.
        rate: η, (1, 1, 1).
    """

    affine: Affine
    shape: Shape
    inputs: Tensor
    u: Tensor
    inverse: FactoredInverse
    rate: Tensor

    def gradient(self, v: Tensor) -> Tensor:
        """Return g_uᵀ v, (B, *outputs) to (B, o, ī)."""
        return self.affine.gradient(v.unsqueeze(1), self.inputs, self.u)

    def mixed(self, V_h: Tensor, dx: Tensor) -> Tensor:
        """Return E δx = (V_h · g_ux) δx, (B, *shape) to (B, o, ī)."""
        return self.affine.tangent_gradient(V_h.unsqueeze(1), dx.unsqueeze(1), self.u)

    def mixed_adjoint(self, V_h: Tensor, du: Tensor) -> Tensor:
        """Return Eᵀ δu, (B, o, ī) to (B, *shape): g is bilinear, so this is g_x(δu)ᵀ V_h."""
        return self.affine.pull_back(V_h.unsqueeze(1).unsqueeze(2), self.inputs, du).flatten(0, 2)

    def push_controls(self, du: Tensor) -> Tensor:
        """Return g_u δu, (B, o, ī) to (B, *outputs)."""
        return self.affine.push_controls(self.inputs, self.u, du).squeeze(1)

    def policy_step(self, d: Tensor) -> Tensor:
        """Return -η M⁻¹ d, (B, o, ī) to the same."""
        blocks = 1 if self.inverse.inputs is None else len(self.inverse.inputs)
        split = d.reshape(len(d), blocks, -1, d.shape[-1]).transpose(0, 1)
        return -self.rate * self.inverse.apply_per_sample(split).transpose(0, 1).reshape(d.shape)


@dataclass(frozen=True, slots=True)
class FeedbackGain:
    """K of one layer, per sample, as an operator from states (n) to controls (p).

    Attributes:
        policy: its factors.
        place: where it acts.
    """

    policy: Gains | OuterProductGains
    place: Place

    @property
    def rank_one(self) -> bool:
        """Whether K is an outer product: the outer-product form, where the incoming V_xx bears no ε."""
        if not isinstance(self.policy, OuterProductGains):
            return False
        return self.policy.vxx_reg is None or not bool(self.policy.vxx_reg.any())

    def apply(self, dx: Tensor) -> Tensor:
        """Return K δx, the answer of each sample's policy to its own δx.

        Args:
            dx: (B, *shape).

        Returns:
            (B, o, ī).
        """
        policy, place = self.policy, self.place
        d = place.gradient(policy.feedback(dx.unsqueeze(0)).squeeze(0))
        if policy.second_order:
            d = d + place.mixed(policy.V_h.squeeze(0), dx)
        return place.policy_step(d)

    def adjoint(self, du: Tensor) -> Tensor:
        """Return Kᵀ δu, (B, o, ī) to (B, *shape)."""
        policy, place = self.policy, self.place
        step = place.policy_step(du)
        dx = _feedback_adjoint(policy, place.push_controls(step)).reshape(-1, *place.shape)
        if policy.second_order:
            dx = dx + place.mixed_adjoint(policy.V_h.squeeze(0), step)
        return dx

    def dense(self) -> Tensor:
        """Return K, (B, p, n): n applications and B·p·n numbers."""
        return torch.stack([self.apply(unit).flatten(1) for unit in self._units()], dim=2)

    def gram(self) -> Tensor:
        """Return KᵀK, (B, n, n): n applications of K and of Kᵀ, and B·n² numbers.

        Raises:
            ConfigError: if they were more than `GRAM_ENTRIES`.
        """
        entries = len(self.place.u) * self._size() ** 2
        if entries > GRAM_ENTRIES:
            allowed = (
                f"at most {GRAM_ENTRIES}: fewer samples, or the outer-product form with vxx_reg 0, "
                "whose K has rank one and needs no KᵀK"
            )
            raise ConfigError("entries of KᵀK", entries, allowed)
        columns = [self.adjoint(self.apply(unit)).flatten(1) for unit in self._units()]
        gram = torch.stack(columns, dim=2)
        return (gram + gram.mT) / 2

    def singular_values(self, count: int = 1) -> Tensor:
        """Return the `count` largest singular values of each K, descending, (B, count).

        K of rank one: |η M⁻¹ q_u| |q_x| and zeros, for two gradients. Else `gram`, its eigenvectors (n³) and
        `count` applications of K, which make up for the digits that squares lose.

        Raises:
            ConfigError: if there are not so many, or KᵀK would be too large.
        """
        return self._svd(count)[0]

    def right_singular_vectors(self, count: int = 1) -> Tensor:
        """Return the right-singular vectors of the largest singular values, (B, count, *shape).

        They are the state differences that the policy answers most strongly. Each has length one, and its
        entry of largest magnitude is positive, since the sign is arbitrary. K of rank one has one, q_x/|q_x|,
        which is left zero where q_x is. Cost: see `singular_values`.

        Raises:
            ConfigError: if there are not so many, or KᵀK would be too large.
        """
        if self.rank_one and count > 1:
            raise ConfigError("count", count, "1: this K has rank one")
        vectors = self._svd(count)[1]
        return vectors.reshape(*vectors.shape[:2], *self.place.shape)

    def _svd(self, count: int) -> tuple[Tensor, Tensor]:
        """Return singular values (B, count) and right-singular vectors (B, count or 1, n)."""
        most = min(self._size(), self.place.u[0].numel())
        if not 1 <= count <= most:
            raise ConfigError("count", count, f"1 to {most}, the smaller side of K")
        values, vectors = self._outer_svd(count) if self.rank_one else self._gram_svd(count)
        largest = vectors.gather(2, vectors.abs().argmax(dim=2, keepdim=True))
        return values, vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)

    def _outer_svd(self, count: int) -> tuple[Tensor, Tensor]:
        left, right = self.outer_factors()
        length = torch.linalg.vector_norm(right, dim=1, keepdim=True)
        values = left.new_zeros(len(left), count)
        values[:, :1] = torch.linalg.vector_norm(left, dim=1, keepdim=True) * length
        return values, (right / torch.where(length > 0, length, 1.0)).unsqueeze(1)

    def _gram_svd(self, count: int) -> tuple[Tensor, Tensor]:
        basis = torch.linalg.eigh(self.gram())[1][:, :, -count:].mT  # (B, count, n)
        rows = [self.apply(v.reshape(-1, *self.place.shape)).flatten(1) for v in basis.unbind(dim=1)]
        left, values, _ = torch.linalg.svd(torch.stack(rows, dim=1), full_matrices=False)
        return values, torch.bmm(left.mT, basis)

    def outer_factors(self) -> tuple[Tensor, Tensor]:
        """Return l (B, p) and q_x (B, n) of a K = l q_xᵀ of rank one, l = -η M⁻¹ q_u (Eq. 16).

        Raises:
            ConfigError: if K is not of rank one.
        """
        policy = self.policy
        if not isinstance(policy, OuterProductGains) or not self.rank_one:
            allowed = "true, with vxx_reg 0: else K is no outer product"
            raise ConfigError("factorized", False, allowed)
        left = self.place.policy_step(self.place.gradient(policy.z_h.squeeze(0)))
        return left.flatten(1) * _weight(policy), policy.q_x.squeeze(0).flatten(1)

    def _size(self) -> int:
        return torch.Size(self.place.shape).numel()

    def _units(self) -> Iterator[Tensor]:
        """Yield the unit vectors of the state, each for all samples, (B, *shape)."""
        u = self.place.u
        for i in range(self._size()):
            unit = u.new_zeros(len(u), self._size())
            unit[:, i] = 1
            yield unit.reshape(-1, *self.place.shape)


def _feedback_adjoint(policy: Gains | OuterProductGains, v: Tensor) -> Tensor:
    """Return Aᵀ v, (B, *outputs) to (B, …) of n entries."""
    if isinstance(policy, Gains):
        return torch.bmm(policy.A.squeeze(0).mT, v.flatten(1).unsqueeze(2))
    overlap = (policy.z_h.squeeze(0) * v).flatten(1).sum(dim=1, keepdim=True) * _weight(policy)
    q_x = policy.q_x.squeeze(0)
    pulled = q_x * overlap.reshape(-1, *(1,) * (q_x.dim() - 1))
    if policy.vxx_reg is None:
        return pulled
    layer = policy.layer
    moved = push_forward(layer.jacobians, v.unsqueeze(0))
    damping = layer.pull_back(pull_back(layer.jacobians, moved.unsqueeze(2)))
    return pulled + policy.vxx_reg.squeeze() * damping.squeeze(2).squeeze(0)


def _weight(policy: OuterProductGains) -> Tensor:
    """Return w of A = w ẑ_h q̂_xᵀ, (B, 1) or what broadcasts to it."""
    return policy.weight.expand(1, -1, 1).squeeze(0)
