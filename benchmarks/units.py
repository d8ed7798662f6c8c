"""What units, curvature scale and safeguard do: the panel of Fig. 4a (SGD) under each of them.

    python -m benchmarks.units [--seeds 10] [--steps 1500]

DIGITS, FCN 64-10-10-10-10-10, tanh, batch 16. For every variant: in how many of the panel's 16 cells
DDPNOpt's mean training loss is below SGD's, how many runs diverged, and the losses at learning rate 0.7 over
ε. A mean is over the runs that did not diverge. Writes out/bench-units.json; `docs/units.md` quotes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.settings import machine, save
from ddpnopt.config import (
    BaselineOptions,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from ddpnopt.pack.engine import train
from ddpnopt.results import Finished, RunResult

RATES: Final = (0.4, 0.6, 0.7, 0.8)
REGS: Final = (5e-5, 1e-4, 5e-4, 1e-3)
SHOWN: Final = 0.7
BATCH: Final = 16
PACK: Final = 160

EXACT: Final = {"terminal_hessian": "exact"}
GAUSS_NEWTON: Final = {"terminal_hessian": "gauss_newton"}
PER_SAMPLE: Final = {"convention": "per_sample"}
PSD: Final = {"safeguard": "psd"}


@dataclass(frozen=True)
class Variant:
    """A way to hold the curvature; ε is multiplied by `reg_factor`, so that per-sample units get theirs."""

    name: str
    feedback: FeedbackConfig
    reg_factor: float = 1.0


def variant(name: str, *choices: dict[str, Any], **more: Any) -> Variant:
    """Merge choices into a variant; in per-sample units ε is B times larger."""
    merged: dict[str, Any] = {}
    for choice in (*choices, more):
        merged |= choice
    factor = BATCH if merged.get("convention") == "per_sample" else 1
    return Variant(name, FeedbackConfig(**merged), factor)


VARIANTS: Final = (
    variant("exact, batch_mean, κ=1 (the default)", EXACT),
    variant("GN outer product, batch_mean, κ=1", GAUSS_NEWTON),
    variant("exact, batch_mean, κ=B", EXACT, curvature_scale=float(BATCH)),
    variant("exact, per_sample, κ=1/B", EXACT, PER_SAMPLE, curvature_scale=1 / BATCH),
    variant("GN outer product, per_sample, κ=1/B", GAUSS_NEWTON, PER_SAMPLE, curvature_scale=1 / BATCH),
    variant("exact, per_sample, κ=1", EXACT, PER_SAMPLE),
    variant("GN outer product, per_sample, κ=1", GAUSS_NEWTON, PER_SAMPLE),
    variant("psd, exact, batch_mean, κ=1", EXACT, PSD),
    variant("psd, exact, per_sample, κ=1/B", EXACT, PER_SAMPLE, PSD, curvature_scale=1 / BATCH),
    variant("psd, exact, per_sample, κ=1", EXACT, PER_SAMPLE, PSD),
    variant("psd, GN, per_sample, κ=1/B", GAUSS_NEWTON, PER_SAMPLE, PSD, curvature_scale=1 / BATCH),
    variant("second order, batch_mean, κ=1", EXACT, dynamics="second_order"),
)


def run_of(optimizer: OptimizerConfig, seed: int, steps: int) -> RunConfig:
    """Return a run of the panel."""
    training = TrainingConfig(steps, BATCH, steps)
    return RunConfig("digits", ModelConfig((10,) * 4), "cross_entropy", training, optimizer, seed)


def results(runs: list[RunConfig]) -> Iterator[RunResult]:
    """Train runs in packs and return their results in order."""
    for start in range(0, len(runs), PACK):
        for event in train(runs[start : start + PACK]):
            if isinstance(event, Finished):
                yield from event.results


def losses(optimizers: list[OptimizerConfig], seeds: int, steps: int) -> np.ndarray[Any, Any]:
    """Return the final training losses, (optimizers, seeds); NaN where a run diverged."""
    runs = [run_of(optimizer, seed, steps) for optimizer in optimizers for seed in range(seeds)]
    values = [r.metrics.get("train_loss", np.nan) for r in results(runs)]
    return np.array(values).reshape(len(optimizers), seeds)


def baseline(seeds: int, steps: int) -> np.ndarray[Any, Any]:
    """Return SGD's losses, (rates, seeds)."""
    return losses([OptimizerConfig("sgd", "baseline", rate) for rate in RATES], seeds, steps)


def measure(chosen: Variant, sgd: np.ndarray[Any, Any], seeds: int, steps: int) -> dict[str, Any]:
    """Train a variant's 16 cells and compare them with SGD's."""
    cells = [
        OptimizerConfig(
            "sgd", "ddpnopt", rate, reg * chosen.reg_factor, chosen.feedback, options=BaselineOptions()
        )
        for rate in RATES
        for reg in REGS
    ]
    found = losses(cells, seeds, steps).reshape(len(RATES), len(REGS), seeds)
    diverged = np.isnan(found)
    with np.errstate(invalid="ignore"):
        means = np.array([[np.nanmean(c) if np.isfinite(c).any() else np.inf for c in row] for row in found])
    reference = np.nanmean(sgd, axis=1)
    return {
        "variant": chosen.name,
        "better": int((means < reference[:, None]).sum()),
        "diverged": int(diverged.sum()),
        "runs": int(diverged.size),
        "at_rate_0.7": [None if np.isinf(m) else float(m) for m in means[RATES.index(SHOWN)]],
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    sgd = baseline(given.seeds, given.steps)
    means = {rate: float(mean) for rate, mean in zip(RATES, np.nanmean(sgd, axis=1), strict=True)}
    console.print("SGD: " + ", ".join(f"{mean:.2f} at {rate}" for rate, mean in means.items()))
    table = Table("variant", "better of 16", "diverged", *(f"{reg:g}" for reg in REGS))
    rows = []
    for chosen in VARIANTS:
        row = measure(chosen, sgd, given.seeds, given.steps)
        rows.append(row)
        console.print(f"{row['variant']}: better in {row['better']} of 16, {row['diverged']} runs diverged")
        shown = ["diverged" if m is None else f"{m:.2f}" for m in row["at_rate_0.7"]]
        table.add_row(row["variant"], str(row["better"]), f"{row['diverged']} / {row['runs']}", *shown)
    console.print(table)
    document = {"machine": machine(), "seeds": given.seeds, "steps": given.steps, "sgd": means, "rows": rows}
    save(Path("out/bench-units.json"), document)


if __name__ == "__main__":
    main()
