"""Decisions, pure: what to do with an attempt that ended without results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ATTEMPTS: Final = 5
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Requeue:
    """Try again, `delay` seconds from now."""

    delay: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The pack has failed for good."""


def after_failure(attempt: int, max_attempts: int, *, retryable: bool) -> Requeue | GiveUp:
    """Decide after attempt number `attempt` failed: retry what a retry can help, ever more slowly."""
    if not retryable or attempt >= max_attempts:
        return GiveUp()
    return Requeue(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (attempt - 1)))
