"""The states of packs and sweeps. Packs move only by the writes in `leases`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class PackState(StrEnum):
    """Of a pack."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class SweepState(StrEnum):
    """Of a sweep: queued until its first pack is claimed; over when no pack can move any more."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


OVER: Final = frozenset({PackState.COMPLETED, PackState.FAILED})


def sweep_state(packs: Mapping[PackState, int], *, started: bool) -> SweepState:
    """Derive a sweep's state from the number of its packs in each state."""
    total = sum(packs.values())
    if sum(packs.get(state, 0) for state in OVER) == total:
        return SweepState.FAILED if packs.get(PackState.FAILED, 0) else SweepState.COMPLETED
    return SweepState.RUNNING if started else SweepState.QUEUED
