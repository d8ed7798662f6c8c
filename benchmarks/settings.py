"""What the benchmarks share: the runs of a spec, timing, and a description of the machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


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


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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
