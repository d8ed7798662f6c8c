"""A panel of Fig. 4a through the service, from the REST request to the heatmap, against Ray Tune.

    python -m benchmarks.tune [--trials 40] [--reused-trials 200] [--steps 1000]

200 runs (40 of SGD, 160 of DDPNOpt) of FCN 64-16-16-16-16-10, batch 8, on DIGITS; one side after the other on
the same machine, on all its cores.

Ours: the embedded service is started; then three sweeps, each with seeds of its own, are timed from the POST
to the heatmap's JSON: the first after the start, which also waits for Ray and its workers; a second; and one
with curves of about 20 points. The first two measure the nets at the start and at the end alone.

Ray Tune: a trial has one CPU, and as many run at a time as there are cores; once as Tune does it by default,
with a new process for every trial, and once with `reuse_actors`. What favours it: every trial is a plain loop
of torch.optim.SGD, also in the place of a DDPNOpt run, whose step costs more; it measures the net at the end
alone, and two of the four metrics; Ray is up before the clock starts. With fewer trials than runs, the others
are added at the pace that these had once the first ones had ended.

Both sides start a run from the same weights and give it the same batches. At these learning rates rounding
alone parts two such runs within a few hundred steps: accuracies agree over the seeds, not one by one.

Prints a table and writes out/bench-tune.json. Needs requirements/bench.txt.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from benchmarks.peers import NETS, plain_loop, samples_of
from benchmarks.settings import machine, save
from service.cli.embedded import service
from service.client import Client

NET: Final = NETS["64-16-16-16-16-10"]
BATCH: Final = 8
RATES: Final = (0.4, 0.6, 0.7, 0.8)
REGS: Final = (5e-5, 1e-4, 5e-4, 1e-3)
SEEDS: Final = 10
RUNS: Final = SEEDS * len(RATES) * (1 + len(REGS))
POLL_S: Final = 0.05
CORES: Final = os.cpu_count() or 1
OBJECT_STORE_BYTES: Final = 256 * 2**20
"""As the service gives its own Ray: results are small."""


def spec(steps: int, first_seed: int, *, curves: bool = False) -> dict[str, Any]:
    """Return the panel's spec, with metrics at the start and the end alone, or with curves as by default."""
    model, training = NET.model, {"steps": steps, "batch_size": BATCH}
    return {
        "name": "fig4a-sgd",
        "dataset": NET.dataset,
        "model": {"kind": model.kind, "hidden": list(model.hidden), "activation": model.activation},
        "training": training if curves else training | {"eval_every": steps},
        "seeds": list(range(first_seed, first_seed + SEEDS)),
        "grids": [
            {
                "baseline": "sgd",
                "learning_rate": list(RATES),
                "vxx_reg": list(REGS),
                "ddpnopt": {"terminal_hessian": "gauss_newton"},
            }
        ],
    }


@dataclass(frozen=True)
class Swept:
    """What the service took.

    Attributes:
        name: which sweep.
        seconds: from the POST to the heatmap's JSON.
        diverged: runs.
        accuracies: test accuracy of SGD by learning rate, the mean over the seeds, percent.
    """

    name: str
    seconds: float
    diverged: int
    accuracies: dict[str, float | None]


def swept(client: Client, name: str, document: dict[str, Any]) -> Swept:
    """Submit a sweep, wait for it and fetch its heatmap."""
    body = json.dumps(document).encode()
    start = time.perf_counter()
    sweep_id = client.submit(body, "application/json")["id"]
    *_, last = client.watch(sweep_id, POLL_S)
    client.heatmap_json(sweep_id, metric="train_loss")
    seconds = time.perf_counter() - start
    if last["state"] != "completed":
        sys.exit(f"the sweep {last['state']}: {last['error']}")
    cells = client.heatmap_json(sweep_id, metric="accuracy")["cells"]
    accuracies = {f"{cell['learning_rate']:g}": cell["baseline_mean"] for cell in cells}
    return Swept(name, seconds, last["progress"]["runs_diverged"], accuracies)


