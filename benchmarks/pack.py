"""Time per run and step: packs against plain PyTorch loops, torch.func and the machine's matmul rate.

    python -m benchmarks.pack [--quick]

All sides train the same nets on the same batches with one thread. They are timed several times in turn, and
the median is taken. Prints tables and writes out/bench-pack.json.

 - Each optimizer's packs, baseline and DDPNOpt partners, against torch.optim's plain loop of that baseline
   (EKFAC's and KFAC's: `benchmarks.peers`); R = 1 to 1000.
 - The same packs on the plain path, by tensors alone.
 - torch.func's ensembling of plain SGD, eager and compiled, against SGD packs.
 - The part of the machine's rate of batched products, at the sizes of these nets, that a pack reaches.
 - A mixed pack against its parts, and a pack that half of its members have left against half a pack.
 - The paper's CNN on MNIST, where its files are (docs/datasets.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers import (
    NETS,
    Net,
    Product,
    ddpnopt_products,
    flops,
    functional_ensemble,
    matmul_side,
    plain_loop,
    sgd_products,
)
from benchmarks.settings import interleaved, machine, save
from ddpnopt.config import FeedbackConfig, OptimizerConfig, PairedBaseline, RunConfig, TrainingConfig
from ddpnopt.datasets import fetch, store
from ddpnopt.datasets.load import load
from ddpnopt.lanes.library import library
from ddpnopt.pack.engine import Trainer

SETTINGS: Final = (
    ("64-16-16-16-16-10", 8),
    ("64-16-16-16-16-10", 16),
    ("64-16-16-16-16-10", 32),
    ("64-10-10-10-10-10", 16),
)
SIZES: Final = (1, 10, 50, 200, 1000)
BASELINES: Final[tuple[PairedBaseline, ...]] = ("sgd", "rmsprop", "adam", "kfac", "ekfac")
METHODS: Final[dict[str, FeedbackConfig | None]] = {
    "baseline": None,
    "DDPNOpt, GN, outer product": FeedbackConfig("gauss_newton"),
    "DDPNOpt, exact, full": FeedbackConfig(),
}
RATES: Final = {"sgd": 0.05, "rmsprop": 1e-4, "adam": 1e-4, "kfac": 1e-3, "ekfac": 1e-3}
"""Small, so that nobody leaves: what a step costs does not depend on it."""
SECONDS: Final = 0.15
"""About how long a side is timed at once."""
COMPARED: Final = 200
"""Runs of the packs that are compared with ensembles and with the machine."""


def run_config(net: Net, batch: int, baseline: PairedBaseline, method: str, seed: int) -> RunConfig:
    """Return one run."""
    feedback = METHODS[method]
    optimizer = OptimizerConfig(
        baseline,
        "baseline" if feedback is None else "ddpnopt",
        RATES[baseline],
        None if feedback is None else 1e-4,
        feedback,
    )
    training = TrainingConfig(steps=10**7, batch_size=batch, eval_every=10**7)
    return RunConfig(net.dataset, net.model, "cross_entropy", training, optimizer, seed)


@dataclass
class PackSide:
    """A pack in training; a call does `updates` updates of all its members."""

    trainer: Trainer
    updates: int

    def __call__(self) -> None:
        """Train."""
        self.trainer.advance(self.trainer.step + self.updates)


def pack_side(runs: Sequence[RunConfig], updates: int, *, lanes: bool = True) -> PackSide:
    """Return a pack, warmed up."""
    trainer = Trainer(runs, load(runs[0].dataset), torch.device("cpu"), lanes=lanes, threads=1)
    trainer.advance(2)
    return PackSide(trainer, updates)


def updates_for(runs: int, microseconds: float) -> int:
    """Return how many updates of a pack take about `SECONDS`, at so many microseconds a run and step."""
    return max(2, min(2000, int(SECONDS * 1e6 / (runs * microseconds))))


def times(sides: Sequence[tuple[Callable[[], None], int]], repeats: int) -> list[float]:
    """Return microseconds per run and step of sides, each a call and the run-steps that it does."""
    seconds = interleaved([side for side, _ in sides], repeats)
    return [s / count * 1e6 for s, (_, count) in zip(seconds, sides, strict=True)]


def measure_packs(name: str, batch: int, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time every optimizer's packs of every size against its plain loop."""
    net, rows = NETS[name], []
    for baseline in BASELINES:
        guess = 200.0 if baseline in ("kfac", "ekfac") else 15.0
        plain_updates = 150
        sides: list[tuple[Callable[[], None], int]] = [
            (plain_loop(baseline, net, batch, plain_updates, rate=RATES[baseline]), plain_updates)
        ]
        labels: list[tuple[str, int, bool]] = []
        for method in METHODS:
            chosen = [(size, True) for size in sizes] + [(COMPARED, False)]
            for size, lanes in chosen:
                runs = [run_config(net, batch, baseline, method, seed) for seed in range(size)]
                updates = updates_for(size, guess)
                sides.append((pack_side(runs, updates, lanes=lanes), updates * size))
                labels.append((method, size, lanes))
        sides[0][0]()
        plain, *packed = times(sides, repeats)
        rows += [
            {
                "baseline": baseline,
                "method": method,
                "runs": size,
                "path": "as chosen" if lanes else "tensors",
                "microseconds": us,
                "plain_microseconds": plain,
                "ratio": us / plain,
            }
            for (method, size, lanes), us in zip(labels, packed, strict=True)
        ]
    return rows


