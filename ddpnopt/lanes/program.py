"""From configurations to what the kernel takes: what a block's runs share, and each run's numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int32, cast
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.config import DType, LayerShape, Loss, ModelConfig, OptimizerConfig, RunConfig
from ddpnopt.lanes import rules
from ddpnopt.lanes.library import Library, Program
from ddpnopt.layers.losses import max_mahalanobis_centers
from ddpnopt.linalg import DTYPES
from ddpnopt.preconditioners import Units

OPEN_LOOP, OUTER_PRODUCT, FULL = range(3)


def block_key(optimizer: OptimizerConfig) -> tuple[object, ...]:
    """Return what the runs of a block share; rates, decays and momenta are each run's own.

    Whether a number is zero belongs to the key: what is zero is not computed, and the bits of a run may not
    depend on its neighbours' numbers.
    """
    options, feedback = optimizer.options, optimizer.feedback
    zeros = (options.weight_decay > 0, options.momentum > 0, (optimizer.vxx_reg or 0.0) > 0)
    if feedback is None:
        return (optimizer.baseline, None, options.second_moment, *zeros)
    chosen = feedback.resolved()
    shape = (chosen.feedback, chosen.terminal_hessian, chosen.factorized, chosen.convention, chosen.safeguard)
    return (optimizer.baseline, shape, options.second_moment, *zeros)


@lru_cache(maxsize=32)
def _centers(classes: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return max_mahalanobis_centers(classes).to(dtype=dtype)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A program ready for the kernel, with what keeps its memory alive.

    Attributes:
        library: the kernel.
        program: for `ctypes.byref`.
        dtype: of all numbers.
        controls: entries of a run's u, layer by layer, (o, ī) row by row.
        workspace: bytes that a thread needs.
        moments: names of the state besides u.
    """

    library: Library
    program: Program
    dtype: torch.dtype
    controls: int
    workspace: int
    moments: tuple[str, ...]
    kept: tuple[Any, ...]


def compiled_net(
    library: Library, model: ModelConfig, shapes: Sequence[LayerShape], loss: Loss, dtype: DType
) -> Compiled:
    """Return a program that only measures nets."""
    return _compiled(library, model, shapes, loss, dtype, 1, {}, ())


def compiled(library: Library, run: RunConfig, shapes: Sequence[LayerShape]) -> Compiled:
    """Return the program of a run and of all others with its `block_key`."""
    optimizer, batch = run.optimizer, run.training.batch_size
    options, feedback = optimizer.options, optimizer.feedback
    chosen = None if feedback is None else feedback.resolved()
    units = Units.of("batch_mean" if chosen is None else chosen.convention, batch)
    if chosen is None or not chosen.feedback:
        form = OPEN_LOOP
    else:
        form = OUTER_PRODUCT if chosen.factorized else FULL
    moments: tuple[str, ...] = {"sgd": (), "rmsprop": ("moment2",), "adam": ("moment1", "moment2")}[
        optimizer.baseline
    ]
    if options.momentum > 0:
        moments = ("velocity", *moments)
    fields = {
        "preconditioner": rules.PRECONDITIONERS.index(optimizer.baseline),
        "form": form,
        "exact_hessian": chosen is not None and chosen.terminal_hessian == "exact",
        "psd": chosen is not None and chosen.safeguard == "psd",
        "per_sample_moment": options.second_moment == "per_sample",
        "has_decay": options.weight_decay > 0,
        "has_momentum": options.momentum > 0,
        "has_reg": (optimizer.vxx_reg or 0.0) > 0,
        "baseline": optimizer.method == "baseline",
        "share": units.share,
        "weight": units.weight,
        "to_loss": units.to_loss,
    }
    return _compiled(library, run.model, shapes, run.loss, run.dtype, batch, fields, moments)


def _compiled(
    library: Library,
    model: ModelConfig,
    shapes: Sequence[LayerShape],
    loss: Loss,
    dtype: DType,
    batch: int,
    fields: dict[str, Any],
    moments: tuple[str, ...],
) -> Compiled:
    widths = (c_int32 * (len(shapes) + 1))(*(shape.inputs for shape in shapes), shapes[-1].outputs)
    centers = _centers(shapes[-1].outputs, DTYPES[dtype]) if loss == "mmc" else None
    program = Program(
        layers=len(shapes),
        batch=batch,
        hidden_activation=rules.ACTIVATIONS.index(model.activation),
        output_activation=rules.ACTIVATIONS.index(model.output),
        loss=rules.LOSSES.index(loss),
        widths=cast(widths, POINTER(c_int32)),
        centers=None if centers is None else centers.data_ptr(),
        **fields,
    )
    by_reference = ctypes.byref(program)
    vector = library.lanes * rules.NUMBER_BYTES[dtype]
    return Compiled(
        library,
        program,
        DTYPES[dtype],
        library.functions.controls(by_reference),
        library.functions.workspace(by_reference) * vector,
        moments,
        (widths, centers),
    )


def rates_of(optimizer: OptimizerConfig) -> NDArray[np.float64]:
    """Return one run's numbers in the order of kernel.c, (10,) float64."""
    options, feedback = optimizer.options, optimizer.feedback
    beta1, beta2 = betas_of(optimizer)
    scale = 1.0 if feedback is None else feedback.curvature_scale
    return np.array(
        [
            *(optimizer.learning_rate, optimizer.vxx_reg or 0.0, options.weight_decay, options.momentum),
            *(scale, beta2, 1 - beta2, beta1, 1 - beta1, options.eps),
        ]
    )


def betas_of(optimizer: OptimizerConfig) -> tuple[float, float]:
    """Return β₁ and β₂ of Adam; β₂ is ρ for RMSprop."""
    options = optimizer.options
    return (0.0, options.rho) if optimizer.baseline == "rmsprop" else options.betas
