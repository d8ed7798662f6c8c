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
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service.config import MAX_BODY_BYTES
from service.db import engine as db
from service.errors import FieldError, InvalidInputError, ServiceError, TooLargeError, UnavailableError
from service.sweeps import documents
from service.sweeps.documents import shown
from service.sweeps.spec import SweepSpec

log = logging.getLogger(__name__)

PROBLEM: Final = "application/problem+json"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
OWN_SITES: Final = frozenset({"same-origin", "none"})
DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
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


class OwnPagesOnly:
    """Refuses what a page of another site makes a user's browser change here.

    A browser says where a request comes from, in headers that a page's script cannot set. Whoever sends none
    of these is no browser, and no page speaks through it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a 403."""
        acts = scope["type"] == "http" and scope["method"] not in SAFE_METHODS
        if acts and _is_foreign(Headers(scope=scope)):
            detail = f"{scope['method']} {scope['path']}: asked for by a page of another site"
            problem = {"type": "about:blank", "title": "Forbidden", "status": 403, "detail": detail}
            await _answer(problem)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    if any(site not in OWN_SITES for site in headers.getlist("sec-fetch-site")):
        return True
    host = headers.get("host", "").lower()
    return any(not _is_at(origin.lower(), host) for origin in headers.getlist("origin"))


def _is_at(origin: str, host: str) -> bool:
    """Tell whether an origin such as https://a.example is the host that a request names."""
    scheme, _, place = origin.partition("://")
    port = DEFAULT_PORTS.get(scheme)
    # The scheme is not compared: before a proxy it is https, behind it http.
    return port is not None and bool(place) and place.removesuffix(port) == host.removesuffix(port)


def install_handlers(app: FastAPI) -> None:
    """Turn every error into a problem document (RFC 9457), and keep pages of other sites from acting here."""
    app.add_middleware(OwnPagesOnly)
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
