"""What a run takes, in bytes and in seconds, from the sizes of its layers alone.

It decides how many runs share a pack, what is too large to be tried, and what `validate` says. Baselines that
have no DDPNOpt partner are in `estimate_lone`, the fast path in `estimate_lanes`.

*Memory* is that of the tensor path, held to within a quarter of what torch allocates at the peak. A `Book`
follows the passes of a step as `ddpnopt` does them, and enters which tensors a layer's turn leaves behind and
which it has for a moment only; the peak is the largest sum. `tests/service/test_estimate.py` measures both
sides, and so does `make bench-memory`, in more settings.

*Time* is rough: the large products, and how long a core takes to go through what a step holds.

Sizes of a layer, per sample: o outputs, i inputs with the constant one, p positions, h = o·p entries of the
output, n of the state that enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ddpnopt.config import (
    EVAL_CHUNK,
    PRECONDITIONER_OF,
    Activation,
    BaselineOptions,
    DType,
    FeedbackConfig,
    LayerShape,
    PairedBaseline,
)
from ddpnopt.lanes.rules import NUMBER_BYTES

CONTROLS_HELD: Final = {"identity": 0, "rmsprop": 2, "adam": 3, "kfac": 0, "ekfac": 2}
"""Tensors of the controls' size that a preconditioner keeps between steps: the moments, and 1/M."""

FACTORS_HELD: Final = {"identity": 0, "rmsprop": 0, "adam": 0, "kfac": 2, "ekfac": 2}
"""Pairs of matrices of the Kronecker factors' size that are kept: the averages, and their inverses' roots or
their eigenvectors."""

MOMENTS_PASSING: Final = {"identity": 0.0, "rmsprop": 3.25, "adam": 4.25, "kfac": 0.0, "ekfac": 3.25}
"""Tensors of the controls' size while 1/M is made: the new moment, M, 1/M, 1/M without infinities, whose mask
has a quarter of the bytes; Adam's has its correction besides."""

STEP_PASSING: Final = {"identity": 0, "rmsprop": 1, "adam": 3, "kfac": 3, "ekfac": 3}
"""Tensors of the controls' size while M⁻¹ d is made: the product; Adam's new first moment with its two terms;
the direction in the factors' bases."""

ACTIVATION_PASSING: Final[dict[Activation, float]] = {
    "tanh": 1,
    "relu": 1,
    "sigmoid": 2,
    "leaky_relu": 2.25,
    "gelu": 2,
    "identity": 0,
}
"""Tensors of the output's size, the result among them, while σ is taken."""

LOSS_PASSING: Final = 2
"""Tensors of the outputs' size while the loss is taken: logarithms of probabilities, and exponentials."""

KEEPS_INPUT: Final[tuple[Activation, ...]] = ("leaky_relu", "gelu")
"""Activations whose slope is taken from h, which has to be kept; the others' is taken from σ(h)."""

BLOCK: Final = 16
"""Channels that oneDNN's convolutions of float32 take at once, by vectors of 64 bytes; zeros fill them up."""

FLOPS_PER_SECOND: Final = 5e10
"""Of one CPU core inside large products."""

NUMBERS_PER_SECOND: Final = 3.5e8
"""At which one CPU core goes through all that a step holds, pass after pass: what small nets take."""

CALL_SECONDS: Final = 1e-4
"""Of one product of a convolution, however small: each run has its own."""

SOLVE_SECONDS: Final = 2e-6
"""Of one linear system, however small."""

PACK: Final = 64
"""Runs of a pack whose time is estimated."""

TAKING_APART: Final = {"kfac": (4e-7, 1e-10), "ekfac": (1.6e-6, 9e-11)}
"""Seconds for the inverse or the eigenvectors of a matrix by LAPACK: times its size, and times its cube."""

