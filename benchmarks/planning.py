"""Time the planning of large grids: from a parsed spec to its packs.

    python -m benchmarks.planning

Prints seconds for grids of 10,000, 100,000 and 1,000,000 runs of Fig. 4a's spec; writes out/bench-plan.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from benchmarks.settings import machine, save
from benchmarks.specs import FIG4A
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import plan

RUNS_A_SEED: Final = 20
SIZES: Final = (10_000, 100_000, 1_000_000)


def spec_of(runs: int) -> dict[str, Any]:
    """Return Fig. 4a's spec with as many learning rates and seeds as make so many runs."""
    document = parse_yaml(FIG4A.read_bytes())
    seeds = min(10_000, runs // RUNS_A_SEED)
    rows = runs // (5 * seeds)
    document["seeds"] = seeds
    document["grids"][0]["learning_rate"] = [0.4 + 0.001 * k for k in range(rows)]
    return document


def main() -> None:
    """Measure, print and save."""
    rows = []
    for runs in SIZES:
        spec = parse_spec(spec_of(runs))
        start = time.perf_counter()
        planned = plan(spec)
        seconds = time.perf_counter() - start
        assert planned.runs_total == runs
        rows.append({"runs": runs, "packs": len(planned.packs), "seconds": seconds})
        print(f"{runs:>9} runs in {len(planned.packs)} packs: {seconds:.3f} s")
    save(Path("out/bench-plan.json"), {"machine": machine(), "plans": rows})


if __name__ == "__main__":
    main()
