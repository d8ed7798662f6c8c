"""Train one pack and speak of it in protocol events. What every executor runs in the end."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ddpnopt import NUMERICS_VERSION
from ddpnopt.datasets.load import Dataset, load
from ddpnopt.errors import DDPNOptError
from ddpnopt.lanes.library import library
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.pack.engine import train
from ddpnopt.results import EngineEvent, Progress, RunResult, Stopped
from workers import memory
from workers.protocol import (
    Environment,
    PackEvent,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    PackStopped,
    PackTask,
)

log = logging.getLogger(__name__)


def never() -> bool:
    """Do not stop."""
    return False


def silence() -> str:
    """Nothing was written."""
    return ""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a pack trains, and who looks after it there.

    Attributes:
        node: what the machine is called.
        device: of torch's.
        stopping: tells whether the attempt is to stop; asked every few seconds.
        written: returns what the attempt has written since it was last asked.
    """

    node: str = ""
    device: str = "cpu"
    stopping: Callable[[], bool] = never
    written: Callable[[], str] = silence


HERE: Final = Site()


def run_pack(
    task: PackTask, checkpoints: Checkpoints | None = None, site: Site = HERE
) -> Iterator[PackEvent]:
    """Train a pack.

    Args:
        task: what to train.
        checkpoints: where its state is kept, to go on from after an interruption.
        site: where to train.

    Yields:
        `PackStarted`, `PackProgress` at every point of the curves, then `PackFinished`, `PackFailed` or
        `PackStopped`. Nothing that goes wrong in training escapes as an exception.
    """
    try:
        yield PackStarted(task.pack_id, task.attempt, site.node, device_name(site.device))
        for event in _trained(task, checkpoints, site):
            yield replace(event, log=site.written())
    except DDPNOptError as error:
        yield _failed(task, error, site, retryable=False)
    except Exception as error:
        # The edge of the worker: all that goes wrong becomes an event. Another attempt may find more memory,
        # or a disk that is no longer full.
        yield _failed(task, error, site, retryable=True)


def _trained(
    task: PackTask, checkpoints: Checkpoints | None, site: Site
) -> Iterator[PackProgress | PackFinished | PackStopped]:
    started = time.monotonic()
    data = load(task.runs[0].dataset)
    environment = describe(data.checksum, site.device, _kernel(task, site.device))
    if site.device != "cpu":
        environment = _of_pack(environment, _composition(task))
    reused = _reused(task, environment, site.device)
    places = [place for place in range(len(task.runs)) if place not in set(reused)]
    _announce(task, environment, len(places))
    results: list[RunResult] = []
    pieces = _Pieces()
    for event in _in_parts(task, places, data, checkpoints, site, pieces):
        if isinstance(event, RunResult):
            results.append(event)
            continue
        if isinstance(event, PackStopped):
            log.info("%s: stopped, its state is %s", task, "kept" if event.kept else "lost")
        yield event
        if isinstance(event, PackStopped):
            return
    results.sort(key=lambda result: result.index)
    log.info("%s: done after %.1f s", task, time.monotonic() - started)
    if pieces.split and site.device != "cpu":
        environment = _of_pack(environment, f"{_composition(task)} in pieces")
    yield PackFinished(task.pack_id, task.attempt, tuple(results), environment, reused)


def _announce(task: PackTask, environment: Environment, trained: int) -> None:
    first, known = task.runs[0], len(task.runs) - trained
    log.info(
        "%s: %d runs on %s for %d steps%s; on %s, with %s",
        *(task, trained, first.dataset, first.training.steps),
        f", {known} more are known already" if known else "",
        *(environment.device, environment.versions["kernel"]),
    )


def _reused(task: PackTask, environment: Environment, device: str) -> tuple[int, ...]:
    """Return the places of the runs that would get here the very bits that are recorded.

    On a GPU a run's bits depend on who shares its pack, so that a part of a pack would be another one.
    """
    key = environment.key()
    same = tuple(place for place, known in enumerate(task.known) if key in known)
    return same if device == "cpu" or len(same) == len(task.runs) else ()


