"""The Ray actor that trains packs, one at a time, on one slot of a node."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workers.protocol import PackEvent, PackTask
from workers.runner import run_pack


class PackActor:
    """Trains one pack after another in its own process.

    Args:
        threads: CPU threads of the tensor library. One by default: small nets gain more from a second
            pack on the second core than from a second thread.
    """

    def __init__(self, threads: int = 1) -> None:
        torch.set_num_threads(threads)

    def ping(self) -> None:
        """Answer."""

    def train(self, task: PackTask) -> Iterator[PackEvent]:
        """Stream the events of one attempt."""
        yield from run_pack(task)
