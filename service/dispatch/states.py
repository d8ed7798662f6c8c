"""The states of packs and sweeps, and every transition that there is.

A pack moves by an event, each of which is one function of `leases` or of `sweeps.actions`. A sweep has no
transitions of its own: its state follows from what its owners want and from the states of its packs.

    pack:    queued -- claim --> running -- finish --> completed
             running -- give_up --> failed,  running -- give_back --> queued (cancelled, if that is wanted)
             queued -- cancel --> cancelled,  failed, cancelled -- retry --> queued
"""

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
    CANCELLED = "cancelled"


class PackEvent(StrEnum):
    """What moves a pack.

    `GIVE_BACK` is every end of an attempt that another one may follow: a lost worker or dispatcher, a lease
    that ran out, a stop that was asked for.
    """

    CLAIM = "claim"
    FINISH = "finish"
    GIVE_UP = "give_up"
    GIVE_BACK = "give_back"
    CANCEL = "cancel"
    RETRY = "retry"


class Wanted(StrEnum):
    """What a sweep's owners want of it."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class SweepState(StrEnum):
    """Of a sweep: queued until its first pack is claimed; over when no pack can move by itself any more."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMPLETED = "completed"
    FAILED = "failed"


class Action(StrEnum):
    """What may be asked of a sweep."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"


PACKS_OVER: Final = frozenset({PackState.COMPLETED, PackState.FAILED, PackState.CANCELLED})
SWEEPS_OVER: Final = frozenset({SweepState.COMPLETED, SweepState.FAILED, SweepState.CANCELLED})

_Q, _R = PackState.QUEUED, PackState.RUNNING
PACK_TRANSITIONS: Final[Mapping[tuple[PackState, PackEvent], PackState]] = {
    (_Q, PackEvent.CLAIM): _R,
    (_R, PackEvent.FINISH): PackState.COMPLETED,
    (_R, PackEvent.GIVE_UP): PackState.FAILED,
    (_R, PackEvent.GIVE_BACK): _Q,
    (_Q, PackEvent.CANCEL): PackState.CANCELLED,
    (PackState.FAILED, PackEvent.RETRY): _Q,
    (PackState.CANCELLED, PackEvent.RETRY): _Q,
}
"""Whatever is not here changes nothing. The writes themselves are SQL; tests hold each of them to it."""

_ALIVE: Final = (SweepState.QUEUED, SweepState.RUNNING, SweepState.PAUSING, SweepState.PAUSED)
_ACTIONS: Final[Mapping[Action, Mapping[SweepState, Wanted]]] = {
    Action.CANCEL: {
        state: Wanted.CANCEL for state in SweepState if state not in (SweepState.COMPLETED, SweepState.FAILED)
    },
    Action.PAUSE: dict.fromkeys(
        (SweepState.QUEUED, SweepState.RUNNING, SweepState.PAUSING, SweepState.PAUSED), Wanted.PAUSE
    ),
    Action.RESUME: dict.fromkeys(
        (SweepState.QUEUED, SweepState.RUNNING, SweepState.PAUSING, SweepState.PAUSED), Wanted.RUN
    ),
    # A paused sweep stays so: its failed packs are queued again, and wait with the others.
    Action.RETRY: {
        state: Wanted.PAUSE if state in (SweepState.PAUSING, SweepState.PAUSED) else Wanted.RUN
        for state in SweepState
    },
}


def wanted_after(action: Action, state: SweepState) -> Wanted | None:
    """Return what is wanted of a sweep after an action; None where the action is not possible.

    Doing an action twice is the same as doing it once.
    """
    return _ACTIONS[action].get(state)


def possible_actions(state: SweepState, *, failed_packs: int = 0) -> tuple[Action, ...]:
    """Return the actions that would change a sweep: what a page shows as buttons."""
    found = []
    if state in (SweepState.QUEUED, SweepState.RUNNING):
        found.append(Action.PAUSE)
    if state in (SweepState.PAUSING, SweepState.PAUSED):
        found.append(Action.RESUME)
    if state not in SWEEPS_OVER and state != SweepState.CANCELLING:
        found.append(Action.CANCEL)
    if failed_packs or state in (SweepState.CANCELLED, SweepState.CANCELLING):
        found.append(Action.RETRY)
    return tuple(found)


def sweep_state(wanted: Wanted, packs: Mapping[PackState, int], *, started: bool) -> SweepState:
    """Derive a sweep's state.

    Args:
        wanted: what its owners want.
        packs: number of its packs in each state.
        started: whether one of them was ever claimed.
    """
    if sum(packs.get(state, 0) for state in PACKS_OVER) == sum(packs.values()):
        if packs.get(PackState.CANCELLED, 0):
            return SweepState.CANCELLED
        return SweepState.FAILED if packs.get(PackState.FAILED, 0) else SweepState.COMPLETED
    if wanted == Wanted.CANCEL:
        return SweepState.CANCELLING
    if wanted == Wanted.PAUSE:
        return SweepState.PAUSING if packs.get(PackState.RUNNING, 0) else SweepState.PAUSED
    return SweepState.RUNNING if started else SweepState.QUEUED
