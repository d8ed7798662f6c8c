"""Roles, and what depends on them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from service.errors import FieldError, InvalidInputError

DEFAULT_TEAM: Final = "default"


class Role(StrEnum):
    """What somebody is in a team."""

    VIEWER = "viewer"
    MEMBER = "member"
    ADMIN = "admin"


MOST_PRIORITY: Final[Mapping[Role, int]] = {Role.VIEWER: 0, Role.MEMBER: 10, Role.ADMIN: 100}
"""The highest priority that a role may give a sweep; everybody may lower it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        team: whose sweeps they see and submit.
        role: in that team.
    """

    team: str = DEFAULT_TEAM
    role: Role = Role.ADMIN


def check_priority(priority: int, role: Role) -> None:
    """Refuse a priority that a role may not give.

    Raises:
        InvalidInputError: if it is too high.
    """
    most = MOST_PRIORITY[role]
    if priority > most:
        raise InvalidInputError([FieldError("priority", str(priority), f"at most {most} for a {role}")])
