"""REST of sweeps."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from service.auth.roles import DEFAULT_TEAM, Caller, check_priority
from service.config import Settings
from service.dispatch.states import Action, PackState
from service.errors import FieldError, InvalidInputError
from service.http import Reading, RequestBody, Writing, problems
from service.sweeps import actions, packs, queries
from service.sweeps.documents import shown
from service.sweeps.expand import Plan, plan
from service.sweeps.schemas import Log, Pack, PackPage, Sweep, SweepPage, Validated
from service.sweeps.spec import SweepSpec
from workers.protocol import LOG_BYTES

router = APIRouter(prefix="/api/v1/sweeps", tags=["sweeps"], responses=problems(422, 503))

MAX_PAGE: Final = 200
MAX_PACKS: Final = 1000
SPEC_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            media: {"schema": {"$ref": "#/components/schemas/SweepSpec"}}
            for media in ("application/json", "application/yaml")
        },
    }
}


def planned_here(spec: SweepSpec, settings: Settings) -> Plan:
    """Plan a spec for the devices that this service is set to.

    Raises:
        InvalidInputError: if a single run is too large for them.
    """
    return plan(spec, settings.device_for(spec.device.kind))


def _planned(body: RequestBody, request: Request) -> tuple[SweepSpec, Plan]:
    spec = body.spec()
    return spec, planned_here(spec, request.app.state.settings)


def _caller(
    team: Annotated[str, Query(max_length=64, description="whose sweep it is")] = DEFAULT_TEAM,
) -> Caller:
    # Without authentication everybody who reaches the server may do everything, for every team.
    return Caller(team)


Asking = Annotated[Caller, Depends(_caller)]
Position = Annotated[int, Path(ge=0, le=2**31 - 1)]

# Stands before the transaction among an endpoint's arguments: checking a large spec must not keep SQLite's
# one writer.
Planned = Annotated[tuple[SweepSpec, Plan], Depends(_planned)]


@router.post("/validate", openapi_extra=SPEC_BODY, responses=problems(413))
def validate_sweep(planned: Planned) -> Validated:
    """Check a spec and say what it comes to; nothing is stored."""
    return Validated.of(*planned)


@router.post(
    "",
    status_code=201,
    openapi_extra=SPEC_BODY,
    responses=problems(404, 409, 413)
    | {200: {"model": Sweep, "description": "The key's sweep, stored before"}},
)
def submit_sweep(
    planned: Planned,
    connection: Writing,
    response: Response,
    caller: Asking,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> Sweep:
    """Store a sweep for training. The same Idempotency-Key with the same spec gives the same sweep again."""
    if idempotency_key is not None and not idempotency_key.isprintable():
        raise InvalidInputError(
            [FieldError("Idempotency-Key", shown(idempotency_key), "printable characters only")]
        )
    check_priority(planned[0].priority, caller.role)
    sweep_id, created = queries.create(connection, *planned, idempotency_key, caller.team)
    response.headers["Location"] = f"/api/v1/sweeps/{sweep_id}"
    if not created:
        response.status_code = 200
    return Sweep.of(queries.get(connection, sweep_id))


@router.get("")
def list_sweeps(
    connection: Reading,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Query(max_length=16)] = None,
) -> SweepPage:
    """List sweeps, newest first; `after` is the `next` of the page before."""
    place = None
    if after is not None:
        last = queries.get(connection, after)
        place = (last.created_at, last.id)
    rows = queries.newest(connection, limit + 1, place)
    page = [Sweep.of(row) for row in rows[:limit]]
    return SweepPage(sweeps=page, next=page[-1].id if len(rows) > limit else None)


@router.get("/spec.schema.json", include_in_schema=False)
def spec_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec."""
    return SweepSpec.model_json_schema()


@router.get("/{sweep_id}", responses=problems(404))
def get_sweep(sweep_id: str, connection: Reading) -> Sweep:
    """Return one sweep with its progress."""
    return Sweep.of(queries.get(connection, sweep_id))


@router.post("/{sweep_id}/{action}", responses=problems(404, 409))
def act_on_sweep(sweep_id: str, action: Action, connection: Writing) -> Sweep:
    """Cancel, pause, resume or retry a sweep; twice is the same as once.

    A running pack that is paused or cancelled keeps its state and stops within seconds; `retry` queues the
    packs again that have failed or were cancelled.
    """
    actions.act(connection, sweep_id, action)
    return Sweep.of(queries.get(connection, sweep_id))


@router.get("/{sweep_id}/packs", responses=problems(404))
def list_packs(
    sweep_id: str,
    connection: Reading,
    limit: Annotated[int, Query(ge=1, le=MAX_PACKS)] = 200,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1,
    state: PackState | None = None,
) -> PackPage:
    """List a sweep's packs by position, each with its last attempts.

    `after` is the `next` of the page before.
    """
    rows = packs.page(connection, sweep_id, after, limit + 1, state)
    page = [Pack.of(row) for row in rows[:limit]]
    return PackPage(packs=page, next=page[-1].pack if len(rows) > limit else None)


@router.get("/{sweep_id}/packs/{pack}/log", responses=problems(404))
def get_log(
    sweep_id: str,
    pack: Position,
    connection: Reading,
    attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="the last one if not given")] = None,
    limit: Annotated[int, Query(ge=1, le=LOG_BYTES, description="characters, from the end")] = LOG_BYTES,
) -> Log:
    """Return the end of what an attempt at a pack wrote."""
    found, text = packs.log_of(connection, sweep_id, pack, attempt)
    return Log(attempt=found, log=text[-limit:])
