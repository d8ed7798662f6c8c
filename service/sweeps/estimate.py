"""What a run takes, in bytes and in seconds, from the sizes of its layers alone.

Rough on purpose: it decides how many runs share a pack, what is too large to be tried, and what `validate`
says. Only what dominates is counted: the trajectory and the factors of the gains, which a step keeps; the
intermediates of the largest layer, among them a convolution's patches and per-sample gradients and the
products of a full V_xx; Kronecker factors and what takes them apart; the chunk that metrics are taken on.
`tests/service/test_estimate.py` holds it to measurements.

Sizes of a layer, per sample: o outputs, i inputs with the constant one, p positions, h = o·p entries of the
output, n of the state that enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ddpnopt.config import (
    EVAL_CHUNK,
    PRECONDITIONER_OF,
    BaselineOptions,
    FeedbackConfig,
    LayerShape,
    PairedBaseline,
)

FLOPS_PER_SECOND: Final = 5e10
"""Of one CPU core inside large products."""

NUMBERS_PER_SECOND: Final = 3.5e8
"""At which one CPU core goes through all that a step holds, pass after pass: what small nets take."""

CALL_SECONDS: Final = 1e-4
"""Of one product of a convolution, however small: each run has its own."""

SOLVE_SECONDS: Final = 2e-6
"""Of one linear system, however small."""

TAKING_APART: Final = {"kfac": (4e-7, 1e-10), "ekfac": (1.6e-6, 9e-11)}
"""Seconds for the inverse or the eigenvectors of a matrix: times its size, and times its cube."""

CONTROLS_HELD: Final = {"identity": 1, "rmsprop": 6, "adam": 8, "kfac": 3, "ekfac": 6}
"""Tensors of the controls' size in a step: the direction, moments, and what becomes of them on the way."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's sizes, as the module's text names them."""

    o: int
    i: int
    p: int
    n: int
    convolution: bool

    @property
    def h(self) -> int:
        """Entries of the output."""
        return self.o * self.p

    @property
    def controls(self) -> int:
        """Entries of u, and of a sample's gradient."""
        return self.o * self.i

    @property
    def patches(self) -> int:
        """Entries of a sample's patches, which only convolutions build."""
        return self.i * self.p if self.convolution else 0

    @property
    def factors(self) -> int:
        """Entries of a pair of Kronecker factors."""
        return self.i**2 + self.o**2


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer, as far as its cost goes.

    Attributes:
        preconditioner: its name.
        options: of the baseline.
        feedback: resolved; None for a baseline, and where the feedback is off.
    """

    preconditioner: str
    options: BaselineOptions
    feedback: FeedbackConfig | None

    @classmethod
    def of(
        cls, baseline: PairedBaseline, options: BaselineOptions, feedback: FeedbackConfig | None
    ) -> Method:
        """Build it from a configuration."""
        off = feedback is None or not feedback.feedback
        return cls(PRECONDITIONER_OF[baseline], options, None if off else feedback)

    def as_outer_product(self) -> Method:
        """Return the same method with V_xx as an outer product, where it is a matrix."""
        if self.feedback is None:
            return self
        feedback = FeedbackConfig(terminal_hessian="gauss_newton", factorized=True)
        return replace(self, feedback=feedback)

    @property
    def outer_product(self) -> bool:
        """Whether V_xx is z zᵀ."""
        return self.feedback is not None and bool(self.feedback.factorized)

    @property
    def full(self) -> bool:
        """Whether V_xx is a matrix per sample."""
        return self.feedback is not None and not self.feedback.factorized

    @property
    def second_order(self) -> bool:
        """Whether the dynamics are of second order."""
        return self.full and self.feedback is not None and self.feedback.dynamics == "second_order"

    @property
    def psd(self) -> bool:
        """Whether the value step solves with Q_uu's own term."""
        return self.feedback is not None and self.feedback.safeguard == "psd"

    @property
    def kronecker(self) -> bool:
        """Whether the preconditioner has Kronecker factors."""
        return self.preconditioner in TAKING_APART

    @property
    def per_sample_squares(self) -> bool:
        """Whether the preconditioner takes each sample's gradient."""
        diagonal = self.preconditioner in ("rmsprop", "adam")
        return self.preconditioner == "ekfac" or (diagonal and self.options.second_moment == "per_sample")


def layers(shapes: Sequence[LayerShape], convolutions: int) -> tuple[Layer, ...]:
    """Return the sizes of a net's layers, the first of which are convolutions."""
    return tuple(
        Layer(s.outputs, s.inputs + 1, s.positions, s.state, t < convolutions) for t, s in enumerate(shapes)
    )