def measure_ensembles(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Time torch.func's ensembling of plain SGD against an SGD pack of as many runs."""
    net, updates = NETS[name], 60
    runs = [run_config(net, batch, "sgd", "baseline", seed) for seed in range(COMPARED)]
    sides: dict[str, Callable[[], None]] = {"pack": pack_side(runs, updates)}
    sides["torch.func"] = functional_ensemble(COMPARED, net, batch, updates)
    if library("float32") is not None:  # torch.compile needs a compiler as well
        sides["torch.func, compiled"] = functional_ensemble(COMPARED, net, batch, updates, compiled=True)
    for side in sides.values():
        side()
    found = times([(side, updates * COMPARED) for side in sides.values()], repeats)
    return dict(zip(sides, found, strict=True))


def measure_rate(name: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Compare the rate at which packs do the products of a step with the rate of these products alone."""
    net, found = NETS[name], []
    widths = net.widths()
    of_method: dict[str, list[Product]] = {
        "baseline": sgd_products(widths, batch),
        "DDPNOpt, GN, outer product": ddpnopt_products(widths, batch),
    }
    for method, products in of_method.items():
        runs = [run_config(net, batch, "sgd", method, seed) for seed in range(COMPARED)]
        updates = 100
        pack, alone = times(
            [
                (pack_side(runs, updates), updates * COMPARED),
                (matmul_side(products, COMPARED, updates), updates * COMPARED),
            ],
            repeats,
        )
        work = flops(products)
        found.append(
            {
                "method": method,
                "flops": work,
                "pack_gflops": work / pack / 1e3,
                "matmul_gflops": work / alone / 1e3,
                "fraction": alone / pack,
            }
        )
    return found


def measure_company(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Time a mixed pack against its parts, and what is left of a pack against a pack of the rest."""
    net, updates = NETS[name], 40
    parts = {
        (baseline, method): [run_config(net, batch, baseline, method, seed) for seed in range(32)]
        for baseline in BASELINES
        for method in METHODS
    }
    whole = [run for runs in parts.values() for run in runs]
    mixed, *apart = (
        seconds
        for seconds in interleaved(
            [pack_side(whole, updates), *(pack_side(runs, updates) for runs in parts.values())], repeats
        )
    )
    many = [run_config(net, batch, "sgd", "DDPNOpt, GN, outer product", seed) for seed in range(COMPARED)]
    left = pack_side(many, 4 * updates)
    for place in range(0, COMPARED, 2):
        poisoned = [torch.full_like(u, torch.nan) for u in left.trainer.controls_of(place)]
        left.trainer.set_controls_of(place, poisoned)
    left.trainer.advance(left.trainer.step + 1)
    assert left.trainer.active == COMPARED // 2
    full, half_left, half = interleaved(
        [pack_side(many, 4 * updates), left, pack_side(many[1::2], 4 * updates)], repeats
    )
    return {
        "mixed_to_parts": mixed / sum(apart),
        "half_left_to_half": half_left / half,
        "half_left_to_full": half_left / full,
    }


def measure_cnn(repeats: int) -> list[dict[str, Any]]:
    """Time packs of the paper's CNN on MNIST at batch 128."""
    net, batch, rows = NETS["MNIST CNN"], 128, []
    plain = plain_loop("sgd", net, batch, 2, rate=1e-3)
    sides: list[tuple[Callable[[], None], int]] = [(plain, 2)]
    labels = []
    for method in ("baseline", "DDPNOpt, GN, outer product"):
        for size in (1, 4):
            runs = [
                replace(run_config(net, batch, "sgd", method, seed), dataset=net.dataset)
                for seed in range(size)
            ]
            sides.append((pack_side(runs, 1), size))
            labels.append((method, size))
    alone, *packed = times(sides, repeats)
    for (method, size), us in zip(labels, packed, strict=True):
        rows.append(
            {
                "baseline": "sgd",
                "method": method,
                "runs": size,
                "path": "as chosen",
                "microseconds": us,
                "plain_microseconds": alone,
                "ratio": us / alone,
            }
        )
    return rows


def show_packs(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print one setting's packs: a row for each optimizer, a column for each size."""
    sizes = sorted({row["runs"] for row in rows if row["path"] == "as chosen"})
    table = Table(title=title, title_justify="left")
    for column in ("µs a run and step", "plain loop", *(f"{size}" for size in sizes), f"{COMPARED}, tensors"):
        table.add_column(column, justify="right")
    for baseline in BASELINES:
        for method in METHODS:
            own = {
                (r["runs"], r["path"]): r for r in rows if (r["baseline"], r["method"]) == (baseline, method)
            }
            if not own:
                continue
            cells = [own.get((size, "as chosen")) for size in sizes] + [own.get((COMPARED, "tensors"))]
            plain = next(iter(own.values()))["plain_microseconds"]
            name = baseline if method == "baseline" else f"  {method}"
            table.add_row(
                name,
                f"{plain:.0f}" if method == "baseline" else "",
                *("" if c is None else f"{c['microseconds']:.1f} ({c['ratio']:.3f}×)" for c in cells),
            )
    console.print(table)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one setting, fewer sizes: to see that it works")
    options = parser.parse_args()
    settings, sizes, repeats = (SETTINGS[:1], (1, 50), 2) if options.quick else (SETTINGS, SIZES, 3)
    torch.set_num_threads(1)
    console = Console(width=150)
    found = library("float32")
    about = machine() | {"kernel": found.name if found else "none"}
    console.print(about)
    report: dict[str, Any] = {"machine": about, "settings": []}
    for name, batch in settings:
        rows = measure_packs(name, batch, sizes, repeats)
        rate = measure_rate(name, batch, repeats)
        ensembles = measure_ensembles(name, batch, repeats)
        show_packs(console, f"{name}, batch {batch}; in brackets: to the plain loop", rows)
        for row in rate:
            console.print(
                f"products of {row['method']}: {row['pack_gflops']:.1f} GFLOP/s in a pack of {COMPARED}, "
                f"{row['matmul_gflops']:.1f} by torch.bmm alone: {row['fraction']:.0%}"
            )
        for peer, us in ensembles.items():
            console.print(f"SGD, {COMPARED} runs, {peer}: {us:.1f} µs (pack {ensembles['pack'] / us:.2f}×)")
        report["settings"].append(
            {"net": name, "batch": batch, "packs": rows, "rate": rate, "ensembles": ensembles}
        )
    company = measure_company(*SETTINGS[0], repeats)
    console.print(
        f"a mixed pack takes {company['mixed_to_parts']:.2f}× its parts; half of whose members have left, "
        f"{company['half_left_to_half']:.2f}× a pack of the other half ({company['half_left_to_full']:.2f}× "
        "the whole)"
    )
    report["company"] = company
    if fetch.missing("mnist", store.directory() / "mnist"):
        console.print(f"the paper's CNN was left out: no MNIST in {store.directory()} (docs/datasets.md)")
    else:
        report["cnn"] = measure_cnn(max(2, repeats // 2))
        show_packs(console, "the paper's CNN on MNIST, batch 128", report["cnn"])
    save(Path("out/bench-pack.json"), report)


if __name__ == "__main__":
    main()
