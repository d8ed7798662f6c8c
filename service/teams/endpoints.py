"""REST of teams, and of what the cluster does for them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from service.http import Reading, Writing, problems
from service.teams import queries
from service.teams.queries import TeamRow

router = APIRouter(prefix="/api/v1/teams", tags=["teams"], responses=problems(422, 503))

Name = Annotated[str, Path(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]


class TeamIn(BaseModel):
    """A team's share and quotas."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    weight: Annotated[float, Field(gt=0, le=1e6, description="of its share, against the other teams'")] = 1.0
    max_devices: Annotated[
        float | None, Field(gt=0, le=1e6, description="that it may hold at once; null for no limit")
    ] = None
    max_queued_runs: Annotated[
        int | None, Field(ge=0, le=10**9, description="that may wait at once; null for no limit")
    ] = None


class Team(BaseModel):
    """A team with its quotas, what it has now, and what it used.

    Attributes:
        devices: that its packs hold now.
        packs_queued: that wait.
        device_seconds: of all its attempts that have ended.
        run_steps: that these trained.
    """

    name: str
    weight: float
    max_devices: float | None
    max_queued_runs: int | None
    devices: float
    packs_queued: int
    device_seconds: float
    run_steps: int

    @classmethod
    def of(cls, row: TeamRow) -> Team:
        """Build it from its row."""
        return cls(**{name: getattr(row, name) for name in cls.model_fields})


class Teams(BaseModel):
    """All teams, by name."""

    teams: list[Team]


@router.get("")
def list_teams(connection: Reading) -> Teams:
    """List the teams."""
    return Teams(teams=[Team.of(row) for row in queries.every(connection)])


@router.get("/{name}", responses=problems(404))
def get_team(name: Name, connection: Reading) -> Team:
    """Return one team."""
    return Team.of(queries.get(connection, name))


@router.put("/{name}")
def put_team(name: Name, team: TeamIn, connection: Writing) -> Team:
    """Make a team, or change its share and quotas."""
    row = queries.put(connection, name, team.weight, team.max_devices, team.max_queued_runs)
    return Team.of(row)
