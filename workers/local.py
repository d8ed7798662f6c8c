"""Train packs in this process, one event at a time: for tests and debugging, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workers.protocol import PackEvent, PackProgress, PackTask
from workers.runner import run_pack


class LocalExecutor:
    """Trains one pack at a time inside `poll`, so that a test decides when anything happens."""

    def __init__(self) -> None:
        self._current: tuple[PackTask, Iterator[PackEvent]] | None = None

    def free_slots(self) -> int:
        """See `Executor`."""
        return 0 if self._current else 1

    def submit(self, task: PackTask) -> None:
        """See `Executor`."""
        if self._current is not None:
            raise RuntimeError("a pack is in training; ask free_slots first")
        self._current = (task, run_pack(task))

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """Train up to the next event; `timeout` is not needed."""
        del timeout
        if self._current is None:
            return []
        event = next(self._current[1])
        if not isinstance(event, PackProgress):
            self._current = None
        return [event]

    def cancel(self, pack_id: int, attempt: int) -> None:
        """See `Executor`."""
        if self._current and (self._current[0].pack_id, self._current[0].attempt) == (pack_id, attempt):
            self._current = None

    def close(self) -> None:
        """See `Executor`."""
        self._current = None