JACOBI: Final = (32, 1.5e-9)
"""Side up to which eigenvectors come from many matrices at once, and seconds for them times its cube."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's sizes, as the module's text names them.

    Attributes:
        after: entries of the state that σ makes of the output.
        activation: in σ.
        first: whether the batch itself enters, to which nothing is handed back.
    """

    o: int
    i: int
    p: int
    n: int
    convolution: bool
    after: int
    activation: Activation
    first: bool

    @property
    def h(self) -> int:
        """Entries of the output."""
        return self.o * self.p

    @property
    def channels(self) -> int:
        """Of the state that enters a convolution, whose images keep their size."""
        return self.n // self.p

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

    @property
    def pooled(self) -> bool:
        """Whether σ ends with a maximum over windows."""
        return self.after != self.h

    @property
    def slopes(self) -> int:
        """Entries of σ'."""
        return 0 if self.activation == "identity" else self.h

    @property
    def pulled(self) -> int:
        """Entries of a cotangent that σ pulls back, for which it needs new memory."""
        return self.h if self.slopes or self.pooled else 0


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer, as far as its cost goes.

    Attributes:
        preconditioner: its name.
        options: of the baseline.
        feedback: resolved; None for a baseline, and where the feedback is off.
        open_loop: whether the feedback is off: the baseline's step, by a policy.
    """

    preconditioner: str
    options: BaselineOptions
    feedback: FeedbackConfig | None
    open_loop: bool = False

    @classmethod
    def of(
        cls, baseline: PairedBaseline, options: BaselineOptions, feedback: FeedbackConfig | None
    ) -> Method:
        """Build it from a configuration."""
        open_loop = feedback is not None and not feedback.feedback
        return cls(PRECONDITIONER_OF[baseline], options, None if open_loop else feedback, open_loop)

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
    def diagonal(self) -> bool:
        """Whether the preconditioner is a diagonal of second moments."""
        return self.preconditioner in ("rmsprop", "adam")

    @property
    def scaled(self) -> bool:
        """Whether M⁻¹ has a diagonal, in whatever basis."""
        return self.diagonal or self.preconditioner == "ekfac"

    @property
    def spanned(self) -> bool:
        """Whether eigenvectors are those that the batch spans, and averages are not kept."""
        options = self.options
        alone = options.factor_decay == 0 and options.inverse_every == 1 and options.damping > 0
        return self.preconditioner == "ekfac" and alone

    @property
    def per_sample_squares(self) -> bool:
        """Whether the preconditioner takes each sample's gradient."""
        return self.preconditioner == "ekfac" or (
            self.diagonal and self.options.second_moment == "per_sample"
        )


def layers(
    shapes: Sequence[LayerShape],
    convolutions: int,
    activation: Activation = "tanh",
    output: Activation = "identity",
) -> tuple[Layer, ...]:
    """Return the sizes of a net's layers.

    Args:
        shapes: of the layers with controls, t = 0..T-1.
        convolutions: how many of them, the first ones, are convolutions.
        activation: after every layer but the last.
        output: after the last.
    """
    after = [s.state for s in shapes[1:]] + [shapes[-1].outputs]
    sigmas = [activation] * (len(shapes) - 1) + [output]
    return tuple(
        Layer(s.outputs, s.inputs + 1, s.positions, s.state, t < convolutions, after[t], sigmas[t], t == 0)
        for t, s in enumerate(shapes)
    )


# --- memory of the tensor path ---


def numbers(
    net: Sequence[Layer],
    batch: int,
    method: Method,
    samples: int = EVAL_CHUNK,
    *,
    runs: int = 1,
    dtype: DType = "float32",
) -> int:
    """Estimate the numbers that a run holds at the most, besides the data, where it trains as tensors.

    Args:
        net: the layers.
        batch: B.
        method: the optimizer.
        samples: of the larger set that metrics are taken on; more than a chunk makes no difference. 0 where
            they are taken in lanes.
        runs: R, of the pack: what it has once, for one run at a time, is divided by it.
        dtype: of the numbers.
    """
    step, metrics = (Book(net, batch, method, runs, dtype) for _ in range(2))
    step.enter_step()
    metrics.enter_metrics(min(samples, EVAL_CHUNK))
    return math.ceil(max(step.peak, metrics.peak))


