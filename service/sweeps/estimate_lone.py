"""What a run of a baseline without a DDPNOpt partner takes, in bytes and in seconds.

Beside `estimate`, whose book of the passes it goes on with. Memory is within a quarter of what torch
allocates at the peak, and more than that only where L-BFGS stops before its last iteration; time is within a
factor of three of what was measured (`tests/service/test_estimate_lone.py`).

- SGD-VGR is SGD with a second gradient in every layer's turn, which stays until the update is over.
- E-MSA minimises layer by layer, and within a layer one run after the other. So what L-BFGS holds of a run
  is there once in a pack, and a run takes as long in a pack as alone.
- Vanilla DDP holds its matrices of so many runs at once as it counts into its memory limit (`ddpnopt.dense`,
  at most three times what they take). They are large enough that packs are no faster.

Sizes of a layer are those of `estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from ddpnopt.config import EVAL_CHUNK, BaselineOptions, DType, LoneBaseline
from ddpnopt.dense import basis_numbers, controls_in_span, required_bytes, working_numbers
from ddpnopt.lanes.rules import NUMBER_BYTES
from service.sweeps.estimate import (
    CALL_SECONDS,
    FLOPS_PER_SECOND,
    NUMBERS_PER_SECOND,
    PACK,
    Book,
    Layer,
    Method,
    most,
)

HISTORY: Final = 100
"""Steps that torch's L-BFGS remembers at the most, each by two tensors of the controls' size."""

SEARCHING: Final = 11
"""Tensors of the controls' size that L-BFGS holds besides: the point and its gradient, both as they were, the
direction, those of a line search, and what H̃'s gradient is summed up from."""

EVALUATIONS: Final = 1.25
"""Evaluations of H̃ that an iteration of L-BFGS takes, after a first one: most line searches take one."""

EVALUATION_SECONDS: Final = 3e-4
"""Of one evaluation of H̃ and its share of L-BFGS, however small the layer: a hundred calls of torch."""

NUMBERS_PER_SECOND_OF_ONE: Final = 1e9
"""At which one CPU core goes through what E-MSA's and vanilla DDP's passes hold of one run: long rows, unlike
the many short ones of a pack of small nets."""


@dataclass(frozen=True, slots=True)
class Lone:
    """A baseline that has no DDPNOpt partner, as far as its cost goes."""

    baseline: LoneBaseline
    options: BaselineOptions

    @property
    def gains_by_packs(self) -> bool:
        """Whether a run takes less time in a pack than alone."""
        return self.baseline == "sgd_vgr"

    @property
    def full(self) -> bool:
        """Whether V_xx is a matrix per sample: there is no such V_xx."""
        return False

    def as_outer_product(self) -> Self:
        """Return the same: there is no V_xx."""
        return self


# --- memory ---


def numbers(
    net: Sequence[Layer],
    batch: int,
    lone: Lone,
    samples: int = EVAL_CHUNK,
    *,
    runs: int = 1,
    dtype: DType = "float32",
) -> int:
    """Estimate the numbers that a run holds at the most: see `estimate.numbers`."""
    step, metrics = (_book(net, batch, lone, runs, dtype) for _ in range(2))
    _ENTERING[lone.baseline](step, lone.options)
    metrics.enter_metrics(min(samples, EVAL_CHUNK))
    return math.ceil(max(step.peak, metrics.peak))


