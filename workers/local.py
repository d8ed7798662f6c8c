"""Train packs in this process, one event at a time: for tests and debugging, without Ray."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddpnopt.pack.checkpoint import Checkpoints
from workers.output import LoggedOnly
from workers.protocol import LastEvent, Node, PackEvent, PackTask, Pool, WorkerOptions
from workers.runner import Site, run_pack

NAME: Final = "here"


@dataclass(slots=True)
class _Attempt:
    task: PackTask
    stopping: bool = False
    events: Iterator[PackEvent] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[int, int]:
        return self.task.pack_id, self.task.attempt


class LocalExecutor:
    """Trains one pack after another inside `poll`, so that a test decides when anything happens.

    Args:
        options: of the worker; only where and when states are kept is heeded.
    """

    def __init__(self, options: WorkerOptions | None = None) -> None:
        self.cluster = f"local-{secrets.token_hex(8)}"
        self._checkpoints: Checkpoints | None = None
        if options is not None and options.checkpoints is not None:
            self._checkpoints = Checkpoints(Path(options.checkpoints), options.checkpoint_every)
        self._attempts: deque[_Attempt] = deque()
        self._output = LoggedOnly()

    def nodes(self) -> Sequence[Node]:
        """See `Executor`."""
        return (Node(self.cluster, NAME, Pool(), 1.0),)

    def backlog(self) -> int:
        """See `Executor`."""
        return 0

    def submit(self, task: PackTask) -> None:
        """See `Executor`."""
        self._attempts.append(_Attempt(task))

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """Train up to the next event; `timeout` is not needed."""
        del timeout
        if not self._attempts:
            return []
        attempt = self._attempts[0]
        if attempt.events is None:
            site = Site(NAME, stopping=lambda: attempt.stopping, written=self._output.take)
            attempt.events = run_pack(attempt.task, self._checkpoints, site)
        with self._output:
            event = next(attempt.events)
        if isinstance(event, LastEvent):
            self._attempts.popleft()
        return [event]

    def stop(self, pack_id: int, attempt: int) -> None:
        """See `Executor`."""
        for found in self._attempts:
            if found.key == (pack_id, attempt):
                found.stopping = True

    def cancel(self, pack_id: int, attempt: int) -> None:
        """See `Executor`."""
        self._attempts = deque(found for found in self._attempts if found.key != (pack_id, attempt))

    def close(self) -> None:
        """See `Executor`."""
        self._attempts.clear()
