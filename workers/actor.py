"""The Ray actor that trains packs, one at a time, on one slot of a node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from ddpnopt.lanes.library import library
from ddpnopt.pack.checkpoint import Checkpoints
from workers import memory
from workers.protocol import PackEvent, PackTask, WorkerOptions
from workers.runner import run_pack

log = logging.getLogger(__name__)


class PackActor:
    """Trains one pack after another in its own process."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        options = options or WorkerOptions()
        torch.set_num_threads(options.threads)
        self._checkpoints: Checkpoints | None = None
        if options.checkpoints is not None:
            self._checkpoints = Checkpoints(Path(options.checkpoints), options.checkpoint_every)
            if removed := self._checkpoints.sweep():
                log.info("%d old checkpoints removed", removed)
        library("float32")  # compiled now, if it has to be, and not when the first pack is there
        if options.memory is not None:
            memory.limit(options.memory)

    def ping(self) -> None:
        """Answer."""

    def train(self, task: PackTask) -> Iterator[PackEvent]:
        """Stream the events of one attempt."""
        yield from run_pack(task, self._checkpoints)
