"""What a DDPNOpt sees on a batch: values, gains and preconditioners, layer by layer, with nothing changed.

    inspection = optimizer.inspect(inputs, targets)
    inspection.layers[1].V_xx.dense()
    inspection.layers[-1].K.singular_values(3)
    policy_spectrum(inspection)                                     # Fig. 8
    leading_feedback_image(optimizer, image, target, layer=2)       # Alg. 4, Fig. 5

A layer's policy is δu = Σ̄_b k_b + K_b δx_b (Alg. 3, line 10), with Σ̄ the sum or the mean over the batch, by
the optimizer's convention, and per sample

    k_b = -η M⁻¹ Q_u,   K_b = -η M⁻¹ Q_ux                                                          (Eq. 4)

K_b has as many rows as the layer has controls and stays an operator (`ddpnopt.ddp.operators`). Momentum and
Adam's first moment come on top of the policy and are not in k.

Index legend: t layer, b sample, o outputs, ī inputs and the constant one, p = o·ī controls, n entries of the
state that enters a layer, *shape its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ddpnopt.ddp.backward import FullValue, Gains, Policy, Sweep, Value
from ddpnopt.ddp.operators import DenseHessian, FeedbackGain, Hessian, OuterProductHessian, Place
from ddpnopt.ddp.outer_product import OuterProductGains, OuterProductValue
from ddpnopt.deconvolution import Path, layer_index, outside_training, roll_out
from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Affine
from ddpnopt.linalg import FactoredInverse
from ddpnopt.optimizers.base import Members
from ddpnopt.optimizers.ddpnopt import DDPNOpt as Sweeper
from ddpnopt.preconditioners import Units, direction
from ddpnopt.rates import Rates

if TYPE_CHECKING:
    from ddpnopt.torch_optimizer import LayerOptimizer

Side = Literal["state", "control"]


@dataclass(frozen=True, slots=True)
class LayerInspection:
    """One layer on one batch.

    `V_x`, `V_xx` and `K` raise ConfigError where they do not exist: at the first layer, whose state is the
    data and never moves, and (V_xx and K) where the feedback is off.

    Attributes:
        t: 0..T-1.
        name: of the module.
        x: the nominal state before the layer, (B, *shape).
        V_h: the value's gradient in h = g(x, u), (B, *outputs).
        k: the batch's open-loop gain -η M⁻¹ Σ̄_b Q_u, λu included, (o, ī).
        inverse: M⁻¹.
    """

    t: int
    name: str
    x: Tensor
    V_h: Tensor
    k: Tensor
    inverse: FactoredInverse
    _place: Place = field(repr=False)
    _policy: Policy = field(repr=False)
    _value: Value | None = field(repr=False)
    _decay: Tensor | None = field(repr=False)

    @property
    def V_x(self) -> Tensor:
        """Gradient of the value before the layer, (B, *shape)."""
        if self._value is None:
            raise ConfigError("layer", self.t, "1 to T - 1: no layer is left to use a value before the first")
        return self._value.V_x.squeeze(0)

    @property
    def V_xx(self) -> Hessian:
        """Hessian of the value before the layer, as an operator."""
        value = self._value
        if isinstance(value, OuterProductValue):
            return OuterProductHessian(value.z.squeeze(0))
        if isinstance(value, FullValue):
            return DenseHessian(value.V_xx.squeeze(0))
        raise self._missing("V_xx")

    @property
    def K(self) -> FeedbackGain:
        """Feedback gain, as an operator."""
        policy = self._policy
        if isinstance(policy, Gains | OuterProductGains):
            return FeedbackGain(policy, self._place)
        raise self._missing("K")

    def k_per_sample(self) -> Tensor:
        """Return k_b = -η M⁻¹ Q_u of each sample, (B, o, ī), whose Σ̄ is `k`; B·p numbers."""
        Q_u = self._place.gradient(self.V_h)
        return self._place.policy_step(Q_u if self._decay is None else Q_u + self._decay)

    def _missing(self, what: str) -> ConfigError:
        if self.t == 0:
            return ConfigError(
                "layer", 0, f"1 to T - 1: the first layer has no {what}, its state never moves"
            )
        return ConfigError("feedback", False, f"true: without feedback there is no {what}")


@dataclass(frozen=True, slots=True)
class Inspection:
    """A forward and a backward pass of DDPNOpt on one batch.

    Attributes:
        loss: mean over the batch, ().
        output: x_T, (B, outputs).
        layers: t = 0..T-1.
    """

    loss: Tensor
    output: Tensor
    layers: tuple[LayerInspection, ...]
    _path: Path = field(repr=False)

    def layer(self, layer: int) -> LayerInspection:
        """Return a layer by its number; negative ones count from the last.

        Raises:
            ConfigError: if there is no such layer.
        """
        return self.layers[layer_index(layer, len(self.layers))]

    def deconvolve(self, v: Tensor, layer: int) -> Tensor:
        """Project v (B, *shape) of a layer's state space back to image space: see `deconvolve`."""
        return self._path.deconvolve(v, layer)


