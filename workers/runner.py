"""Train one pack and speak of it in protocol events. What every executor runs in the end."""

from __future__ import annotations

import gc
import logging
import platform
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ddpnopt import NUMERICS_VERSION
from ddpnopt.datasets.load import Dataset, load
from ddpnopt.errors import DDPNOptError
from ddpnopt.lanes.library import library
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.pack.engine import train
from ddpnopt.results import Progress, RunResult
from workers import memory
from workers.protocol import Environment, PackEvent, PackFailed, PackFinished, PackProgress, PackTask

log = logging.getLogger(__name__)


def run_pack(
    task: PackTask, checkpoints: Checkpoints | None = None, device: str = "cpu"
) -> Iterator[PackEvent]:
    """Train a pack.

    Args:
        task: what to train.
        checkpoints: where its state is kept, to go on from after an interruption.
        device: where to train.

    Yields:
        `PackProgress` at every point of the curves, then `PackFinished` or `PackFailed`. Nothing that
        goes wrong in training escapes as an exception.
    """
    try:
        data = load(task.runs[0].dataset)
        results: list[RunResult] = []
        for event in _in_parts(task, data, checkpoints, device):
            if isinstance(event, PackProgress):
                yield event
            else:
                results.append(event)
        results.sort(key=lambda result: result.index)
        environment = describe(data.checksum, device, _kernel(task, device))
        yield PackFinished(task.pack_id, task.attempt, tuple(results), environment)
    except DDPNOptError as error:
        yield _failed(task, error, retryable=False)
    except Exception as error:
        # The edge of the worker: all that goes wrong becomes an event. Another attempt may find more memory,
        # or a disk that is no longer full.
        yield _failed(task, error, retryable=True)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring runs [start, stop) of a task."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def halves(self) -> list[_Piece]:
        middle = (self.start + self.stop) // 2
        return [_Piece(self.start, middle), _Piece(middle, self.stop)]


def _in_parts(
    task: PackTask, data: Dataset, checkpoints: Checkpoints | None, device: str
) -> Iterator[PackProgress | RunResult]:
    """Train the whole pack at once if memory suffices, else in halves, or halves of these, one after another.

    A run's numbers do not depend on the pack that it is in, so nobody can tell afterwards.

    Yields:
        Progress of the whole, and each run's result.

    Raises:
        Exception: what says that memory ran out, if a single run is too large.
    """
    waiting, lost = [_Piece(0, len(task.runs))], 0
    while waiting:
        piece = waiting.pop(0)
        try:
            for event in train(task.runs[piece.start : piece.stop], data, device, checkpoints=checkpoints):
                if isinstance(event, Progress):
                    yield _overall(task, piece, event, lost)
                    continue
                lost += sum(result.state != "completed" for result in event.results)
                yield from (replace(r, index=piece.start + r.index) for r in event.results)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error) or len(piece) == 1:
                raise
            log.warning("pack %d: %d runs at once are too many: %s", task.pack_id, len(piece), error)
            halves = piece.halves()
            largest = len(halves[1])
            waiting = halves + [
                part for one in waiting for part in (one.halves() if len(one) > largest else [one])
            ]
        else:
            continue
        # Out of the handler, whose traceback keeps the pack's tensors.
        _let_go()


def _overall(task: PackTask, piece: _Piece, event: Progress, lost: int) -> PackProgress:
    """Return the progress of the whole pack, whose earlier pieces are done and have lost some members."""
    total = len(task.runs)
    step = (piece.start * event.steps + len(piece) * event.step) // total
    active = event.active + total - len(piece) - lost
    return PackProgress(task.pack_id, task.attempt, step, event.steps, active)


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failed(task: PackTask, error: Exception, *, retryable: bool) -> PackFailed:
    lines = str(error).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    return PackFailed(task.pack_id, task.attempt, reason[:500], traceback.format_exc()[-8000:], retryable)


def _kernel(task: PackTask, device: str) -> str:
    """Return what small nets train with here: with the other versions, it decides a run's bits."""
    found = library(task.runs[0].dtype) if device == "cpu" else None
    return found.name if found else "torch"


def describe(data_checksum: str, device: str = "cpu", kernel: str = "torch") -> Environment:
    """Describe this process's device and libraries."""
    versions = {
        "numerics": str(NUMERICS_VERSION),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
        "kernel": kernel,
    }
    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)
    return Environment(name, versions, data_checksum)


def cpu_name() -> str:
    """Return the CPU's model name, or the machine's architecture where the name is not told."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