def most_runs(
    net: Sequence[Layer],
    batch: int,
    method: Method,
    limit: int,
    samples: int = EVAL_CHUNK,
    *,
    dtype: DType = "float32",
) -> int:
    """Return how many runs a pack may have whose numbers are at most `limit`; 0 if one is too many."""
    return most(lambda runs: limit // numbers(net, batch, method, samples, runs=runs, dtype=dtype))


def most(fitting: Callable[[int], int]) -> int:
    """Return how many runs fit, by how many would if each took what it takes in a pack of so many."""
    if (alone := fitting(1)) < 2:
        return alone
    # From two on, a run takes no more in a larger pack.
    return 1 if (some := fitting(2)) < 2 else fitting(some)


def bases(layer: Layer, batch: int, method: Method) -> tuple[int, int]:
    """Return how many vectors the bases of the two Kronecker factors have, of inputs and of outputs."""
    if not method.spanned:
        return layer.i, layer.o
    rows = batch * layer.p
    return min(rows, layer.i), min(rows, layer.o)


@dataclass(slots=True)
class Book:
    """What a run holds while its pack trains as tensors, in numbers.

    Attributes:
        net, batch, method, runs, dtype: see `numbers`.
        held: now.
        peak: at the most so far.
    """

    net: Sequence[Layer]
    batch: int
    method: Method
    runs: int
    dtype: DType
    held: float = 0.0
    peak: float = 0.0

    def hold(self, entries: float) -> None:
        """Enter what stays."""
        self.held += entries
        self.peak = max(self.peak, self.held)

    def release(self, entries: float) -> None:
        """Strike what goes."""
        self.held -= entries

    def need(self, *phases: float) -> None:
        """Enter what comes and goes, in phases one after the other."""
        self.peak = max(self.peak, self.held + max(phases))

    # The passes, as `ddpnopt` does them.

    def enter_metrics(self, samples: int) -> None:
        """Enter metrics of a chunk: the state, the output and σ's of one layer.

        The chunk itself is the same for all runs. The outputs of the chunk before are still there.
        """
        outputs = self.net[-1].h
        self.hold(sum(map(self.remembered, self.net)))
        for layer in self.net:
            state = 0 if layer.first else layer.n
            self.need(samples * (state + outputs + self.output(layer)))
        self.need(samples * (outputs + LOSS_PASSING * outputs))

    def enter_step(self) -> None:
        """Enter an update."""
        self.hold(sum(map(self.remembered, self.net)))
        self.enter_forward_pass()
        if self.method.full:
            self.enter_full_sweep()
        elif self.method.outer_product or self.method.open_loop:
            self.enter_sweep_of_rows()
        else:
            self.enter_backpropagation()
            return
        self.enter_second_forward_pass()

    def enter_forward_pass(self) -> None:
        """Enter the batch, with its indices and labels, and the trajectory."""
        self.hold(self.batch * (self.net[0].n + 2 * self.index))
        for layer in self.net:
            self.need(self.batch * self.output(layer))
            self.hold(self.batch * self.tape(layer))
        self.need(self.batch * LOSS_PASSING * self.net[-1].h)

    def enter_backpropagation(self) -> None:
        """Enter a baseline's turns, each of which leaves its gradient for the search of what diverged."""
        batch = self.batch
        self.hold(batch * self.net[-1].h)  # ∇φ
        behind = 0  # the cotangent of the layer after, which goes when this layer's is complete
        for layer in reversed(self.net):
            own = batch * (layer.slopes + layer.pulled)
            self.hold(own)
            self.need(behind + batch * (layer.h if layer.pooled else 0))
            if not layer.first:
                self.need(behind + batch * self.handed_back(layer))
                self.hold(batch * layer.n)
                self.release(batch * layer.after)
            self.need(self.observing(layer), self.gradient(layer))
            self.hold(layer.controls)
            self.need(self.stepping(layer))
            self.release(own)
            behind = batch * layer.pulled

    def enter_sweep_of_rows(self) -> None:
        """Enter a sweep's turns with V_x alone, or with z beside it: two rows, of which V_h and z_h stay.

        So do σ' and η M⁻¹ λu where there is a feedback, whose part with ε takes them.
        """
        batch, rows = self.batch, 2 if self.method.outer_product else 1
        terminal = batch * self.net[-1].h  # ∇φ
        self.hold(terminal * (3 if rows == 2 else 1))
        value = 0
        for layer in reversed(self.net[1:]):
            once = batch * layer.slopes + self.decay_step(layer)
            self.hold(once + rows * batch * layer.pulled)
            self.need(rows * batch * layer.h if layer.pooled else 0)
            self.release(value if layer.pulled else 0)
            self.need(self.observing(layer))
            # A convolution's two rows are laid out anew.
            anew = 2 * layer.h if layer.convolution and rows == 2 else 0
            self.need(batch * (anew + rows * self.handed_back(layer)))
            value = rows * batch * layer.n
            self.hold(value)
            if self.method.outer_product:
                self.need(self.outer_product_value(layer))
            else:
                self.release(once)
        self.enter_first_turn()
        self.release(value + terminal)

    def enter_full_sweep(self) -> None:
        """Enter a sweep's turns with V_xx as a matrix per sample: V_h and A (h × n) of each layer stay."""
        batch, outputs = self.batch, self.net[-1].h
        # Probabilities as a diagonal, their products, and the difference.
        self.need(batch * (outputs + 3 * outputs**2))
        terminal = batch * (outputs + 2 * outputs**2)  # ∇φ and the Hessian, before and after its scaling
        self.hold(terminal)
        value = 0
        for layer in reversed(self.net[1:]):
            h, n = layer.h, layer.n
            V_hh = batch * layer.pulled * h
            # A pool pulls back rows, then columns; slopes are multiplied from either side.
            self.need(batch * h * (h + layer.after) if layer.pooled else 0, 2 * V_hh)
            self.hold(V_hh + batch * layer.pulled)
            if layer.pulled:
                self.release(value)
            else:  # V_xx itself
                V_hh = value
            passing = batch * layer.slopes + self.decay_step(layer)
            self.hold(passing)
            self.need(self.observing(layer))
            self.need(batch * h * self.handed_back(layer))
            self.hold(batch * h * n)
            self.need(self.second_order_value(layer) if self.method.second_order else self.full_value(layer))
            value = batch * (n * n + n)
            self.hold(value)
            self.release(passing + V_hh)
        self.enter_first_turn()
        self.release(value + terminal)

    def enter_first_turn(self) -> None:
        """Enter the last turn of a sweep, at the first layer: only V_h is left to do."""
        layer, batch = self.net[0], self.batch
        self.hold(batch * (layer.slopes + layer.pulled))
        self.need(batch * (layer.h if layer.pooled else 0), self.observing(layer))
        self.release(batch * layer.slopes)

    def enter_second_forward_pass(self) -> None:
        """Enter the turns of the second forward pass, each of which leaves its direction."""
        batch = self.batch
        behind = 0  # the output of the layer before
        for layer in self.net:
            h = batch * layer.h
            moved = 0 if layer.first else 2 * batch * layer.n  # x̂ and δx
            self.hold(behind + moved)
            self.need(0 if layer.first else self.closing(layer))
            closed = 0 if self.method.open_loop else h
            self.need(closed + self.gradient(layer), closed + self.tangent_gradient(layer))
            self.hold(layer.controls)
            self.need(self.stepping(layer), batch * self.output(layer))
            self.release(behind + moved)
            behind = h

    # What is kept and what a turn takes.

    @property
    def index(self) -> int:
        """Numbers that an index or a label of 8 bytes takes as much as."""
        return 8 // NUMBER_BYTES[self.dtype]

    def remembered(self, layer: Layer) -> int:
        """Count what is held of a layer between steps: its controls, a velocity, and what M is made of."""
        own = (1 + bool(self.method.options.momentum)) * layer.controls
        if self.method.spanned:
            p, q = bases(layer, self.batch, self.method)
            return own + layer.i * p + layer.o * q + p * q
        name = self.method.preconditioner
        return own + CONTROLS_HELD[name] * layer.controls + FACTORS_HELD[name] * layer.factors

    def tape(self, layer: Layer) -> int:
        """Count per sample what the forward pass leaves: the next state, what σ' takes, a pool's indices."""
        keeps = layer.slopes if layer.pooled or layer.activation in KEEPS_INPUT else 0
        return layer.after + keeps + (self.index * layer.after if layer.pooled else 0)

    def gathered(self, entries: int, workspace: float) -> float:
        """Count a convolution's results: each run's own and the stack of them, or a workspace for one."""
        return max(entries * (1 if self.runs == 1 else 2), entries + workspace / self.runs)

    def output(self, layer: Layer) -> float:
        """Count per sample the output, and what there is besides while it is made and while σ is taken."""
        made = self.gathered(layer.h, self.convolving(layer)) if layer.convolution else layer.h
        return max(made, layer.h * (1 + ACTIVATION_PASSING[layer.activation]))

    def handed_back(self, layer: Layer) -> float:
        """Count per row and sample what g_xᵀ v takes."""
        if not layer.convolution:
            return layer.n
        channels = _blocked(layer.o) + _blocked(layer.channels)
        workspace = layer.p * channels if self.dtype == "float32" else layer.n
        return self.gathered(layer.n, workspace)

    def convolving(self, layer: Layer) -> int:
        """Count per sample the workspace of one run's convolution: in blocks of channels, or its patches."""
        if self.dtype == "float64":
            return layer.p * (layer.i - 1)
        few = layer.channels < BLOCK  # which are read as they lie
        inputs = 0 if few else _blocked(layer.channels)
        return layer.p * max(inputs + _blocked(layer.o) - layer.o, _blocked(layer.o))

    def gradient(self, layer: Layer) -> float:
        """Count a gradient's tensors: of W and with b's column; or with λu and the sum of both."""
        tensors = (3 if self.method.options.weight_decay else 2) * layer.controls
        if not layer.convolution:
            return tensors
        workspace = self.batch * (self.convolving(layer) + layer.h) / self.runs
        return max(tensors, layer.controls + workspace)

    def tangent_gradient(self, layer: Layer) -> int:
        """Count what dynamics of second order add to a gradient: δx with b's zero, Σ̄ V_h δxᵀ, and the sum."""
        if layer.first or not self.method.second_order:
            return 0
        return self.batch * layer.i + 3 * layer.controls

    def stepping(self, layer: Layer) -> int:
        """Count what M⁻¹ d takes, and a new velocity: M⁻¹ d, μ v and their sum."""
        tensors = STEP_PASSING[self.method.preconditioner]
        if self.method.options.momentum:
            tensors = max(tensors, 2 + (self.method.preconditioner != "identity"))
        return tensors * layer.controls

    def decay_step(self, layer: Layer) -> int:
        """Count η M⁻¹ λu, which a layer's turn has where there is weight decay."""
        return layer.controls if self.method.options.weight_decay else 0

    def observing(self, layer: Layer) -> float:
        """Count what it takes to learn M from a batch, besides what is remembered."""
        if self.method.spanned:
            return self.observing_span(layer)
        if self.method.kronecker:
            return self.observing_factors(layer)
        if not self.method.diagonal:
            return 0
        passing = MOMENTS_PASSING[self.method.preconditioner]
        phases = [self.gradient(layer), (1 + passing) * layer.controls]
        if self.method.per_sample_squares:
            phases.append(layer.controls + self.squares(layer))
        return max(phases)

    def observing_factors(self, layer: Layer) -> float:
        """Count what it takes to learn Kronecker factors: their products, averages, and taking them apart."""
        method, i, o = self.method, layer.i**2, layer.o**2
        # Patches are laid out anew for a product over samples and positions.
        factors = 2 * layer.patches + 2 * layer.h if layer.convolution else layer.i
        phases: list[float] = [self.batch * factors + 2 * i, i + 2 * o]
        if method.options.factor_decay:
            # The batch's two factors, and of each in turn its share, the average's, and their sum.
            phases.append(i + o + 3 * max(i, o))
        phases.append(self.taking_apart(max(layer.i, layer.o)))
        if method.per_sample_squares:
            averaged = bool(method.options.factor_decay)
            phases.append(self.squares(layer))
            phases.append((MOMENTS_PASSING[method.preconditioner] + averaged) * layer.controls)
        return max(phases)

    def observing_span(self, layer: Layer) -> float:
        """Count what it takes to find the eigenvectors that the batch spans, and the moments along them."""
        p, q = bases(layer, self.batch, self.method)
        # Patches are laid out anew, so that each of a sample's positions is a row.
        rows = self.batch * (layer.patches + layer.h if layer.convolution else layer.i)
        found = layer.i * p + layer.o * q
        return max(
            2 * rows if layer.convolution else 0,
            rows + self.spanning(layer.i, p),
            rows + layer.i * p + self.spanning(layer.o, q),
            found + self.squares(layer),
            found + 4 * p * q,  # the moments, M, 1/M, and 1/M without infinities
        )

    def spanning(self, size: int, count: int) -> float:
        """Count what so many eigenvectors of a factor take: by the factor, or by its rows' products."""
        product = count**2 + self.taking_apart(count)
        return product if count == size else max(product, 2 * count**2 + 2 * size * count)

    def taking_apart(self, size: int) -> float:
        """Count what Cholesky factors or eigenvectors of matrices take, with LAPACK's workspace for one."""
        if self.method.preconditioner == "kfac":
            return 4 * size**2  # damped, Cholesky factor, its inverse, the same without failures
        # Copy, eigenvectors, the same without failures; before the last of these the workspace.
        return (2 + max(1.0, 2 / self.runs)) * size**2

    def squares(self, layer: Layer) -> float:
        """Count what the mean square of samples' gradients takes, in the factors' bases if there are any."""
        rotated = self.method.kronecker
        p, q = bases(layer, self.batch, self.method)
        if layer.convolution:
            # Patches twice, for b's row; the gradients; these, laid out anew between rotations, or squared.
            gradients = layer.controls + (2 * layer.o * p + p * q if rotated else layer.controls)
            patches = max(2 * layer.patches, layer.patches + layer.h + layer.controls)
            return self.batch * max(patches, gradients)
        # x̄ and V_h in their bases, and their squares; or x̄, its squares and those of V_h.
        if rotated:
            return self.batch * max(layer.i + p + q, 2 * p + 2 * q) + p * q
        return self.batch * (2 * layer.i + layer.o) + layer.controls

    def closing(self, layer: Layer) -> float:
        """Count what a layer's feedback takes: δh, the response, σ_h δh and ε's part; or A δx and the sum."""
        if self.method.open_loop:
            return 0
        if self.method.full:
            return 2 * self.batch * layer.h
        last = layer is self.net[-1]  # its V_xx bears no ε
        of_reg = 4 * layer.h + (layer.after if layer.pooled else 0) if layer.pulled and not last else 0
        return self.batch * max(of_reg, layer.h + self.output(layer))

    def outer_product_value(self, layer: Layer) -> int:
        """Count what c and the overlap take (Eq. 17): z_h and V_h in a basis, or gradients of each sample."""
        kronecker = self.method.kronecker
        if not layer.convolution:
            return self.batch * layer.h * (4 if kronecker else 2)
        # Patches twice, for b's row; patches, rows and both gradients; both gradients, laid out anew between
        # two rotations, or weighted and multiplied.
        rows = layer.patches + 2 * layer.h + 2 * layer.controls
        return self.batch * max(2 * layer.patches, rows, (8 if kronecker else 4) * layer.controls)

    def contraction(self, layer: Layer) -> int:
        """Count per sample what a convolution's S takes: patches, their products, S before and after η."""
        if not layer.convolution:
            return 0
        products = layer.p**2 * (layer.o if self.method.scaled else 1)
        p, q = bases(layer, self.batch, self.method)
        if (p, q) != (layer.i, layer.o):
            # I/γ's part: patches by o × o, laid out anew for their product with patches.
            products += 2 * layer.o**2 * layer.patches + layer.h**2
        return layer.patches + products + 3 * layer.h**2

    def applied(self, layer: Layer, entries: int) -> int:
        """Count per sample what S A takes, of A's entries: the product, before it A in the outputs' basis."""
        if layer.convolution:
            return layer.h**2 + entries
        # Beside the span of the batch M⁻¹ is I/γ: S A there, and the sum.
        return (3 if self.method.spanned else 2 if self.method.kronecker else 1) * entries

    def full_value(self, layer: Layer) -> float:
        """Count what the value step takes besides V_hh and A: S A, X and the new V_xx, or a linear system."""
        h, n = layer.h, layer.n
        # A convolution's g_x is built from unit outputs, beside S.
        jacobian = h * self.handed_back(layer) / self.batch if layer.convolution else 0
        phases = [self.contraction(layer) + jacobian, h * n + n * n]
        if self.method.psd:
            # I + S V_hh, its factors and the solution; the right side as well where a is appended to it.
            right = h * n if self.method.options.weight_decay else 0
            phases += [self.applied(layer, h * h), 2 * h * h + h * n + right]
        else:
            phases += [self.applied(layer, h * n), 2 * h * n]
        return self.batch * max(phases)

    def second_order_value(self, layer: Layer) -> float:
        """Count what the value step of second order takes besides V_hh and A."""
        h, n = layer.h, layer.n
        stays = 2 * h * n + n * n  # C, R and N
        phases = [
            self.mixed_terms(layer),
            h * n + n * n + self.contraction(layer),
            h * n + n * n + self.applied(layer, h * n) + h * n,
            stays + h * n + n * self.handed_back(layer),  # A laid out anew, and g_xᵀ A
            stays + 3 * n * n,  # V_xx as it grows, the next term, and their sum
        ]
        if self.method.psd:
            # S V_hh, I + S V_hh, its factors and D, beside V_xx; then D R and Rᵀ D R.
            phases += [stays + n * n + 4 * h * h, stays + h * h + h * n + 3 * n * n]
        return self.batch * max(phases)

    def mixed_terms(self, layer: Layer) -> float:
        """Count per sample what E, M⁻¹ E, C (h × n) and N (n × n) take on the way."""
        h, n = layer.h, layer.n
        if layer.convolution:
            # E is built (n × o × ī), from patches of unit images that the pack has once; the product of two
            # such tensors lays both out anew.
            E = n * layer.controls
            units = n * layer.patches / (self.batch * self.runs)
            applied = 6 * E if self.method.kronecker else 0  # laid out anew before each of its rotations
            return max(4 * E + h * n + n * n + layer.patches + units, applied)
        diagonal = (2 if self.method.kronecker else 1) * n * n  # N in the inputs' basis
        return max(5 * h * n, (2 if self.method.scaled else 1) * h * n + h * n + diagonal + n * n)


def _blocked(channels: int) -> int:
    """Round channels up to whole blocks."""
    return -(-channels // BLOCK) * BLOCK


# --- time ---


def seconds(net: Sequence[Layer], batch: int, method: Method) -> float:
    """Estimate a step's time on one CPU core, in a pack that fits."""
    book = Book(net, batch, method, PACK, "float32")
    book.enter_step()
    convolutions = sum(layer.convolution for layer in net)
    solves = batch * (len(net) - 1) if method.psd and method.full else 0
    return (
        sum(_flops(layer, batch, method, first=t == 0) for t, layer in enumerate(net)) / FLOPS_PER_SECOND
        + book.peak / NUMBERS_PER_SECOND
        + convolutions * (3 if method.feedback is None else 8) * CALL_SECONDS
        + solves * SOLVE_SECONDS
        + _taking_apart(net, batch, method)
    )


def metrics_seconds(net: Sequence[Layer], samples: int) -> float:
    """Estimate the time for one point of a run's curves, over this many samples."""
    flops = sum(2.0 * layer.controls * layer.p for layer in net)
    return samples * (
        flops / FLOPS_PER_SECOND + sum(layer.n + 2 * layer.h for layer in net) / NUMBERS_PER_SECOND
    )


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


def _taking_apart(net: Sequence[Layer], batch: int, method: Method) -> float:
    """Estimate the time for the eigenvectors or inverses of Kronecker factors, spread over the steps."""
    if not method.kronecker:
        return 0.0
    # The factors themselves, or what the batch spans of them.
    sizes = [size for layer in net for size in bases(layer, batch, method)]
    return sum(_one_apart(size, method.preconditioner) for size in sizes) / method.options.inverse_every


def _one_apart(size: int, preconditioner: str) -> float:
    largest, jacobi = JACOBI
    if preconditioner == "ekfac" and size <= largest:
        return jacobi * size**3
    linear, cubic = TAKING_APART[preconditioner]
    return linear * size + cubic * size**3
