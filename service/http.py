"""What all endpoints share: transactions, the body of a request, problem documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from service.config import MAX_BODY_BYTES
from service.db import engine as db
from service.errors import FieldError, InvalidInputError, ServiceError, TooLargeError, UnavailableError
from service.sweeps import documents
from service.sweeps.documents import shown
from service.sweeps.spec import SweepSpec

log = logging.getLogger(__name__)

PROBLEM: Final = "application/problem+json"
YAML_TYPES: Final = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"})


class Problem(BaseModel):
    """A problem document (RFC 9457); `errors` names the fields of invalid input."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = None


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of an endpoint for its OpenAPI description."""
    content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _reading(request: Request) -> Iterator[Connection]:
    with db.read(request.app.state.engine) as connection:
        yield connection


def _writing(request: Request) -> Iterator[Connection]:
    with db.write(request.app.state.engine) as connection:
        yield connection


# scope="function": the transaction ends before the response goes out, so that a 201 means committed.
Reading = Annotated[Connection, Depends(_reading, scope="function")]
Writing = Annotated[Connection, Depends(_writing, scope="function")]


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body as it came.

    Attributes:
        content_type: media type without parameters, in lower case.
    """

    content: bytes
    content_type: str

    def spec(self) -> SweepSpec:
        """Read the body as a spec.

        Raises:
            InvalidInputError: if it is not one.
        """
        if self.content_type == "application/json":
            return documents.parse_spec(documents.parse_json(self.content))
        if self.content_type in YAML_TYPES:
            return documents.parse_spec(documents.parse_yaml(self.content))
        allowed = "application/json or application/yaml"
        raise InvalidInputError([FieldError("Content-Type", shown(self.content_type), allowed)])


async def _body(request: Request) -> Body:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise TooLargeError(f"a spec may have {MAX_BODY_BYTES} bytes at most")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return Body(bytes(content), content_type)


RequestBody = Annotated[Body, Depends(_body)]


def install_handlers(app: FastAPI) -> None:
    """Turn every error into a problem document (RFC 9457)."""
    handlers = {
        ServiceError: _service_error,
        RequestValidationError: _parameter_error,
        HTTPException: _http_error,
        DBAPIError: _database_error,
        PoolTimeout: _database_error,
        Exception: _unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _answer(problem: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(problem, problem["status"], media_type=PROBLEM, headers=headers)


def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return _answer(error.problem(), {"Retry-After": "2"} if error.status == 503 else None)


def _parameter_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        FieldError(
            ".".join(str(step) for step in item["loc"][1:]) or str(item["loc"][0]),
            shown(item.get("input")),
            item["msg"].removeprefix("Input should be "),
        )
        for item in error.errors()
    ]
    return _answer(InvalidInputError(errors).problem())


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    problem = {"type": "about:blank", "title": error.detail, "status": error.status_code}
    problem["detail"] = f"{request.method} {request.url.path}: {error.detail}"
    return _answer(problem, dict(error.headers or {}))


def _database_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, DBAPIError) and not db.is_transient(error):
        return _unforeseen(request, error)
    log.warning("%s %s: the database cannot be reached: %s", request.method, request.url.path, error)
    return _service_error(request, UnavailableError("the database cannot be reached now; try again"))


def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return _answer(ServiceError("an error inside the service; its log tells more").problem())