def _composition(task: PackTask) -> str:
    """Name the runs of a pack, in their order."""
    document = json.dumps([run.to_dict() for run in task.runs], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _of_pack(environment: Environment, pack: str) -> Environment:
    return replace(environment, versions=environment.versions | {"pack": pack})


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


@dataclass(slots=True)
class _Pieces:
    """Whether a pack had to be split."""

    split: bool = False


def _in_parts(
    task: PackTask,
    places: Sequence[int],
    data: Dataset,
    checkpoints: Checkpoints | None,
    site: Site,
    pieces: _Pieces,
) -> Iterator[PackProgress | PackStopped | RunResult]:
    """Train these runs at once if memory suffices, else in halves, or halves of these, one after another.

    A run's numbers do not depend on the pack that it is in, so nobody can tell afterwards.

    Yields:
        Progress of the whole, and each run's result; or, last, that the pack was stopped.

    Raises:
        Exception: what says that memory ran out, if a single run is too large.
    """
    waiting, lost = [_Piece(0, len(places))] if places else [], 0
    while waiting:
        piece = waiting.pop(0)
        chosen = places[piece.start : piece.stop]
        try:
            for event in _train(task, chosen, data, checkpoints, site):
                if isinstance(event, Progress):
                    yield _overall(task, len(places), piece, event, lost)
                elif isinstance(event, Stopped):
                    step = _overall_step(len(places), piece, event.step, task.runs[0].training.steps)
                    yield PackStopped(task.pack_id, task.attempt, event.kept, step)
                    return
                else:
                    lost += sum(result.state != "completed" for result in event.results)
                    yield from (replace(result, index=chosen[result.index]) for result in event.results)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error) or len(piece) == 1:
                raise
            log.warning("%s: %d runs at once are too many, it is split: %s", task, len(piece), error)
            pieces.split = True
            halves = piece.halves()
            largest = len(halves[1])
            waiting = halves + [
                part for one in waiting for part in (one.halves() if len(one) > largest else [one])
            ]
        else:
            continue
        # Out of the handler, whose traceback keeps the pack's tensors.
        _let_go()


def _own(checkpoints: Checkpoints | None, task: PackTask) -> Checkpoints | None:
    """Return the folder in which a pack's states are its own: an equal pack that ends removes others."""
    return None if checkpoints is None else replace(checkpoints, owner=f"{task.pack_id}-")


def _train(
    task: PackTask, places: Sequence[int], data: Dataset, checkpoints: Checkpoints | None, site: Site
) -> Iterator[EngineEvent]:
    runs = [task.runs[place] for place in places]
    return train(runs, data, site.device, checkpoints=_own(checkpoints, task), stopping=site.stopping)


def _overall(task: PackTask, total: int, piece: _Piece, event: Progress, lost: int) -> PackProgress:
    """Return the progress of all that is trained, whose earlier pieces are done and have lost members."""
    step = _overall_step(total, piece, event.step, event.steps)
    active = event.active + total - len(piece) - lost
    return PackProgress(task.pack_id, task.attempt, step, event.steps, active, total)


def _overall_step(total: int, piece: _Piece, step: int, steps: int) -> int:
    return (piece.start * steps + len(piece) * step) // total


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failed(task: PackTask, error: Exception, site: Site, *, retryable: bool) -> PackFailed:
    lines = str(error).splitlines() or [""]
    reason, detail = f"{type(error).__name__}: {lines[0]}", traceback.format_exc()[-8000:]
    log.error("%s failed: %s", task, reason)
    return PackFailed(task.pack_id, task.attempt, reason[:500], detail, retryable, site.written())


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
    return Environment(device_name(device), versions, data_checksum)


def device_name(device: str) -> str:
    """Return the model of a device of torch's."""
    return cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """Return the CPU's model name, or the machine's architecture where the name is not told."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
