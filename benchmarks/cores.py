"""How to fill the cores: one worker of many threads, or as many workers of one thread.

    python -m benchmarks.cores [--steps 300]

Trains runs of Fig. 4a (SGD in lanes, EKFAC as tensors) and some convolutions, divided among processes and
threads in every way that uses all CPUs, and on one. Each worker is a process of its own, as in the service,
and has loaded everything before the clock starts. Prints run-steps per second and the gain over one process
with one thread, and writes out/bench-cores.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.settings import machine, save
from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.pack.engine import train

CORES: Final = os.cpu_count() or 1
CNN: Final = ModelConfig((32,), "relu", "cnn", (8, 8))


def runs_of(kind: str, steps: int) -> list[RunConfig]:
    """Return the runs that are divided: a baseline and its partner for each seed."""
    baseline, model, count, steps = {
        "lanes: SGD": ("sgd", ModelConfig((10,) * 4), 128, 30 * steps),
        "tensors: EKFAC": ("ekfac", ModelConfig((10,) * 4), 256, steps),
        "tensors: CNN": ("sgd", CNN, 16, max(2, steps // 4)),
    }[kind]
    training = TrainingConfig(steps, 16, steps)
    optimizers = (
        OptimizerConfig(baseline, "baseline", 0.01),
        OptimizerConfig(baseline, "ddpnopt", 0.01, 1e-4, FeedbackConfig("gauss_newton")),
    )
    return [
        RunConfig("digits", model, "cross_entropy", training, optimizer, seed)
        for seed in range(count // 2)
        for optimizer in optimizers
    ]


def _set_up(threads: int) -> None:
    torch.set_num_threads(threads)


def _train(runs: Sequence[RunConfig]) -> int:
    list(train(runs))
    return len(runs)


def rate(kind: str, steps: int, processes: int, threads: int) -> float:
    """Return run-steps per second of a division."""
    runs = runs_of(kind, steps)
    size = -(-len(runs) // processes)
    packs = [runs[i : i + size] for i in range(0, len(runs), size)]
    warm_up = runs_of(kind, 1)[:2]
    with multiprocessing.get_context("spawn").Pool(processes, _set_up, (threads,)) as pool:
        pool.map(_train, [warm_up] * processes, chunksize=1)
        start = time.perf_counter()
        pool.map(_train, packs, chunksize=1)
        seconds = time.perf_counter() - start
    return len(runs) * runs[0].training.steps / seconds


def divisions() -> list[tuple[int, int]]:
    """Return (processes, threads) that use all CPUs, after one that uses one."""
    return [(1, 1)] + [(CORES // t, t) for t in range(1, CORES + 1) if CORES % t == 0 and CORES > 1]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of EKFAC; SGD does 30 times as many")
    steps = parser.parse_args().steps
    rows: list[dict[str, Any]] = []
    for kind in ("lanes: SGD", "tensors: EKFAC", "tensors: CNN"):
        alone = 0.0
        for processes, threads in divisions():
            found = max(rate(kind, steps, processes, threads) for _ in range(2))
            alone = alone or found
            rows.append(
                {
                    "kind": kind,
                    "processes": processes,
                    "threads": threads,
                    "run_steps_per_second": found,
                    "gain": found / alone,
                }
            )
            print(
                f"{kind:>16}: {processes} processes of {threads} threads: "
                f"{found:>9.0f} run-steps/s, {found / alone:.2f}x",
                flush=True,
            )
    save(Path("out/bench-cores.json"), {"machine": machine(), "cores": CORES, "divisions": rows})


if __name__ == "__main__":
    main()
