"""Decisions, pure: what to do with an attempt that ended without results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ATTEMPTS: Final = 5
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 60.0
LAST_DOUBLING: Final = 10


@dataclass(frozen=True, slots=True)
class Requeue:
    """Try again, `delay` seconds from now."""

    delay: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The pack has failed for good."""


def after_failure(attempt: int, max_attempts: int, *, retryable: bool) -> Requeue | GiveUp:
    """Decide after attempt number `attempt` failed: retry what a retry can help, ever more slowly.

    Attempts that stopped or were given back did not fail: each has raised `max_attempts` by one.
    """
    if not retryable or attempt >= max_attempts:
        return GiveUp()
    failures = max(1, min(LAST_DOUBLING, attempt - (max_attempts - MAX_ATTEMPTS)))
    return Requeue(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (failures - 1)))