def through_the_service(steps: int) -> tuple[float, list[Swept]]:
    """Return the seconds until the service was ready, and the three sweeps."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home, service(Path(home)) as url, Client(url) as client:
        ready = time.perf_counter() - start
        return ready, [
            swept(client, "first after the start", spec(steps, 0)),
            swept(client, "second", spec(steps, SEEDS)),
            swept(client, "third, with curves", spec(steps, 2 * SEEDS, curves=True)),
        ]


def trials(steps: int, count: int) -> list[dict[str, Any]]:
    """Return `count` of the panel's runs as plain SGD: the baselines, then those in the partners' place."""
    baselines = [
        {"learning_rate": rate, "seed": seed, "steps": steps} for rate in RATES for seed in range(SEEDS)
    ]
    return [*baselines, *(run for _ in REGS for run in baselines)][:count]


def trial(config: Mapping[str, Any]) -> None:
    """Train one run in a process of Ray Tune."""
    from ray import tune

    torch.set_num_threads(1)
    run = config["run"]
    start = time.perf_counter()
    loop = plain_loop("sgd", NET, BATCH, run["steps"], rate=run["learning_rate"], seed=run["seed"])
    loop()
    test_inputs, test_targets = samples_of(NET, torch.float32, test=True)
    with torch.no_grad():
        loss = cross_entropy(loop.model(loop.inputs), loop.targets)
        right = loop.model(test_inputs).argmax(dim=1) == test_targets
    tune.report(
        {
            "train_loss": float(loss),
            "accuracy": 100 * float(right.float().mean()),
            "work_seconds": time.perf_counter() - start,
            "ended": time.time(),
        }
    )


@dataclass(frozen=True)
class Tuned:
    """What Ray Tune took.

    Attributes:
        name: how it was asked.
        trials: that were run.
        seconds: of all runs, with those that were not run added at the pace of the others.
        measured_seconds: of the trials that were run.
        pace_seconds: between the ends of two trials.
        work_seconds: of a trial's training and measuring, the median.
        accuracies: test accuracy of SGD by learning rate, the mean over the trials, percent.
    """

    name: str
    trials: int
    seconds: float
    measured_seconds: float
    pace_seconds: float
    work_seconds: float
    accuracies: dict[str, float]


def scaled(measured: float, ended: Sequence[float], runs: int) -> tuple[float, float]:
    """Add what was not run; return the seconds of all runs, and those between two ends.

    What comes before the first ends is paid once and not scaled.

    Args:
        measured: seconds of the trials that were run.
        ended: when each ended, in seconds; at least two.
        runs: how many there would have been.
    """
    at = sorted(ended)
    first = min(CORES, len(at) - 1)
    pace = (at[-1] - at[first - 1]) / (len(at) - first)
    return measured + (runs - len(at)) * pace, pace


@contextmanager
def private_ray() -> Iterator[float]:
    """Run a Ray of this process's own, on loopback and behind a token; yield the seconds until it was up."""
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # What keeps Ray on loopback on other systems does so here; a node's address does not.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even where it is told to be silent
    }
    import ray

    start = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=CORES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    try:
        yield time.perf_counter() - start
    finally:
        ray.shutdown()


def tuned(name: str, runs: Sequence[dict[str, Any]], *, reuse_actors: bool) -> Tuned:
    """Run trials under Ray Tune."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"run": tune.grid_search(list(runs))},
            tune_config=tune.TuneConfig(reuse_actors=reuse_actors),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        start = time.perf_counter()
        results = tuner.fit()
        measured = time.perf_counter() - start
    if results.errors:
        raise results.errors[0]
    metrics = [result.metrics for result in results]
    seconds, pace = scaled(measured, [m["ended"] for m in metrics], RUNS)
    by_rate: dict[str, list[float]] = {}
    for m in metrics:
        by_rate.setdefault(f"{m['config']['run']['learning_rate']:g}", []).append(m["accuracy"])
    return Tuned(
        name=name,
        trials=len(metrics),
        seconds=seconds,
        measured_seconds=measured,
        pace_seconds=pace,
        work_seconds=float(np.median([m["work_seconds"] for m in metrics])),
        accuracies={rate: float(np.mean(values)) for rate, values in by_rate.items()},
    )


def show(console: Console, ours: Sequence[Swept], peers: Sequence[Tuned]) -> None:
    """Print seconds and ratios, and what Ray Tune's are made of."""
    table = Table(title=f"{RUNS} runs on {CORES} cores, seconds; in brackets how often ours goes into them")
    for i, column in enumerate(("service", "ours", *(f"Ray Tune, {peer.name}" for peer in peers))):
        table.add_column(column, justify="right" if i else "left")
    for sweep in ours:
        ratios = [f"{peer.seconds:.1f} ({peer.seconds / sweep.seconds:.1f}×)" for peer in peers]
        table.add_row(sweep.name, f"{sweep.seconds:.2f}", *ratios)
    console.print(table)
    for peer in peers:
        whole = "all trials were run" if peer.trials >= RUNS else f"{RUNS} runs are scaled from it"
        console.print(
            f"Ray Tune, {peer.name}: {peer.trials} trials in {peer.measured_seconds:.1f} s, {whole}; one "
            f"ended every {peer.pace_seconds:.2f} s, and a trial's own work took {peer.work_seconds:.2f} s"
        )
        rows = (
            f"{rate}: {peer.accuracies[rate]:.1f} and {mean:.1f}"
            for rate, mean in ours[0].accuracies.items()
            if mean is not None and rate in peer.accuracies
        )
        console.print("  test accuracy of SGD, Ray Tune's and ours by learning rate: " + ", ".join(rows))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=40, help="in a new process each")
    parser.add_argument("--reused-trials", type=int, default=RUNS, help="in processes that are used again")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    for name in ("trials", "reused_trials"):
        if not CORES < getattr(given, name) <= RUNS:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: from {CORES + 1} to {RUNS}")
    console = Console(width=110)
    where = machine() | {"cores": str(CORES)}
    console.print(where)
    ready, ours = through_the_service(given.steps)
    with private_ray() as up:
        new, again = trials(given.steps, given.trials), trials(given.steps, given.reused_trials)
        peers = [
            tuned("default", new, reuse_actors=False),
            tuned("reuse_actors", again, reuse_actors=True),
        ]
    show(console, ours, peers)
    console.print(
        f"Not counted: {ready:.1f} s until the service was ready, {up:.1f} s until Tune's Ray was up"
    )
    document = {
        "machine": where,
        "runs": RUNS,
        "steps": given.steps,
        "service": {"ready_seconds": ready, "sweeps": [asdict(sweep) for sweep in ours]},
        "ray_tune": {
            "init_seconds": up,
            "ways": [asdict(peer) | {"scaled": peer.trials < RUNS} for peer in peers],
        },
        "ratios": {s.name: {p.name: p.seconds / s.seconds for p in peers} for s in ours},
    }
    save(Path("out/bench-tune.json"), document)


if __name__ == "__main__":
    main()
