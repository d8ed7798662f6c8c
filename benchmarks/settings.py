"""What the benchmarks share: the runs of a spec, timing, and a description of the machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ddpnopt.config import RunConfig
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import plan
from workers.runner import cpu_name

FIG4A: Final = Path(__file__).parent.parent / "examples" / "digits-fig4a-sgd.yaml"


def packs_of(path: Path, steps: int | None = None) -> list[list[RunConfig]]:
    """Return the packs of a spec file as the service plans them, with other `steps` if given."""
    document = parse_yaml(path.read_bytes())
    if steps is not None:
        document["training"]["steps"] = steps
    spec = parse_spec(document)
    return [
        [spec.run_config(run.grid, run.method, run.learning_rate, run.vxx_reg, run.seed) for run in pack]
        for pack in plan(spec).packs
    ]


def interleaved(sides: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Time several sides in turn, so that whatever else the machine does falls on all of them.

    Returns:
        Median seconds of each side.
    """
    seconds = np.empty((repeats, len(sides)))
    for repeat in range(repeats):
        for side, call in enumerate(sides):
            start = time.perf_counter()
            call()
            seconds[repeat, side] = time.perf_counter() - start
    medians: list[float] = np.median(seconds, axis=0).tolist()
    return medians


def machine() -> dict[str, str]:
    """Describe where the figures come from."""
    return {
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def save(path: Path, document: Any) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
