"""Fig. 6: a nine-layer sigmoid net on DIGITS with the Max-Mahalanobis loss, where gradients vanish.

Trains it by SGD-VGR, EKFAC, DDPNOpt with EKFAC's preconditioner, and the same with dynamics of second order
(DDPNOpt2nd), from the same weights and on the same batches; prints and draws the training loss and the norm
of each layer's update, averaged over the training.

The plateau is a loss of 10: a net that does not tell its inputs apart does best at the mean of the centres,
which is zero, and their squared norm is 10. There Σ_b V_h x̄_bᵀ vanishes: the samples' x̄_b are all but equal,
and their V_h sum to zero. DDPNOpt2nd leaves it by Σ_b V_h δx_bᵀ, its feedback through V_h · g_ux, because the
δx_b differ (without that one term in the second forward pass its curve is EKFAC's again). It takes a damping
γ that is small against the learning rate, but not so small that V_xx follows the batch's noise and diverges:
0.003 and 0.01 with batches of 64 do it; smaller batches, γ or nets ask for other numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddpnopt import BaselineOptimizer, DDPNOpt
from ddpnopt.config import BaselineOptions, ModelConfig
from ddpnopt.datasets.load import load
from ddpnopt.introspection import UpdateNorms
from ddpnopt.models import sequential
from ddpnopt.torch_optimizer import LayerOptimizer

MODEL: Final = ModelConfig((16,) * 8, "sigmoid")
STEPS: Final = 2000
QUICK_STEPS: Final = 20
SMOOTHED: Final = 50
"""Updates that a point of the loss is averaged over."""


@dataclass(frozen=True)
class Training:
    """One optimizer's run.

    Attributes:
        losses: of each batch before its update, (steps,).
        norms: |Δu_t|, averaged over the steps, (9,).
        refused: updates that were not taken, since they would have left the finite numbers.
    """

    losses: Tensor
    norms: Tensor
    refused: int

    def mean_loss(self, end: int) -> float:
        """Return the loss over the `SMOOTHED` batches up to an update."""
        return float(self.losses[max(end - SMOOTHED, 0) : end].mean())


def optimizers(damping: float, lr: float) -> dict[str, Callable[[nn.Sequential], LayerOptimizer]]:
    """Return what makes each optimizer of the figure over a net; SGD-VGR's learning rate is the paper's."""
    ekfac = BaselineOptions(damping=damping)

    def ddpnopt(model: nn.Sequential, dynamics: str) -> LayerOptimizer:
        return DDPNOpt(
            model,
            "mmc",
            lr=lr,
            preconditioner="ekfac",
            damping=damping,
            dynamics=dynamics,  # type: ignore[arg-type]
            track_updates=True,
        )

    return {
        "SGD-VGR": lambda m: BaselineOptimizer(m, "sgd_vgr", "mmc", lr=0.1, track_updates=True),
        "EKFAC": lambda m: BaselineOptimizer(m, "ekfac", "mmc", lr=lr, options=ekfac, track_updates=True),
        "DDPNOpt": lambda m: ddpnopt(m, "first_order"),
        "DDPNOpt2nd": lambda m: ddpnopt(m, "second_order"),
    }


def train(make: Callable[[nn.Sequential], LayerOptimizer], steps: int, batch: int, seed: int) -> Training:
    """Train a net of torch's default initialisation."""
    torch.manual_seed(seed)
    data = load("digits")
    inputs = torch.from_numpy(data.train_inputs).float()
    targets = torch.from_numpy(data.train_targets)
    optimizer = make(sequential(MODEL, data.train_inputs.shape[1:], 10))
    norms, losses, refused = UpdateNorms(optimizer), [], 0
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch,))
        losses.append(float(optimizer.step(inputs[rows], targets[rows])))
        norms.record()
        refused += optimizer.status is not None
    return Training(torch.tensor(losses), norms.mean(), refused)


def table(results: dict[str, Training], steps: int) -> Table:
    """Return the numbers of both panels."""
    shown = Table(title="training loss after so many updates; mean update norm of layers 1 to 9")
    stops = [steps * part // 4 for part in (1, 2, 3, 4)]
    for name in ("", *map(str, stops), *(f"|Δu{t}|" for t in range(1, 10)), "refused"):
        shown.add_column(name, justify="right")
    for name, training in results.items():
        losses = [f"{training.mean_loss(stop):.2f}" for stop in stops]
        norms = [f"{norm:.0e}" for norm in training.norms.tolist()]
        shown.add_row(name, *losses, *norms, str(training.refused))
    return shown


def draw(results: dict[str, Training], path: Path) -> None:
    """Draw the loss over the updates, and the update norm over the layers, also on a logarithmic scale."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, training in results.items():
        smooth = training.losses.unfold(0, min(SMOOTHED, len(training.losses)), 1).mean(dim=1)
        left.plot(smooth, label=name)
        for ax in (middle, right):
            ax.plot(range(1, 10), training.norms, "o-", markersize=3, label=name)
    left.set(xlabel="updates", ylabel="training loss")
    middle.set(xlabel="layer", ylabel="mean update norm")
    right.set(xlabel="layer", ylabel="mean update norm", yscale="log")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    parser.add_argument("--damping", type=float, default=3e-3, help="γ of EKFAC's M")
    parser.add_argument("--lr", type=float, default=0.01, help="η of all but SGD-VGR")
    parser.add_argument("--batch", type=int, default=64, help="samples in a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # nets this small gain nothing from a second one
    steps = QUICK_STEPS if args.quick else STEPS
    makers = optimizers(args.damping, args.lr)
    results = {name: train(make, steps, args.batch, args.seed) for name, make in makers.items()}
    console = Console(highlight=False, width=140)
    console.print(table(results, steps))
    draw(results, args.out / "vanishing-gradient.png")
    console.print(f"wrote {args.out / 'vanishing-gradient.png'}")


if __name__ == "__main__":
    main()