def inspect(optimizer: LayerOptimizer, inputs: Tensor, targets: Tensor) -> Inspection:
    """Do DDPNOpt's forward and backward pass on a batch (Alg. 3, lines 5-13) and keep what they find.

    The parameters, the optimizer's state and the random number generator stay as they are; the preconditioner
    is the one that a step on this batch would use.

    Args:
        optimizer: a `DDPNOpt`.
        inputs: (B, *shape of a sample).
        targets: (B,) int64 labels, or (B, outputs) values for `mse`.

    Raises:
        ConfigError: for a baseline, which has no value function, or for inputs and targets that do not belong
            together.
    """
    inner = optimizer._inner
    if not isinstance(inner, Sweeper):
        raise ConfigError("optimizer", type(optimizer).__name__, "a DDPNOpt")
    if len(inputs) != len(targets) or len(inputs) == 0:
        allowed = "as many targets as inputs, and at least one"
        raise ConfigError("inputs", f"{len(inputs)} with {len(targets)} targets", allowed)
    with outside_training(inputs.device), _unchanged(inner):
        inner.members = replace(inner.members, rates=tuple(optimizer._current_rates()))
        controls = [slot.read() for slot in optimizer.slots]
        return inspect_member(inner, optimizer.names, controls, inputs, targets)


def inspect_member(
    inner: Sweeper, names: Sequence[str], controls: Sequence[Tensor], inputs: Tensor, targets: Tensor
) -> Inspection:
    """Do the same for an optimizer over a single member of a pack, which it may change.

    Args:
        inner: of one run.
        names: of the layers.
        controls: u_t, each (1, o, ī).
        inputs: (B, *shape of a sample), as the net of the pack takes them.
        targets: as of `inspect`.
    """
    with outside_training(inputs.device):
        inner.members = replace(inner.members, rates=tuple(map(_copied, inner.members.rates)))
        own = [u.clone() for u in controls]
        path = roll_out(inner.members.network, own, inputs)
        aim = targets.clone().unsqueeze(0)
        loss = inner.members.loss.value(path.trajectory.output, aim).mean()
        sweep = inner.sweep(own, path.trajectory, aim)
        inverses = [_own(inner.descent.preconditioner.inverse(t)) for t in range(len(own))]
        layers = _layers(names, path, inner.members, sweep, inverses, inner.units(aim))
    return Inspection(loss, path.trajectory.output.squeeze(0), layers, path)


def _layers(
    names: Sequence[str],
    path: Path,
    members: Members,
    sweep: Sweep,
    inverses: Sequence[FactoredInverse],
    units: Units,
) -> tuple[LayerInspection, ...]:
    layers = []
    for t, (policy, inverse) in enumerate(zip(sweep.policies, inverses, strict=True)):
        affine, u, rates = path.network.stages[t].affine, path.controls[t], members.rates[t]
        prepared = path.trajectory.inputs[t]
        x = _state(affine, prepared)
        Q_u = direction(affine.gradient(policy.V_h, prepared, u), u, units, rates.decay)
        place = Place(
            affine,
            tuple(x.shape[2:]),
            prepared.transpose(0, 1),
            u.expand(x.shape[1], -1, -1),
            inverse,
            rates.learning_rate,
        )
        layers.append(
            LayerInspection(
                t,
                names[t],
                x.squeeze(0),
                policy.V_h.squeeze(0),
                (-rates.learning_rate * inverse.apply(Q_u)).squeeze(0),
                inverse,
                place,
                policy,
                sweep.values[t],
                None if rates.decay is None else rates.decay * u * units.share,
            )
        )
    return tuple(layers)


def _state(affine: Affine, prepared: Tensor) -> Tensor:
    """Return x_t (1, B, *shape) of what `Affine.prepare` made of it."""
    nothing = prepared.new_zeros(*prepared.shape[:2], *affine.shape(prepared))
    return affine.difference(prepared, affine.prepare(nothing))


@contextmanager
def _unchanged(inner: Sweeper) -> Iterator[None]:
    """Put the optimizer's state back: its tensors are replaced and never written into."""
    state, members = inner.state(), inner.members
    try:
        yield
    finally:
        inner.load_state(state)
        inner.members = members


def _copied(rates: Rates) -> Rates:
    """Return a layer's numbers as tensors of our own: those of a step are inference tensors."""
    decay = None if rates.decay is None else rates.decay.clone()
    return replace(
        rates, learning_rate=rates.learning_rate.clone(), vxx_reg=rates.vxx_reg.clone(), decay=decay
    )


def _own(inverse: FactoredInverse) -> FactoredInverse:
    inputs, outputs, scale = (
        None if part is None else part.clone() for part in (inverse.inputs, inverse.outputs, inverse.scale)
    )
    return FactoredInverse(inputs, outputs, scale, inverse.rest)


