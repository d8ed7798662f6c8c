"""Fig. 8: the spectrum of the feedback policy in the prediction layer, on k Gaussian clusters.

Trains the same net by DDPNOpt on 5, 8, 12 and 15 clusters in R³⁰ and looks at the eigenvalues of E[KᵀK] of
the last layer's feedback gain (see `ddpnopt.introspection.policy_spectrum` for why these). As many of them as
there are classes are not zero with the Max-Mahalanobis loss, and one less with cross-entropy.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddpnopt import DDPNOpt
from ddpnopt.config import Loss, ModelConfig
from ddpnopt.datasets.catalog import CLUSTERS
from ddpnopt.datasets.load import load
from ddpnopt.introspection import policy_spectrum
from ddpnopt.models import sequential

LEARNING_RATES: Final[dict[Loss, float]] = {"mmc": 0.03, "cross_entropy": 0.3}
MODEL: Final = ModelConfig((32,) * 4, "relu")
BATCH: Final = 32
LOOKED_AT: Final = 64
"""Samples whose policies make up a spectrum."""
STOPS: Final = (50, 150, 250)
QUICK_STOPS: Final = (10, 30)
NONTRIVIAL: Final = 1e-9
"""Eigenvalues below this part of the largest one are rounding errors: E[KᵀK] is taken in float64."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues at one moment of a training.

    Attributes:
        step: updates done.
        accuracy: on the training set, in percent.
        state: of E[KᵀK], descending, (32,).
        control: of E[K Kᵀ], descending.
    """

    step: int
    accuracy: float
    state: Tensor
    control: Tensor

    @property
    def nontrivial(self) -> int:
        """How many eigenvalues of E[KᵀK] are not zero."""
        return int((self.state > NONTRIVIAL * self.state[0]).sum())


def spectra(k: int, loss: Loss, stops: tuple[int, ...]) -> list[Spectrum]:
    """Train on k clusters and look at the policy whenever a stop is reached."""
    torch.manual_seed(0)
    data = load(f"clusters{k}")
    inputs, targets = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_targets)
    model = sequential(MODEL, data.shape, k).double()
    optimizer = DDPNOpt(model, loss, lr=LEARNING_RATES[loss])
    found = []
    for step in range(1, max(stops) + 1):
        rows = torch.randint(len(inputs), (BATCH,))
        optimizer.step(inputs[rows], targets[rows])
        if step in stops:
            inspection = optimizer.inspect(inputs[:LOOKED_AT], targets[:LOOKED_AT])
            right = model(inputs).argmax(dim=1) == targets
            state, control = (policy_spectrum(inspection, side=side) for side in ("state", "control"))
            found.append(Spectrum(step, 100 * float(right.double().mean()), state, control))
    return found


def draw(results: dict[tuple[Loss, int], list[Spectrum]], path: Path) -> None:
    """Draw a row for each loss and a column for each number of clusters."""
    figure = Figure(figsize=(13, 6), layout="tight")
    axes = figure.subplots(len(LEARNING_RATES), len(CLUSTERS), sharex=True)
    for row, loss in enumerate(LEARNING_RATES):
        for column, k in enumerate(CLUSTERS):
            ax = axes[row][column]
            shown = results[loss, k]
            for i, spectrum in enumerate(shown):
                shade = colormaps["viridis"](i / len(shown))
                order = range(1, len(spectrum.state) + 1)
                values = spectrum.state.clamp_min(1e-30)
                ax.semilogy(order, values, "o-", markersize=3, color=shade, label=f"{spectrum.step} updates")
            control = shown[-1].control[: len(shown[-1].state)]
            ax.semilogy(range(1, len(control) + 1), control, ":", color="grey", label=r"of $E[KK^T]$")
            ax.axvline(k, linestyle="--", color="black", linewidth=0.8)
            top = float(shown[-1].state[0])
            ax.set_ylim(1e-12 * top, 10 * top)
            ax.set_title(f"{k} clusters, {loss.replace('_', ' ')}", fontsize=10)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("order of the eigenvalue")
    figure.supylabel("eigenvalue of $E[K^TK]$, last layer")
    figure.savefig(path, dpi=120)


def table(results: dict[tuple[Loss, int], list[Spectrum]]) -> Table:
    """Return the numbers of the figure; λ relative to the largest one."""
    shown = Table(title="eigenvalues of E[KᵀK] in the prediction layer")
    for name in (
        "loss",
        "clusters",
        "updates",
        "accuracy %",
        "λ₁",
        "λₖ₋₁/λ₁",
        "λₖ/λ₁",
        "λₖ₊₁/λ₁",
        "nontrivial",
    ):
        shown.add_column(name, justify="right")
    for (loss, k), found in results.items():
        for s in found:
            relative = [f"{float(s.state[i] / s.state[0]):.0e}" for i in (k - 2, k - 1, k)]
            shown.add_row(
                loss,
                str(k),
                str(s.step),
                f"{s.accuracy:.1f}",
                f"{float(s.state[0]):.2e}",
                *relative,
                str(s.nontrivial),
            )
    return shown


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # nets this small gain nothing from a second one
    stops = QUICK_STOPS if args.quick else STOPS
    results = {(loss, k): spectra(k, loss, stops) for loss in LEARNING_RATES for k in CLUSTERS}
    console = Console(highlight=False, width=100)
    console.print(table(results))
    draw(results, args.out / "policy-spectrum.png")
    console.print(f"wrote {args.out / 'policy-spectrum.png'}")


if __name__ == "__main__":
    main()
