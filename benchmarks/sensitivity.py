"""How Fig. 4a's signs depend on what the paper leaves open of DDPNOpt itself.

    python -m benchmarks.sensitivity [--seeds 10] [--out docs/reproduction/sensitivity.csv]

The panels' settings are fixed by their baselines (`benchmarks/calibrate.py`), and the preset takes one form
of DDPNOpt for each. This trains the same panels with other forms, through a service of its own, and counts
the cells in which DDPNOpt is better, surely better and surely worse. Nothing of it goes back into a preset.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.sweeps import completed, submitted
from service.cli.embedded import service
from service.client import Client
from service.paper import presets
from service.results.statistics import CellState

PANELS: Final = ("fig4a-sgd", "fig4a-rmsprop", "fig4a-ekfac", "fig9")
FORMS: Final[tuple[dict[str, Any], ...]] = (
    {"terminal_hessian": "exact"},
    {"terminal_hessian": "gauss_newton"},
    {"terminal_hessian": "exact", "safeguard": "psd"},
    {"terminal_hessian": "gauss_newton", "safeguard": "psd"},
    {"terminal_hessian": "exact", "convention": "per_sample", "safeguard": "psd"},
)
METRICS: Final = ("train_loss", "accuracy")
COLUMNS: Final = ("panel", "form", "metric", "cells", "better", "surely_better", "surely_worse", "diverged")

Row = tuple[str, str, str, int, int, int, int, int]


def panel(client: Client, name: str, seeds: int) -> Iterator[Row]:
    """Train a panel with each form; yield its counts."""
    document = presets.spec(name) | {"seeds": seeds, "name": f"sensitivity: {name}"}
    (grid,) = document["grids"]
    document["grids"] = [grid | {"ddpnopt": form} for form in FORMS]
    sweep = completed(client, submitted(client, document))
    for position, form in enumerate(FORMS):
        for metric in METRICS:
            cells = client.heatmap(sweep["id"], metric=metric, grid=position).cells
            yield (
                name,
                ", ".join(map(str, form.values())),
                metric,
                len(cells),
                sum((cell.improvement or 0.0) > 0 for cell in cells),
                sum(cell.state is CellState.BETTER for cell in cells),
                sum(cell.state is CellState.WORSE for cell in cells),
                sum(cell.n_diverged_ddpnopt for cell in cells),
            )


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--home", type=Path, default=Path("out/sensitivity-home"), help="of the service")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction/sensitivity.csv"))
    arguments = parser.parse_args()
    console, started = Console(highlight=False, width=110), time.monotonic()
    with service(arguments.home.resolve()) as url, Client(url) as client:
        rows = [row for name in PANELS for row in panel(client, name, arguments.seeds)]
    table = Table(*COLUMNS, title="cells in which DDPNOpt is better, by its form")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    console.print(f"{time.monotonic() - started:.0f} s; wrote {arguments.out}")


if __name__ == "__main__":
    main()
