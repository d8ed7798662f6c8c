"""Where the time of the tensor path goes: torch's own record of a pack's updates, by operation.

    python -m benchmarks.profile [--runs 200] [--updates 30]

For SGD, EKFAC and their DDPNOpt partners on 64-16-16-16-16-10 at batch 8: microseconds per run and step in
all, and in the operations that take the most. Prints tables and writes out/profile.json. (Torch sees nothing
of the fast path's kernel; `perf record` looks into it.)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.pack import METHODS, pack_side, run_config
from benchmarks.peers import NETS
from benchmarks.settings import machine, save

SHOWN: Final = 12
NET: Final = "64-16-16-16-16-10"


def profile(baseline: Any, method: str, runs: int, updates: int) -> dict[str, Any]:
    """Return one pack's time by operation, in microseconds per run and step."""
    side = pack_side(
        [run_config(NETS[NET], 8, baseline, method, seed) for seed in range(runs)], updates, lanes=False
    )
    side()
    start = time.perf_counter()
    side()
    whole = (time.perf_counter() - start) / runs / updates * 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        side()
    times = {
        event.key: event.self_cpu_time_total / runs / updates
        for event in record.key_averages()
        if event.key.startswith("aten::")
    }
    shown = dict(sorted(times.items(), key=lambda item: -item[1])[:SHOWN])
    return {"baseline": baseline, "method": method, "microseconds": whole, "operations": shown}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--updates", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for baseline in ("sgd", "ekfac"):
        for method in METHODS:
            rows.append(profile(baseline, method, options.runs, options.updates))
            print(f"{baseline}, {method}: {rows[-1]['microseconds']:.1f} µs a run and step, of which")
            for name, us in rows[-1]["operations"].items():
                print(f"  {us:>7.2f}  {name.removeprefix('aten::')}")
    save(Path("out/profile.json"), {"machine": machine(), "runs": options.runs, "packs": rows})


if __name__ == "__main__":
    main()