def numbers(net: Sequence[Layer], batch: int, method: Method) -> int:
    """Estimate the numbers that a run holds at the most, besides the data."""
    # A convolution's outputs are gathered from its runs, and torch lays its inputs out anew.
    metrics = max(EVAL_CHUNK * (layer.n + 2 * layer.h + layer.convolution * layer.n) for layer in net)
    return sum(layer.controls for layer in net) + max(_step_numbers(net, batch, method), metrics)


def seconds(net: Sequence[Layer], batch: int, method: Method) -> float:
    """Estimate a step's time on one CPU core, in a pack that fits."""
    convolutions = sum(layer.convolution for layer in net)
    solves = batch * (len(net) - 1) if method.psd and method.full else 0
    return (
        sum(_flops(layer, batch, method, first=t == 0) for t, layer in enumerate(net)) / FLOPS_PER_SECOND
        + _step_numbers(net, batch, method) / NUMBERS_PER_SECOND
        + convolutions * (3 if method.feedback is None else 8) * CALL_SECONDS
        + solves * SOLVE_SECONDS
        + _taking_apart(net, method)
    )


def metrics_seconds(net: Sequence[Layer], samples: int) -> float:
    """Estimate the time for one point of a run's curves, over this many samples."""
    flops = sum(2.0 * layer.controls * layer.p for layer in net)
    return samples * (
        flops / FLOPS_PER_SECOND + sum(layer.n + 2 * layer.h for layer in net) / NUMBERS_PER_SECOND
    )


def _step_numbers(net: Sequence[Layer], batch: int, method: Method) -> int:
    kept = sum(_kept(layer, batch, method, first=t == 0) for t, layer in enumerate(net))
    return kept + max(_passing(layer, batch, method, first=t == 0) for t, layer in enumerate(net))


def _kept(layer: Layer, batch: int, method: Method, *, first: bool) -> int:
    """Count what is held from a layer's turn to the end of the step."""
    n, h = layer.n, layer.h
    held = CONTROLS_HELD[method.preconditioner] + bool(method.options.momentum)
    per_sample = n + 2 * h
    if method.outer_product and not first:
        per_sample += 2 * h + 4 * n
    if method.full and not first:
        per_sample += h * n + n * n
    factors = 2 * layer.factors if method.kronecker else 0
    return held * layer.controls + factors + batch * per_sample


def _passing(layer: Layer, batch: int, method: Method, *, first: bool) -> int:
    """Count what is held during a layer's turn alone, at the worst of it."""
    n, h, patches, controls = layer.n, layer.h, layer.patches, layer.controls
    phases = [batch * (2 * h + n)]
    if method.kronecker:
        phases.append(3 * batch * patches + 3 * layer.factors)
    if method.per_sample_squares:
        squares = 2 * patches + 4 * controls if layer.convolution else layer.i + layer.o
        phases.append(batch * (2 * h + n + squares))
    if method.outer_product and not first and layer.convolution:
        rotated = 9 if method.kronecker else 5
        phases.append(batch * (4 * h + 3 * patches + rotated * controls))
    if method.full and not first:
        # A and X are (h, n); V_hh, the matrix of the psd solve and a convolution's S are (h, h).
        per_sample = h * n + (3 if layer.convolution else 2 if method.psd else 1) * h * h + 2 * patches
        if method.second_order:
            per_sample += 2 * h * n + 2 * n * n + (2 * n * controls if layer.convolution else 0)
        phases.append(batch * per_sample)
    return max(phases)


def _flops(layer: Layer, batch: int, method: Method, *, first: bool) -> float:
    """Count a step's operations inside products."""
    n, h, p, controls = layer.n, layer.h, layer.p, layer.controls
    product = controls * p
    flops = 3 * product
    if method.feedback is not None:
        flops += (5 if method.outer_product else 2) * product
    if layer.convolution and (method.outer_product or method.per_sample_squares):
        flops += 2 * product
    if method.kronecker:
        flops += p * layer.factors
        if layer.convolution:
            flops += controls * (layer.i + layer.o)
    if method.full and not first:
        flops += 2 * h * h * n if layer.convolution else h * h * n
        flops += h * n * n
        if layer.convolution:
            flops += h * product + layer.i * p * p * (1 if method.preconditioner == "identity" else layer.o)
        if method.psd:
            flops += h**3 + h * h * n
        if method.second_order:
            flops += 2 * h * n * n
            flops += n * (product + n * controls) if layer.convolution else 0
            if method.kronecker:
                flops += (n if layer.convolution else 2) * controls * (layer.i + layer.o)
    return 2.0 * batch * flops


def _taking_apart(net: Sequence[Layer], method: Method) -> float:
    """Estimate the time for the eigenvectors or inverses of Kronecker factors, spread over the steps."""
    if not method.kronecker:
        return 0.0
    linear, cubic = TAKING_APART[method.preconditioner]
    sizes = [size for layer in net for size in (layer.i, layer.o)]
    return sum(linear * size + cubic * size**3 for size in sizes) / method.options.inverse_every
