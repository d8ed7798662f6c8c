"""REST of sweeps."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from service.errors import FieldError, InvalidInputError
from service.http import Reading, RequestBody, Writing, problems
from service.sweeps import queries
from service.sweeps.documents import shown
from service.sweeps.expand import Plan, plan
from service.sweeps.schemas import Sweep, SweepPage, Validated
from service.sweeps.spec import SweepSpec

router = APIRouter(prefix="/api/v1/sweeps", tags=["sweeps"], responses=problems(422, 503))

MAX_PAGE: Final = 200
SPEC_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            media: {"schema": {"$ref": "#/components/schemas/SweepSpec"}}
            for media in ("application/json", "application/yaml")
        },
    }
}


def _planned(body: RequestBody, request: Request) -> tuple[SweepSpec, Plan]:
    spec = body.spec()
    return spec, plan(spec, request.app.state.device)


# Stands before the transaction among an endpoint's arguments: checking a large spec must not keep SQLite's
# one writer.
Planned = Annotated[tuple[SweepSpec, Plan], Depends(_planned)]


@router.post("/validate", openapi_extra=SPEC_BODY, responses=problems(413))
def validate_sweep(planned: Planned) -> Validated:
    """Check a spec and say what it comes to; nothing is stored."""
    spec, packs = planned
    return Validated(
        runs=packs.runs_total,
        packs=len(packs.packs),
        run_steps=packs.runs_total * spec.training.steps,
        estimated_seconds=round(packs.seconds, 1),
    )


@router.post(
    "",
    status_code=201,
    openapi_extra=SPEC_BODY,
    responses=problems(409, 413) | {200: {"model": Sweep, "description": "The key's sweep, stored before"}},
)
def submit_sweep(
    planned: Planned,
    connection: Writing,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> Sweep:
    """Store a sweep for training. The same Idempotency-Key with the same spec gives the same sweep again."""
    if idempotency_key is not None and not idempotency_key.isprintable():
        raise InvalidInputError(
            [FieldError("Idempotency-Key", shown(idempotency_key), "printable characters only")]
        )
    sweep_id, created = queries.create(connection, *planned, idempotency_key)
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
