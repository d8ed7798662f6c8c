"""Find the settings of Fig. 4a and Tables 6 to 8 that the paper does not tell, by their baselines alone.

    python -m benchmarks.calibrate [--seeds 10] [--only fig4a | tables6-8] [--out docs/reproduction]

The paper gives DIGITS five layers of 10 to 32 units with tanh and batches of 8 to 32 (A.6.1), and Fig. 4b's
axis goes beyond 1500 iterations, but not to 2000. Within that, this trains the baselines of Tables 9 and 10,
and no DDPNOpt at all, through a service of its own, as sweeps of grids without ε. The score of a setting is
the root mean square over the table's learning rates of

    ln(loss / the paper's) / 0.25   and   (accuracy - the paper's) / 3 points

so that 1 is a setting that misses each number by a quarter, or by three points. The least one of each panel
is what its preset takes, whatever DDPNOpt makes of it.

Tables 6 to 8 have their panels' settings, but their learning rates are smaller and their training losses as
well, so that they trained for longer. This trains their baselines for 20,000 steps; what the presets take is
the thousand of which the mean training loss is nearest to the paper's, by its logarithm.

Writes a CSV of all scores, and one of these losses, and prints the best.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.sweeps import completed, submitted
from service.cli.embedded import service
from service.client import Client
from service.paper import presets, published
from service.paper.results import stacked

STEPS: Final = (1500, 1800)
"""Points of one training: what ends at the first is what the other had there."""
WIDTHS: Final = (10, 12, 16, 24, 32)
BATCHES: Final = (8, 12, 16, 24, 32)
LOSS_UNIT: Final = 0.25
ACCURACY_UNIT: Final = 3.0
OPTIONS: Final[dict[str, list[dict[str, Any]]]] = {
    "sgd": [{}],
    "rmsprop": [
        {"rho": rho, "second_moment": moment}
        for rho in (0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
        for moment in ("batch", "per_sample")
    ],
    "ekfac": [{"damping": damping} for damping in (0.003, 0.01, 0.03, 0.1, 0.3)],
}
SHOWN: Final = 5
LONG_STEPS: Final = 20_000
LONG_EVERY: Final = 1000


@dataclass(frozen=True, slots=True)
class Scored:
    """A setting and how far its baseline is from the paper's.

    Attributes:
        losses, accuracies: means by learning rate; None where a seed diverged.
        score: see above; infinite where one diverged.
    """

    baseline: str
    width: int
    batch: int
    options: str
    steps: int
    losses: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    score: float


def spec(width: int, batch: int, seeds: int, baseline: str) -> dict[str, Any]:
    """Return a sweep of a baseline alone, a grid for each of its options."""
    reference = published.grid(baseline, "train_loss")
    assert reference is not None
    return {
        "name": f"calibration: {baseline}, {width} units, batch {batch}",
        "dataset": "digits",
        "model": {"kind": "fcn", "hidden": [width] * 4, "activation": "tanh"},
        "training": {"steps": STEPS[-1], "batch_size": batch, "eval_every": math.gcd(*STEPS)},
        "seeds": seeds,
        "grids": [
            {
                "baseline": baseline,
                "options": options,
                "learning_rate": list(reference.alone),
                "vxx_reg": [],
            }
            for options in OPTIONS[baseline]
        ],
    }


def scored(client: Client, sweep: dict[str, Any], baseline: str, width: int, batch: int) -> Iterator[Scored]:
    """Yield a score for each of a sweep's grids and each number of steps."""
    for grid, options in enumerate(OPTIONS[baseline]):
        losses, accuracies = (
            means(client, sweep, grid, metric, baseline) for metric in ("train_loss", "accuracy")
        )
        text = ", ".join(f"{name} {value}" for name, value in options.items())
        for steps, loss, accuracy in zip(STEPS, losses, accuracies, strict=True):
            reached = score(baseline, loss, accuracy)
            yield Scored(baseline, width, batch, text, steps, loss, accuracy, reached)


def means(
    client: Client, sweep: dict[str, Any], grid: int, metric: str, baseline: str
) -> list[tuple[float | None, ...]]:
    """Return, for each number of steps, the mean over the seeds by learning rate; None where one diverged."""
    reference = published.grid(baseline, metric)
    assert reference is not None
    curves = client.curves(sweep["id"], metric=metric, grid=grid)
    by_rate = []
    for rate in reference.alone:
        own = [curve for curve in curves if curve["learning_rate"] == rate]
        steps, values = stacked(sweep["spec"], metric, own)
        found = values.mean(axis=0)[[steps.tolist().index(wanted) for wanted in STEPS]].tolist()
        by_rate.append([value if math.isfinite(value) else None for value in found])
    return list(zip(*by_rate, strict=True))


