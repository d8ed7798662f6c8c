"""The 200 runs of Fig. 4a (SGD), packed and one at a time: every bit of the results must agree.

    python -m benchmarks.solo [--steps N]

Trains the packs that the service plans, then every run alone, and compares the digest of the final weights,
the metrics and all points of the curves. Ends with 1 on any difference. Takes minutes: alone, a run gains
nothing from the others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import torch

from benchmarks.settings import machine
from benchmarks.specs import FIG4A, packs_of
from ddpnopt.config import RunConfig
from ddpnopt.pack.engine import train
from ddpnopt.results import METRICS, Finished

Result = tuple[Any, ...]
T = TypeVar("T")
WORKERS: Final = os.cpu_count() or 1


def one_thread() -> None:
    """Set up a worker as the service does."""
    torch.set_num_threads(1)


def results(runs: list[RunConfig]) -> list[Result]:
    """Train runs in one pack and return what must not depend on it, in the order of the runs."""
    *_, last = train(runs)
    assert isinstance(last, Finished)
    return [
        (r.state, r.weights_digest, r.metrics, tuple(r.curves[name].tobytes() for name in METRICS))
        for r in last.results
    ]


def timed(pool: Any, work: Callable[[T], list[Result]], items: Iterable[T]) -> tuple[list[Result], float]:
    """Do the work over the pool; return all results in order, and the seconds."""
    start = time.perf_counter()
    found = [result for part in pool.map(work, items, chunksize=1) for result in part]
    return found, time.perf_counter() - start


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help="fewer than the spec's, for a quick look")
    packs = packs_of(FIG4A, parser.parse_args().steps)
    alone = [[run] for pack in packs for run in pack]
    with multiprocessing.get_context("spawn").Pool(WORKERS, one_thread) as pool:
        pool.map(results, [[run] for run in packs[0][:WORKERS]])  # imports and data, outside of the timing
        packed, packed_s = timed(pool, results, packs)
        solo, solo_s = timed(pool, results, alone)
    different = sum(a != b for a, b in zip(packed, solo, strict=True))
    print(f"{machine()}, {WORKERS} processes")
    print(f"{len(packed)} runs in {len(packs)} packs: {packed_s:.1f} s; one at a time: {solo_s:.1f} s")
    print(f"runs whose weights, metrics or curves differ by a bit: {different}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
