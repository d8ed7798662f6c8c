"""Errors that carry what a client should see. One handler turns them into problem documents (RFC 9457)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong in what a user sent.

    Attributes:
        field: path into the document, such as `grids[0].learning_rate[2]`.
        value: what was given, shortened.
        allowed: what is allowed, in words.
    """

    field: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.field}: got {self.value}; allowed: {self.allowed}"


class ServiceError(Exception):
    """Base of the errors that a user may see.

    Attributes:
        status: the HTTP status.
        title: a short name of the kind of problem.
    """

    status = 500
    title = "Internal error"

    def problem(self) -> dict[str, Any]:
        """Return the problem document's members."""
        return {"type": "about:blank", "title": self.title, "status": self.status, "detail": str(self)}


class InvalidInputError(ServiceError):
    """What was sent is not allowed.

    Attributes:
        errors: every single thing that is wrong.
    """

    status = 422
    title = "Invalid input"

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)

    def problem(self) -> dict[str, Any]:
        """Add the list of errors."""
        return super().problem() | {"errors": [asdict(error) for error in self.errors]}


class NotFoundError(ServiceError):
    """There is no such thing, or it is not the caller's."""

    status = 404
    title = "Not found"


class ConflictError(ServiceError):
    """The request does not fit the present state."""

    status = 409
    title = "Conflict"


class TooLargeError(ServiceError):
    """The body is larger than the service reads."""

    status = 413
    title = "Body too large"


class UnavailableError(ServiceError):
    """The database cannot be reached now; asking again later may help."""

    status = 503
    title = "Unavailable"


class SetupError(ServiceError):
    """The service cannot start as it is configured; the message is one line for the operator."""

    title = "Cannot start"
