"""Time per run and step: packs of SGD and DDPNOpt against torch.optim.SGD's plain loop, in one run.

    python -m benchmarks.pack

Both sides train the same net on the same batches with one thread; each is timed several times in turn, and
the median is taken. Prints a table and writes out/bench-pack.json.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.settings import interleaved, machine, save
from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.datasets.load import load
from ddpnopt.pack import rng
from ddpnopt.pack.engine import Trainer

NETS: Final = {"64-10-10-10-10-10, batch 16": ((10,) * 4, 16), "64-16-16-16-16-10, batch 8": ((16,) * 4, 8)}
SIZES: Final = (1, 10, 50, 200)
RUN_STEPS: Final = 4000
"""Per timing, so that small and large packs take about as long."""
REPEATS: Final = 5
VARIANTS: Final[dict[str, FeedbackConfig | None]] = {
    "SGD": None,
    "DDPNOpt, exact, full": FeedbackConfig(),
    "DDPNOpt, GN, outer product": FeedbackConfig(terminal_hessian="gauss_newton"),
}


def run_config(hidden: tuple[int, ...], batch: int, feedback: FeedbackConfig | None, seed: int) -> RunConfig:
    """Return one run of a variant."""
    optimizer = (
        OptimizerConfig("sgd", "baseline", 0.1)
        if feedback is None
        else OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-4, feedback)
    )
    training = TrainingConfig(steps=10**7, batch_size=batch, eval_every=10**7)
    return RunConfig("digits", ModelConfig(hidden), "cross_entropy", training, optimizer, seed)


def pack_side(
    hidden: tuple[int, ...], batch: int, feedback: FeedbackConfig | None, size: int
) -> Callable[[], None]:
    """Return a call that does RUN_STEPS updates over a pack of `size` runs."""
    runs = [run_config(hidden, batch, feedback, seed) for seed in range(size)]
    trainer = Trainer(runs, load("digits"), torch.device("cpu"))
    done = [0]

    def updates() -> None:
        with torch.inference_mode():
            for _ in range(RUN_STEPS // size):
                done[0] += 1
                trainer.update(done[0])

    updates()
    return updates


def plain_side(hidden: tuple[int, ...], batch: int) -> Callable[[], None]:
    """Return a call that does RUN_STEPS updates of one net by torch.optim.SGD's plain loop."""
    data = load("digits")
    inputs = torch.from_numpy(data.train_inputs).float()
    targets = torch.from_numpy(data.train_targets)
    widths = (64, *hidden, 10)
    layers: list[torch.nn.Module] = []
    for inputs_n, outputs_n in pairwise(widths):
        layers += [torch.nn.Linear(inputs_n, outputs_n), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of = torch.nn.CrossEntropyLoss()
    batches = torch.from_numpy(rng.epoch_batches(0, 0, len(targets), batch))

    def updates() -> None:
        for step in range(RUN_STEPS):
            rows = batches[step % len(batches)]
            optimizer.zero_grad()
            loss_of(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()

    updates()
    return updates


def measure(name: str) -> dict[str, Any]:
    """Time all variants and sizes on one net."""
    hidden, batch = NETS[name]
    labels = [(variant, size) for variant in VARIANTS for size in SIZES]
    sides = [plain_side(hidden, batch)]
    sides += [pack_side(hidden, batch, VARIANTS[variant], size) for variant, size in labels]
    plain, *packed = (seconds / RUN_STEPS * 1e6 for seconds in interleaved(sides, REPEATS))
    rows = [
        {"variant": variant, "runs": size, "microseconds": us, "ratio": us / plain}
        for (variant, size), us in zip(labels, packed, strict=True)
    ]
    return {"net": name, "plain_sgd_microseconds": plain, "packs": rows}


def show(console: Console, figures: dict[str, Any]) -> None:
    """Print one net's figures."""
    plain = figures["plain_sgd_microseconds"]
    table = Table(
        title=f"{figures['net']}: torch.optim.SGD, plain loop: {plain:.0f} µs a step", title_justify="left"
    )
    for column in ("pack of", *(f"{size}" for size in SIZES)):
        table.add_column(column, justify="right")
    for variant in VARIANTS:
        cells = [
            f"{r['microseconds']:.1f} µs ({r['ratio']:.3f}×)"
            for r in figures["packs"]
            if r["variant"] == variant
        ]
        table.add_row(variant, *cells)
    console.print(table)


def main() -> None:
    """Measure, print and save."""
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(machine())
    figures = [measure(name) for name in NETS]
    for of_net in figures:
        show(console, of_net)
    save(Path("out/bench-pack.json"), {"machine": machine(), "nets": figures})


if __name__ == "__main__":
    main()
