"""The contract between the dispatcher and whatever trains packs. No torch, no Ray, no SQL.

A dispatcher hands a `PackTask` to an `Executor` and polls for `PackEvent`s. Each event bears the pack and
the attempt that it speaks for, so that the dispatcher can write it under that attempt's token and nothing
else. An executor never retries: a retry is a new attempt, and only the database may start one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ddpnopt.config import RunConfig
from ddpnopt.results import RunResult


@dataclass(frozen=True, slots=True)
class PackTask:
    """One attempt at a pack.

    Attributes:
        pack_id: the pack.
        attempt: the fencing token.
        runs: what to train together; a result's `index` is a place in it.
    """

    pack_id: int
    attempt: int
    runs: tuple[RunConfig, ...]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works.

    Attributes:
        threads: of the fast path. One by default: a second pack on the second core does as much as a second
            thread, and needs no waiting for each other (docs/performance.md).
        memory: bytes that training may take; None does not limit it.
        checkpoints: folder of the packs' states, which all workers of the cluster see; None keeps none.
        checkpoint_every: seconds of training between two writes there.
    """

    threads: int = 1
    memory: int | None = None
    checkpoints: str | None = None
    checkpoint_every: float = 60.0


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a pack was trained, recorded with its results.

    Attributes:
        device: kind of device, such as the CPU's model name.
        versions: of the numerics and of the libraries under them.
        data_checksum: SHA-256 of the dataset.
    """

    device: str
    versions: dict[str, str]
    data_checksum: str


@dataclass(frozen=True, slots=True)
class PackProgress:
    """The attempt has done `step` of `steps` updates; `active` members have not diverged."""

    pack_id: int
    attempt: int
    step: int
    steps: int
    active: int


@dataclass(frozen=True, slots=True)
class PackFinished:
    """The attempt is done; one result per run of the task."""

    pack_id: int
    attempt: int
    results: tuple[RunResult, ...]
    environment: Environment


@dataclass(frozen=True, slots=True)
class PackFailed:
    """The attempt ended without results.

    Attributes:
        reason: one line.
        detail: a traceback or log excerpt; may be empty.
        retryable: whether another attempt can help (a lost worker) or cannot (a bad configuration).
    """

    pack_id: int
    attempt: int
    reason: str
    detail: str
    retryable: bool


class ExecutorLostError(Exception):
    """What trains is gone as a whole, such as a Ray cluster whose head died; no attempt is to blame."""


PackEvent: TypeAlias = PackProgress | PackFinished | PackFailed


class Executor(Protocol):
    """Trains packs somewhere. Driven by one thread."""

    def free_slots(self) -> int:
        """Return how many more packs could start now."""
        ...

    def submit(self, task: PackTask) -> None:
        """Start an attempt; its events will come from `poll`."""
        ...

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """Return new events, waiting for the first up to `timeout` seconds.

        Raises:
            ExecutorLostError: if no event can be hoped for any more. Not even `close` may work then.
        """
        ...

    def cancel(self, pack_id: int, attempt: int) -> None:
        """Stop an attempt and forget it: no further event of it is returned. Unknown ones are ignored."""
        ...

    def close(self) -> None:
        """Stop all attempts and let go of every resource."""
        ...