def score(baseline: str, losses: tuple[float | None, ...], accuracies: tuple[float | None, ...]) -> float:
    """Return how far means by learning rate are from the paper's."""
    loss, accuracy = (published.grid(baseline, metric) for metric in ("train_loss", "accuracy"))
    assert loss is not None
    assert accuracy is not None
    squares = []
    for ours, theirs in zip(losses, loss.alone.values(), strict=True):
        squares.append(math.inf if ours is None else (math.log(ours / theirs) / LOSS_UNIT) ** 2)
    for ours, theirs in zip(accuracies, accuracy.alone.values(), strict=True):
        squares.append(math.inf if ours is None else ((ours - theirs) / ACCURACY_UNIT) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def search(client: Client, seeds: int, console: Console) -> list[Scored]:
    """Train every setting; return all scores, the best first."""
    settings = itertools.product(OPTIONS, WIDTHS, BATCHES)
    waiting = [
        (submitted(client, spec(w, b, seeds, baseline)), baseline, w, b) for baseline, w, b in settings
    ]
    found: list[Scored] = []
    for sweep_id, baseline, width, batch in waiting:
        found += scored(client, completed(client, sweep_id), baseline, width, batch)
        best = min(found[-len(OPTIONS[baseline]) * len(STEPS) :], key=lambda one: one.score)
        setting = f"{best.options} {best.steps} steps"
        console.print(f"{baseline}, {width} units, batch {batch}: {best.score:.2f} ({setting})")
    return sorted(found, key=lambda one: (one.baseline, one.score))


def lengths(client: Client, seeds: int) -> list[tuple[str, int, float, float]]:
    """Train the baselines of Tables 6 to 8; return table, steps, mean training loss and the paper's."""
    found = []
    for row in published.best_tuned():
        if row.method != "baseline":
            continue
        document = presets.spec(f"table{row.table}") | {"seeds": seeds}
        document["training"] |= {"steps": LONG_STEPS, "eval_every": LONG_EVERY}
        document["grids"][0]["vxx_reg"] = []
        sweep = completed(client, submitted(client, document))
        steps, values = stacked(sweep["spec"], "train_loss", client.curves(sweep["id"], metric="train_loss"))
        means = values.mean(axis=0).tolist()
        found += [(row.table, step, mean, row.train_loss) for step, mean in zip(steps, means, strict=True)]
    return found


def write_lengths(found: list[tuple[str, int, float, float]], path: Path, console: Console) -> None:
    """Write these losses as CSV; print where each is nearest to the paper's."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("table", "steps", "train_loss", "paper"), *found])
    for table in dict.fromkeys(row[0] for row in found):
        own = [row for row in found if row[0] == table and row[1] > 0]
        _, steps, loss, paper = min(own, key=lambda row: abs(math.log(row[2] / row[3])))
        console.print(f"Table {table}: {steps} steps, training loss {loss:.3g} (the paper: {paper:.3g})")


def write(found: list[Scored], path: Path) -> None:
    """Write all scores as CSV."""
    rates = range(len(found[0].losses))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{name}_{i + 1}" for name in ("train_loss", "accuracy") for i in rates]
        writer.writerow(["baseline", "width", "batch", "options", "steps", "score", *columns])
        for one in found:
            numbers = ["" if v is None else f"{v:.4f}" for v in (*one.losses, *one.accuracies)]
            setting = (one.baseline, one.width, one.batch, one.options, one.steps)
            writer.writerow([*setting, f"{one.score:.3f}", *numbers])


def table(found: list[Scored]) -> Table:
    """Return the best settings of each baseline, under the paper's numbers."""
    shown = Table(title="the settings whose baselines are nearest to Tables 9 and 10")
    for name in ("baseline", "units", "batch", "options", "steps", "score", "training loss", "accuracy"):
        shown.add_column(name)
    for baseline in OPTIONS:
        references = [published.grid(baseline, metric) for metric in ("train_loss", "accuracy")]
        paper = [_numbers(tuple(r.alone.values())) for r in references if r is not None]
        shown.add_row(baseline, "", "", "the paper", "", "", *paper)
        for one in [one for one in found if one.baseline == baseline][:SHOWN]:
            numbers = (_numbers(one.losses), _numbers(one.accuracies))
            setting = (str(one.width), str(one.batch), one.options, str(one.steps))
            shown.add_row("", *setting, f"{one.score:.2f}", *numbers)
    return shown


def _numbers(values: tuple[float | None, ...]) -> str:
    return ", ".join("–" if value is None else f"{value:.3g}" for value in values)


def main() -> None:
    """Search, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--home", type=Path, default=Path("out/calibration-home"), help="of the service")
    parser.add_argument("--only", choices=["fig4a", "tables6-8"])
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction"))
    arguments = parser.parse_args()
    console, started = Console(highlight=False, width=150), time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with service(arguments.home.resolve()) as url, Client(url) as client:
        if arguments.only != "tables6-8":
            found = search(client, arguments.seeds, console)
            write(found, arguments.out / "calibration.csv")
            console.print(table(found))
        if arguments.only != "fig4a":
            path = arguments.out / "calibration-tables6-8.csv"
            write_lengths(lengths(client, arguments.seeds), path, console)
    console.print(f"{time.monotonic() - started:.0f} s; wrote to {arguments.out}")


if __name__ == "__main__":
    main()