def most_runs(net: Sequence[Layer], batch: int, lone: Lone, limit: int, *, dtype: DType = "float32") -> int:
    """Return how many runs a pack may have whose numbers are at most `limit`; 0 if one is too many."""
    return most(lambda runs: limit // numbers(net, batch, lone, runs=runs, dtype=dtype))


def matrices(net: Sequence[Layer], batch: int, dtype: DType) -> int:
    """Return the bytes that vanilla DDP counts for one run, which its memory limit is held against."""
    return required_bytes(shapes(net), batch, NUMBER_BYTES[dtype])


def shapes(net: Sequence[Layer]) -> list[tuple[int, int]]:
    """Return (o, ī) of every layer."""
    return [(layer.o, layer.i) for layer in net]


def _book(net: Sequence[Layer], batch: int, lone: Lone, runs: int, dtype: DType) -> Book:
    """Open a book in which only the passes that SGD has as well are filled in by themselves."""
    return Book(net, batch, Method.of("sgd", lone.options, None), runs, dtype)


def _enter_forward_pass(book: Book) -> None:
    """Enter what is remembered, the trajectory and ∇φ."""
    book.hold(sum(map(book.remembered, book.net)))
    book.enter_forward_pass()
    book.hold(book.batch * book.net[-1].h)


def _enter_vgr(book: Book, options: BaselineOptions) -> None:
    """Enter the turns of a backward pass, each of which leaves both gradients."""
    _enter_forward_pass(book)
    batch = book.batch
    for layer in reversed(book.net):
        V_h = batch * layer.pulled
        book.hold(V_h)
        book.need(batch * layer.slopes, book.gradient(layer))
        book.hold(layer.controls)
        if not layer.first:
            book.need(batch * book.handed_back(layer))
            book.hold(batch * layer.n)  # q
            # Norms of p and q; c, with a zero for b, beside V_h in its unit.
            book.need(2 * batch * max(layer.after, layer.n), batch * (2 * layer.n + layer.h) + layer.controls)
            book.hold(layer.controls)
            book.need(2 * layer.controls)
        book.need(book.stepping(layer))
        book.release(V_h + batch * layer.after)


def _enter_emsa(book: Book, options: BaselineOptions) -> None:
    """Enter the co-states, and the layers' turns, each of which leaves its minimiser."""
    _enter_forward_pass(book)
    batch = book.batch
    for layer in reversed(book.net[1:]):
        book.need(batch * (layer.slopes + layer.pulled + book.handed_back(layer)))
        book.hold(batch * layer.n)
    for layer in book.net:
        book.need(batch * book.output(layer))
        book.hold(batch * layer.after)  # x_{t+1}
        # The minimisers one by one; then the stack of them, and the way to go.
        book.need(layer.controls + _searching(book, layer, options) / book.runs, 3 * layer.controls)
        book.hold(layer.controls)
        book.release(batch * layer.after)


def _searching(book: Book, layer: Layer, options: BaselineOptions) -> float:
    """Count what the minimisation of one run's H̃ takes."""
    tensors = SEARCHING + 2 * min(options.lbfgs_steps, HISTORY)
    # y, e, σ', V_h and their like; c, and what it is pulled back from and pushed forward to.
    states = 4 * layer.h + 2 * layer.after + (0 if layer.first else 2 * layer.n + 2 * layer.h)
    workspace = book.convolving(layer) if layer.convolution else 0
    return tensors * layer.controls + book.batch * (states + workspace)


def _enter_vanilla(book: Book, options: BaselineOptions) -> None:
    """Enter the matrices of so many runs as are taken at once."""
    _enter_forward_pass(book)
    of_one = replace(book, held=0.0, peak=0.0)
    _enter_dense_turns(of_one)
    # Q_u, of which only the coordinates are solved for, stays for the search of what diverged.
    book.hold(sum(layer.controls for layer in book.net if basis_numbers(layer.i, book.batch)))
    at_once = max(1, options.memory_limit // matrices(book.net, book.batch, book.dtype))
    book.need(min(at_once, book.runs) * of_one.peak / book.runs)


def _enter_dense_turns(book: Book) -> None:
    """Enter one run's turns, each of which leaves its gains and the V_XX before it."""
    value = (book.batch * book.net[-1].h) ** 2
    book.hold(value)
    for layer in reversed(book.net):
        _enter_span(book, layer)
        at_start = book.held
        p = controls_in_span(layer.o, layer.i, book.batch)
        after, before = book.batch * layer.h, 0 if layer.first else book.batch * layer.n
        columns = p * (1 + before)  # Q_u and Q_uX, and what they are solved into
        book.need(3 * value if layer.pulled else 0)  # V_hh
        for matrix in (after * before, p * before, before**2):  # A, Q_uX, Q_XX, each laid out anew
            book.need(2 * matrix)
            book.hold(matrix)
        book.hold(columns)
        book.need(2 * p * after + p * p, p * after + 2 * p * p)  # Q_uu
        book.hold(p * p)  # L
        book.need(3 * columns)
        book.release(p * p)
        book.hold(columns + before * (1 + before))  # L⁻¹ Y, Q_uu⁻¹ Y in the place of Y, and V_XX's reduction
        book.need(p * before, before**2)
        book.release(book.held - at_start + value)
        book.hold(columns + before**2)
        value = before**2
    # δu; with weight decay also what lies outside of the span, and the sum.
    changes = 3 if book.method.options.weight_decay else 1
    book.need(*(changes * layer.controls for layer in book.net if basis_numbers(layer.i, book.batch)), 0)


def _enter_span(book: Book, layer: Layer) -> None:
    """Enter what a layer with more inputs than samples has besides: Q₀ and, with weight decay, k_⊥ stay."""
    basis = basis_numbers(layer.i, book.batch)
    if basis == 0:
        return
    book.need(4 * basis)  # x̄, once more in the order of its factorisation, and Q₀ before and after it
    book.hold(basis)
    book.need(book.gradient(layer) - layer.controls)  # besides Q_u
    if book.method.options.weight_decay:
        book.need(3 * layer.controls)  # u_⊥, and its part
        book.hold(layer.controls)


_ENTERING: Final[dict[LoneBaseline, Callable[[Book, BaselineOptions], None]]] = {
    "sgd_vgr": _enter_vgr,
    "emsa": _enter_emsa,
    "vanilla_ddp": _enter_vanilla,
}


# --- time ---


def seconds(net: Sequence[Layer], batch: int, lone: Lone) -> float:
    """Estimate a step's time on one CPU core, in a pack that fits."""
    return _TAKING[lone.baseline](net, batch, lone)


def _vgr_seconds(net: Sequence[Layer], batch: int, lone: Lone) -> float:
    book = _book(net, batch, lone, PACK, "float32")
    _enter_vgr(book, lone.options)
    products = sum(layer.controls * layer.p for layer in net)
    convolutions = sum(layer.convolution for layer in net)
    return (
        4 * 2.0 * batch * products / FLOPS_PER_SECOND
        + book.peak / NUMBERS_PER_SECOND
        + convolutions * 4 * CALL_SECONDS
    )


def _emsa_seconds(net: Sequence[Layer], batch: int, lone: Lone) -> float:
    steps = lone.options.lbfgs_steps
    book = _book(net, batch, lone, 1, "float32")
    return (1 + EVALUATIONS * steps) * sum(_evaluation_seconds(book, layer, lone.options) for layer in net)


def _evaluation_seconds(book: Book, layer: Layer, options: BaselineOptions) -> float:
    """Estimate the time of one evaluation of a layer's H̃, with its share of L-BFGS."""
    products = 2 if layer.first else 6
    return (
        EVALUATION_SECONDS
        + products * 2.0 * book.batch * layer.controls * layer.p / FLOPS_PER_SECOND
        + _searching(book, layer, options) / NUMBERS_PER_SECOND_OF_ONE
        + (products * CALL_SECONDS if layer.convolution else 0)
    )


def _vanilla_seconds(net: Sequence[Layer], batch: int, lone: Lone) -> float:
    sizes = shapes(net)
    macs = sum(_dense_macs(o, i, batch, first=t == 0) for t, (o, i) in enumerate(sizes))
    return 2.0 * macs / FLOPS_PER_SECOND + sum(working_numbers(sizes, batch)) / NUMBERS_PER_SECOND_OF_ONE


def _dense_macs(o: int, i: int, batch: int, *, first: bool) -> float:
    """Count the multiplications with additions of a layer: its matrices, Q_uu's factor, solutions, V_XX."""
    p, after, before = controls_in_span(o, i, batch), batch * o, 0 if first else batch * i
    of_basis = basis_numbers(i, batch) * (2 * batch + 2 * o)  # R₀, Q₀, and the ways into the span and back
    of_controls = p * batch * (after + p) + p**3 / 6
    return of_basis + of_controls + before * (after * o + p * o + 2 * p * p + before * (o + p))


_TAKING: Final[dict[LoneBaseline, Callable[[Sequence[Layer], int, Lone], float]]] = {
    "sgd_vgr": _vgr_seconds,
    "emsa": _emsa_seconds,
    "vanilla_ddp": _vanilla_seconds,
}
