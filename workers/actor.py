"""The Ray actor that trains packs, one at a time, on one device of a node."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from ddpnopt.lanes.library import library
from ddpnopt.pack.checkpoint import Checkpoints
from workers import memory
from workers.output import Output, Silence, StandardStreams, log_to_stderr
from workers.protocol import PackEvent, PackTask, WorkerOptions
from workers.runner import Site, run_pack

log = logging.getLogger(__name__)

CONTROL: Final = "control"
"""The concurrency group of what is answered while a pack trains."""


class PackActor:
    """Trains one pack after another in its own process.

    Args:
        options: how it works.
        device: where it trains.
        share: of a GPU that is its own; its memory is held to it.
        alone: whether it is an actor of Ray's, in a process of its own, where all that is written is its
            packs'. `PackStarted.node` is then the node's id.
    """

    def __init__(
        self,
        options: WorkerOptions | None = None,
        device: str = "cpu",
        share: float = 1.0,
        *,
        alone: bool = False,
    ) -> None:
        self._options = options = options or WorkerOptions()
        self._device, self._node = device, ""
        self._output: Output = Silence()
        self._raylet: int | None = None
        self._to_stop: tuple[int, int] | None = None
        if alone:
            log_to_stderr()
            self._output = StandardStreams()
            self._node = _node_id()
            self._raylet = os.getppid()
        torch.set_num_threads(options.threads)
        self._checkpoints: Checkpoints | None = None
        if options.checkpoints is not None:
            self._checkpoints = Checkpoints(Path(options.checkpoints), options.checkpoint_every)
            if removed := self._checkpoints.sweep():
                log.info("%d old checkpoints removed", removed)
        if device == "cpu":
            library("float32")  # compiled now, if it has to be, and not when the first pack is there
            if options.memory is not None:
                memory.limit(options.memory)
        elif share < 1 and torch.cuda.is_available():  # if not, its packs say so
            torch.cuda.set_per_process_memory_fraction(share)

    def ping(self) -> None:
        """Answer."""

    def stop(self, pack_id: int, attempt: int) -> None:
        """Let an attempt end soon; `train` may be at it in another thread, or about to begin."""
        self._to_stop = (pack_id, attempt)

    def train(self, task: PackTask) -> Iterator[PackEvent]:
        """Stream the events of one attempt."""
        # Again, since this may be another thread than the constructor's.
        torch.set_num_threads(self._options.threads)
        self._output.take()  # what was written between two packs is neither's

        def stopping() -> bool:
            self._exit_if_forsaken()
            self._output.trim()
            return self._to_stop == (task.pack_id, task.attempt)

        site = Site(self._node, self._device, stopping, self._output.take)
        yield from run_pack(task, self._checkpoints, site)

    def _exit_if_forsaken(self) -> None:
        """End this process if its node is no longer one of the cluster's.

        It would go on to the end of its pack, on a device that another may believe to be free, and remove the
        state from which the next attempt is to go on.
        """
        if self._raylet is not None and os.getppid() != self._raylet:
            os._exit(1)


def _node_id() -> str:
    import ray  # only here: without Ray, everything else in this file works as well

    node: str = ray.get_runtime_context().get_node_id()
    return node
