"""How soon sweeps stop that are asked to: answered, and over, with all devices busy.

    python -m benchmarks.stops [--repeats 10]

Two sweeps on a service of this process's own: small nets in lanes, and a convolutional net by tensors, whose
updates take long. Each is paused, resumed and cancelled in mid-training again and again. What is asked for
has to be visible within 2 s, and done within 15.

Prints a table; writes out/bench-stops.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.settings import machine, save
from service.cli.embedded import service
from service.client import Client

POLL_S: Final = 0.05
LANES: Final[dict[str, Any]] = {
    "name": "small nets in lanes",
    "dataset": "digits",
    "model": {"kind": "fcn", "hidden": [10, 10, 10, 10]},
    "training": {"steps": 200_000, "batch_size": 16, "eval_every": 10_000},
    "seeds": 20,
    "reuse": False,
    "grids": [{"baseline": "sgd", "learning_rate": [0.1, 0.2], "vxx_reg": [1e-4, 1e-3]}],
}
TENSORS: Final[dict[str, Any]] = LANES | {
    "name": "a convolutional net by tensors",
    "model": {"kind": "cnn", "channels": [32, 32, 32, 32], "hidden": [32], "activation": "relu"},
    "training": {"steps": 100_000, "batch_size": 128, "eval_every": 10_000, "train_metrics": "running"},
    "seeds": 2,
    "grids": [{"baseline": "ekfac", "learning_rate": [0.01], "vxx_reg": [1e-4]}],
}


def measure(client: Client, document: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Stop a sweep again and again; return the seconds of each answer and each end."""
    names = [f"{act} {what}" for act in ("pause", "cancel") for what in ("answered", "done")]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        sweep_id = client.submit(json.dumps(document).encode(), "application/json")["id"]
        for act, end in ((client.pause, "paused"), (client.cancel, "cancelled")):
            wait_for_training(client, sweep_id)
            time.sleep(random.uniform(0.2, 1.2))  # anywhere in an update
            started = time.monotonic()
            act(sweep_id)
            name = act.__name__
            found[f"{name} answered"].append(time.monotonic() - started)
            while client.sweep(sweep_id)["state"] != end:
                time.sleep(POLL_S)
            found[f"{name} done"].append(time.monotonic() - started)
            if end == "paused":
                client.resume(sweep_id)
    return found


def wait_for_training(client: Client, sweep_id: str) -> None:
    """Wait until a sweep has running packs, and all of these have begun."""
    while True:
        packs = [pack for pack in client.cluster()["packs"] if pack["sweep_id"] == sweep_id]
        if packs and all(pack["seconds"] > 0 for pack in packs):
            return
        time.sleep(POLL_S)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, service(Path(home)) as url, Client(url) as client:
        found = {
            document["name"]: measure(client, document, arguments.repeats) for document in (LANES, TENSORS)
        }
    table = Table(title=f"seconds, median and longest of {arguments.repeats}")
    for column in ("", *next(iter(found.values()))):
        table.add_column(column, justify="right")
    for name, times in found.items():
        table.add_row(name, *(f"{np.median(t):.2f}, {max(t):.2f}" for t in times.values()))
    Console(highlight=False, width=140).print(table)
    save(arguments.out / "bench-stops.json", {"machine": machine()} | found)


if __name__ == "__main__":
    main()
