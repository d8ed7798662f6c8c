"""What an update of a run costs that trains alone, in seconds and in bytes (Fig. 3, Table 4)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ddpnopt import allocations
from ddpnopt.pack.batches import BatchStream
from ddpnopt.pack.part import Part, Samples

FIRST: Final = 3
"""Updates that are not timed; memory is that of the making of the net and of these."""

MOST: Final = 50
LEAST: Final = 3
"""Updates that are timed, however long they take."""

LONGEST_S: Final = 3.0
"""No further update is timed after so many seconds."""


def measure(make: Callable[[], Part], batches: BatchStream, train_set: Samples) -> Tensor:
    """Train a net of its own for a few updates.

    Args:
        make: makes the net with its optimizer.
        batches: what it trains on.
        train_set: their samples.

    Returns:
        Median seconds of an update, and bytes that torch allocates at its peak, from the making of the net to
        the end of its third update: (2,) float64. The seconds of a net that diverges before are NaN.
    """
    batches.stretch(1, 1)  # drawn before anything is measured
    made: list[Part] = []

    def start() -> None:
        made.append(make())
        for update in range(1, FIRST + 1):
            _advance(made[-1], update, batches, train_set)

    peak = _peak(start, train_set.inputs.device)
    seconds = _seconds(made[-1], batches, train_set)
    return torch.tensor([seconds, peak], dtype=torch.float64)


def _advance(part: Part, update: int, batches: BatchStream, train_set: Samples) -> None:
    part.advance(batches.stretch(update, update), train_set)
    if train_set.inputs.is_cuda:
        torch.cuda.synchronize(train_set.inputs.device)


def _peak(start: Callable[[], None], device: torch.device) -> int:
    if device.type != "cuda":
        return allocations.peak(start)
    start()  # what the libraries keep for themselves is there from the first time on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start()
    return torch.cuda.max_memory_allocated(device) - before


def _seconds(part: Part, batches: BatchStream, train_set: Samples) -> float:
    taken: list[float] = []
    while len(taken) < MOST and (len(taken) < LEAST or sum(taken) < LONGEST_S):
        update = FIRST + 1 + len(taken)
        batches.stretch(update, update)
        started = time.perf_counter()
        _advance(part, update, batches, train_set)
        taken.append(time.perf_counter() - started)
        if len(part.index) == 0:  # it diverged: this was no whole update
            taken.pop()
            break
    return float(torch.tensor(taken, dtype=torch.float64).median()) if taken else float("nan")
