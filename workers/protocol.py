"""The contract between the dispatcher and whatever trains packs. No torch, no Ray, no SQL.

A dispatcher hands a `PackTask` to an `Executor` and polls for `PackEvent`s. Each event bears the pack and
the attempt that it speaks for, so that the dispatcher can write it under that attempt's token and nothing
else. An executor never retries: a retry is a new attempt, and only the database may start one.

An attempt's events are `PackStarted`, any number of `PackProgress`, and one that ends it: `PackFinished`,
`PackFailed` or `PackStopped`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from ddpnopt.config import RunConfig
from ddpnopt.results import RunResult

DeviceKind = Literal["cpu", "gpu"]

DECISIVE: Final = ("numerics", "torch", "kernel", "pack")
"""The versions that a run's bits depend on."""

LOG_BYTES: Final = 64 * 1024
"""Most that is kept of what an attempt wrote: its end."""


@dataclass(frozen=True, slots=True, order=True)
class Pool:
    """Devices that are alike, on which a sweep's packs stay so that both runs of a pair see the same kind.

    Attributes:
        kind: of device.
        model: its name: a node's label, such as `H100`; `cpu` or `gpu` where the node has none.
        team: the only team that may use it; None for all.
    """

    kind: DeviceKind = "cpu"
    model: str = "cpu"
    team: str | None = None

    def key(self) -> str:
        """Return the pool as one text; `of_key` reads it back."""
        return f"{self.kind}/{self.model}/{self.team or ''}"

    @classmethod
    def of_key(cls, key: str) -> Pool:
        """Read what `key` wrote: none of the parts has a slash."""
        kind, model, team = key.split("/")
        return cls("gpu" if kind == "gpu" else "cpu", model, team or None)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: of the cluster's own.
        name: what a person knows it by, its address.
        pool: of its devices. A node with GPUs offers these, and its CPUs only to feed them.
        devices: how many of them it offers to packs; 0 for a head that only coordinates.
    """

    id: str
    name: str
    pool: Pool
    devices: float


@dataclass(frozen=True, slots=True)
class PackTask:
    """One attempt at a pack.

    Attributes:
        pack_id: the pack.
        attempt: the fencing token.
        runs: what to train together; a result's `index` is a place in it.
        pool: where to train; None leaves it to the executor.
        share: of a device that the pack needs: 1, or a fraction of a GPU.
        name: that people know the pack by: its sweep and its position in it.
        known: for each run the `Environment.key`s under which equal results are recorded; empty if there are
            none at all. A worker whose own key is among them does not train the run again.
    """

    pack_id: int
    attempt: int
    runs: tuple[RunConfig, ...]
    pool: Pool | None = None
    share: float = 1.0
    known: tuple[tuple[str, ...], ...] = ()
    name: str = ""

    def __str__(self) -> str:
        return f"pack {self.name or self.pack_id}, attempt {self.attempt}"


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
        versions: of the numerics and of the libraries under them; on a GPU also of the pack, since a run's
            bits depend there on who shares it.
        data_checksum: SHA-256 of the dataset.
    """

    device: str
    versions: dict[str, str]
    data_checksum: str

    def key(self) -> str:
        """Name what decides a run's bits besides its configuration: 64 hexadecimal digits.

        Equal configurations with equal keys have equal results. Versions that no number depends on, such as
        Python's, are left out.
        """
        versions = {name: self.versions.get(name) for name in DECISIVE}
        document = [self.device, versions, self.data_checksum]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PackStarted:
    """The attempt has its device and begins; until then it waited for one.

    Attributes:
        node: the name of the machine.
        device: the kind of device, as in `Environment`.
    """

    pack_id: int
    attempt: int
    node: str
    device: str


@dataclass(frozen=True, slots=True)
class PackProgress:
    """The attempt has done `step` of `steps` updates; `active` members have not diverged.

    Attributes:
        runs: that are trained, those included that have diverged; None if it was not said. The task's others
            have equal results.
        log: what it wrote since its last event; `LOG_BYTES` at the most.
    """

    pack_id: int
    attempt: int
    step: int
    steps: int
    active: int
    runs: int | None = None
    log: str = ""


@dataclass(frozen=True, slots=True)
class PackFinished:
    """The attempt is done.

    Attributes:
        results: one per run of the task that was trained.
        environment: where.
        reused: places of the runs that were not trained, since equal results are recorded.
        log: as in `PackProgress`.
    """

    pack_id: int
    attempt: int
    results: tuple[RunResult, ...]
    environment: Environment
    reused: tuple[int, ...] = ()
    log: str = ""


@dataclass(frozen=True, slots=True)
class PackFailed:
    """The attempt ended without results.

    Attributes:
        reason: one line.
        detail: a traceback or log excerpt; may be empty.
        retryable: whether another attempt can help (a lost worker) or cannot (a bad configuration).
        log: as in `PackProgress`.
    """

    pack_id: int
    attempt: int
    reason: str
    detail: str
    retryable: bool
    log: str = ""


@dataclass(frozen=True, slots=True)
class PackStopped:
    """The attempt ended because it was asked to.

    Attributes:
        kept: whether another attempt can go on from where this one was.
        step: updates done; None if the worker did not say.
        log: as in `PackProgress`.
    """

    pack_id: int
    attempt: int
    kept: bool
    step: int | None = None
    log: str = ""


class CannotJoinError(ConnectionError):
    """A cluster that cannot be joined as things are: asking again does not help, setting it up does."""


class ExecutorLostError(Exception):
    """What trains is gone as a whole, such as a Ray cluster whose head died; no attempt is to blame."""


PackEvent: TypeAlias = PackStarted | PackProgress | PackFinished | PackFailed | PackStopped
LastEvent: TypeAlias = PackFinished | PackFailed | PackStopped


class Executor(Protocol):
    """Trains packs somewhere. Driven by one thread.

    Attributes:
        cluster: a name that executors share if and only if they take devices from each other.
    """

    cluster: str

    def nodes(self) -> Sequence[Node]:
        """Return the machines that are there now."""
        ...

    def backlog(self) -> int:
        """Return how many packs beyond the devices may wait in the executor, for an autoscaler to see."""
        ...

    def submit(self, task: PackTask) -> None:
        """Start an attempt as soon as it can have a device; its events will come from `poll`."""
        ...

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """Return new events, waiting for the first up to `timeout` seconds.

        Raises:
            ExecutorLostError: if no event can be hoped for any more. Not even `close` may work then.
        """
        ...

    def stop(self, pack_id: int, attempt: int) -> None:
        """Ask an attempt to keep its state, if it keeps any, and to end. Returns at once.

        It ends with `PackStopped`, unless it was about to end otherwise. Unknown ones are ignored.
        """
        ...

    def cancel(self, pack_id: int, attempt: int) -> None:
        """Kill an attempt and forget it: no further event of it is returned. Unknown ones are ignored."""
        ...

    def close(self) -> None:
        """Kill all attempts and let go of every resource."""
        ...