def policy_spectrum(inspection: Inspection, layer: int = -1, side: Side = "state") -> Tensor:
    """Return the eigenvalues of a layer's feedback policy on the batch, descending (Fig. 8).

    K_b is no square matrix, and the paper does not say whose eigenvalues it shows. The two candidates are

        state     E_b[K_bᵀ K_b], n × n: how strongly the policy answers the directions of the state
        control   E_b[K_b K_bᵀ], p × p: how strongly it drives the directions of the controls

    On Fig. 8's Gaussian clusters, at the prediction layer, it is the first that has exactly as many
    eigenvalues as there are classes, from the first step to the last. There Q_ux = x̄ ⊗ ∇²φ W, so that every
    sample's policy answers the same directions, those of Wᵀ∇²φ: as many as classes where ∇²φ is regular
    (`mse`, `mmc`), one less with `cross_entropy`, which does not feel a common shift of all outputs. The
    second also counts the directions of x̄, and falls off gradually. `state` needs n ≥ classes.

    Cost: two gradients and a B × B matrix where K has rank one. Else `state` takes `FeedbackGain.gram`, and
    `control` the B·p·n numbers of all dense K and the Gram matrix of their columns, B·n × B·n (or p × p, if
    that is the smaller one).

    Args:
        inspection: of a batch.
        layer: t of 1..T-1; negative ones count from the last.
        side: `state` or `control`.

    Returns:
        (n,) resp. (B·n or p,), whichever is less, and at most B where K has rank one: the others are zero.

    Raises:
        ConfigError: if there is no such layer, or it has no feedback.
    """
    if side not in get_args(Side):
        raise ConfigError("side", side, "one of " + ", ".join(get_args(Side)))
    K = inspection.layer(layer).K
    if K.rank_one:
        rows = K.outer_factors() if side == "control" else K.outer_factors()[::-1]
        factor = rows[0] * torch.linalg.vector_norm(rows[1], dim=1, keepdim=True)
    elif side == "control":
        factor = K.dense().mT.flatten(0, 1)
    else:
        return _spectrum(K.gram().mean(dim=0))
    # The matrix of either side has the same eigenvalues but for zeros.
    smaller = factor @ factor.mT if len(factor) < factor.shape[1] else factor.mT @ factor
    return _spectrum(smaller / len(inspection.output))


def _spectrum(positive: Tensor) -> Tensor:
    eigenvalues: Tensor = torch.linalg.eigvalsh(positive)
    return eigenvalues.flip(0).clamp_min(0)


def leading_feedback_image(optimizer: LayerOptimizer, image: Tensor, target: Tensor, layer: int) -> Tensor:
    """Return the image of what a layer's feedback policy answers most strongly, δx_max (Alg. 4, Fig. 5).

    DDPNOpt's backward pass on the one image; the right-singular vector of the largest singular value of K_t;
    its projection back to image space. The sign of such a vector is arbitrary: it is chosen by
    `FeedbackGain.right_singular_vectors`.

    Args:
        optimizer: a `DDPNOpt`; it stays as it is.
        image: (*shape of a sample).
        target: its label, (), or values (outputs,) for `mse`.
        layer: t of 1..T-1; negative ones count from the last.

    Returns:
        (*shape of a sample).

    Raises:
        ConfigError: if the layer has no feedback, or its KᵀK would be too large.
    """
    inspection = inspect(optimizer, image.unsqueeze(0), target.unsqueeze(0))
    v_max = inspection.layer(layer).K.right_singular_vectors()[:, 0]
    return inspection.deconvolve(v_max, layer).squeeze(0)


class UpdateNorms:
    """|Δu_t| of each layer over a training (Fig. 6b).

        optimizer = DDPNOpt(model, "mmc", lr=0.03, track_updates=True)
        norms = UpdateNorms(optimizer)
        for inputs, targets in batches:
            optimizer.step(inputs, targets)
            norms.record()

    Attributes:
        names: of the layers' modules, t = 0..T-1.
    """

    def __init__(self, optimizer: LayerOptimizer) -> None:
        if not optimizer.track_updates:
            raise ConfigError("track_updates", False, "true: the optimizer keeps no norms")
        self.names = optimizer.names
        self._optimizer = optimizer
        self._steps: list[tuple[float, ...]] = []

    def record(self) -> None:
        """Keep the norms of the last step; a step that was not taken counts as zeros.

        Raises:
            ConfigError: if there was no step.
        """
        if not self._optimizer.update_norms:
            raise ConfigError("update_norms", (), "those of a step: there was none yet")
        self._steps.append(self._optimizer.update_norms)

    def history(self) -> Tensor:
        """Return |Δu_t| of every recorded step, (steps, T) float64."""
        return torch.tensor(self._steps, dtype=torch.float64).reshape(-1, len(self.names))

    def mean(self) -> Tensor:
        """Return |Δu_t|, averaged over the recorded steps, (T,) float64: a line of Fig. 6b."""
        return self.history().mean(dim=0)
