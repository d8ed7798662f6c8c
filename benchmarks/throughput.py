"""How many runs a second the service gets through, and what it adds to the training.

    python -m benchmarks.throughput [--runs 10000] [--trials 200] [--optuna-trials 400]

First, runs of one step, from the POST to the last result in SQL, with all metrics and curves: on SQLite and
on a PostgreSQL of this process's own, each with a warm private Ray. Against them, in the same run and on the
same machine: Ray Tune, whose trials report one number and train nothing; and Optuna on SQLite, whose trials
ask, report one number and tell, in this process, and train nothing either.

Second, the 600 runs of the whole of Fig. 4a, five times each: by the service (POST to the last result), and
the same packs by the library alone, in as many processes as the service has workers, which take pack by pack
from a queue and keep nothing.

Prints tables and writes out/bench-throughput.json. Needs requirements/bench.txt.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.queue import DATABASES
from benchmarks.settings import machine, save
from benchmarks.specs import packs_of
from benchmarks.tune import private_ray
from ddpnopt.config import RunConfig
from service.cli.embedded import service
from service.client import Client

ALL_OF_FIG4A: Final = Path(__file__).parent.parent / "examples" / "digits-fig4a-all.yaml"
WORKERS: Final = os.cpu_count() or 1
POLL_S: Final = 0.1
"""Asking costs the machine that is measured: more often would be a load of its own."""
REPEATS: Final = 5


def one_step(runs: int, first_seed: int) -> dict[str, Any]:
    """Return a spec of runs of one step on DIGITS, 20 a seed."""
    return {
        "name": "one step",
        "dataset": "digits",
        "model": {"kind": "fcn", "hidden": [10, 10, 10, 10]},
        "training": {"steps": 1, "batch_size": 16},
        "seeds": list(range(first_seed, first_seed + runs // 20)),
        "grids": [
            {
                "baseline": "sgd",
                "learning_rate": [0.4, 0.6, 0.7, 0.8],
                "vxx_reg": [5e-5, 1e-4, 5e-4, 1e-3],
            }
        ],
    }


def swept(client: Client, document: dict[str, Any]) -> float:
    """Return the seconds from the POST of a sweep to its last result."""
    body = json.dumps(document).encode()
    start = time.perf_counter()
    sweep_id = client.submit(body, "application/json")["id"]
    *_, last = client.watch(sweep_id, POLL_S)
    seconds = time.perf_counter() - start
    if last["state"] != "completed" or last["progress"]["runs_reused"]:
        raise SystemExit(f"the sweep {last['state']}: {last['error']}")
    return seconds


@contextmanager
def running(database: str) -> Iterator[Client]:
    """Run a service of this process's own on a kind of database, with warm workers."""
    with (
        DATABASES[database]() as url,
        tempfile.TemporaryDirectory() as home,
        service(Path(home), DDPSWEEP_DATABASE_URL=url) as where,
        Client(where) as client,
    ):
        swept(client, one_step(1000, 10**6))
        yield client


def by_optuna(trials: int) -> float:
    """Return trials a second of Optuna on SQLite."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        sampler = optuna.samplers.RandomSampler(seed=0)
        study = optuna.create_study(storage=f"sqlite:///{folder}/optuna.db", sampler=sampler)
        start = time.perf_counter()
        study.optimize(lambda trial: trial.suggest_float("learning_rate", 0.4, 0.8), n_trials=trials)
        return trials / (time.perf_counter() - start)


def _trial(config: dict[str, Any]) -> None:
    from ray import tune

    tune.report({"train_loss": config["learning_rate"]})


def by_tune(trials: int, *, reuse_actors: bool) -> float:
    """Return trials a second of Ray Tune."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(_trial, {"cpu": 1}),
            param_space={"learning_rate": tune.grid_search([0.4 + k / trials for k in range(trials)])},
            tune_config=tune.TuneConfig(reuse_actors=reuse_actors),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        start = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - start
    if results.errors:
        raise results.errors[0]
    return trials / seconds


def _work(tasks: Any, done: Any) -> None:
    """Train what comes, in a process of its own, as a worker does."""
    import torch

    from ddpnopt.datasets.load import load
    from ddpnopt.lanes.library import library
    from ddpnopt.pack.engine import train

    torch.set_num_threads(1)
    data = load("digits")
    library("float32")
    done.put("ready")
    while (pack := tasks.get()) is not None:
        for _ in train(pack, data):
            pass
        done.put("pack")


@contextmanager
def library_alone() -> Iterator[Callable[[Sequence[Sequence[RunConfig]]], float]]:
    """Start processes; yield a function from packs to the seconds that they take."""
    context = multiprocessing.get_context("spawn")
    tasks, done = context.Queue(), context.Queue()
    processes = [context.Process(target=_work, args=(tasks, done)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    for _ in processes:
        done.get()

    def timed(packs: Sequence[Sequence[RunConfig]]) -> float:
        start = time.perf_counter()
        for pack in packs:
            tasks.put(pack)
        for _ in packs:
            done.get()
        return time.perf_counter() - start

    try:
        yield timed
    finally:
        for _ in processes:
            tasks.put(None)
        for process in processes:
            process.join()


def overhead(steps: int | None) -> dict[str, Any]:
    """Time Fig. 4a by the service and by the library alone, in turn."""
    from service.sweeps.documents import parse_yaml

    document = parse_yaml(ALL_OF_FIG4A.read_bytes()) | {"reuse": False}
    if steps is not None:
        document["training"]["steps"] = steps
    packs = packs_of(ALL_OF_FIG4A, steps)
    ours, alone = [], []
    with running("SQLite") as client, library_alone() as train_alone:
        train_alone(packs[:WORKERS])
        for _ in range(REPEATS):
            alone.append(train_alone(packs))
            ours.append(swept(client, document))
    medians = float(np.median(ours)), float(np.median(alone))
    return {
        "packs": len(packs),
        "service_seconds": ours,
        "library_seconds": alone,
        "overhead": medians[0] / medians[1] - 1,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="of one step")
    parser.add_argument("--trials", type=int, default=200, help="of Ray Tune")
    parser.add_argument("--optuna-trials", type=int, default=400)
    parser.add_argument("--steps", type=int, help="of Fig. 4a; its own if not given")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    console = Console(highlight=False)

    rates = {}
    for database in DATABASES:
        with running(database) as client:
            seconds = [swept(client, one_step(arguments.runs, 10**5 * k)) for k in range(REPEATS)]
        rates[f"ours, {database}"] = arguments.runs / float(np.median(seconds))
    rates["Optuna, SQLite"] = by_optuna(arguments.optuna_trials)
    with private_ray():
        rates["Ray Tune"] = by_tune(arguments.trials, reuse_actors=False)
        rates["Ray Tune, reuse_actors"] = by_tune(arguments.trials, reuse_actors=True)
    table = Table(title="runs or trials a second")
    table.add_column("")
    table.add_column("a second", justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.1f}")
    console.print(table)

    added = overhead(arguments.steps)
    console.print(
        f"Fig. 4a, 600 runs in {added['packs']} packs: service "
        + ", ".join(f"{s:.2f}" for s in added["service_seconds"])
        + " s; library alone "
        + ", ".join(f"{s:.2f}" for s in added["library_seconds"])
        + f" s; the service adds {100 * added['overhead']:.1f} %"
    )
    save(
        arguments.out / "bench-throughput.json",
        {"machine": machine(), "per_second": rates, "overhead": added},
    )


if __name__ == "__main__":
    main()
