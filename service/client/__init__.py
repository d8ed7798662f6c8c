"""A client of the REST API.

DDPSweepClientError
├── CannotConnect     no server answers at the URL
└── Refused           the server answered with a problem document
    └── InvalidInput  422: what was sent is not allowed
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Self

import httpx
import numpy as np

from service.results.statistics import Heatmap, Summary

TRIES: Final = 3
OVER: Final = frozenset({"completed", "failed", "cancelled"})
PACK_PAGE: Final = 200


class DDPSweepClientError(Exception):
    """Base of what the client raises."""


class CannotConnect(DDPSweepClientError):  # noqa: N818 - reads better in an except clause
    """No server answers at the URL."""


class Refused(DDPSweepClientError):  # noqa: N818
    """The server answered with a problem document.

    Attributes:
        problem: the document (RFC 9457).
    """

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or "refused")
        self.problem = problem


class InvalidInput(Refused):
    """What was sent is not allowed."""


class Client:
    """Speaks to one server.

    Args:
        url: of the server, such as http://127.0.0.1:8321.
        transport: replaces the network, so that tests reach an application in this process.
    """

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            transport=transport,
            timeout=60.0,
            headers={"Accept": "application/json"},
            # A proxy of the environment does not reach this machine's own loopback.
            trust_env=not _is_loopback(self.url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def validate(self, spec: bytes, content_type: str = "application/yaml") -> dict[str, Any]:
        """Check a spec and return what it comes to."""
        return self._post("/api/v1/sweeps/validate", spec, {"Content-Type": content_type})

    def submit(
        self,
        spec: bytes,
        content_type: str = "application/yaml",
        team: str | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Submit a spec once, even if an answer gets lost and the request is repeated; return the sweep.

        Args:
            spec: the document.
            content_type: what it is written in.
            team: whose sweep it is; the server's default team if not given.
            idempotency_key: the same one with the same spec gives the same sweep, whenever it was submitted;
                one of this call's own if not given.
        """
        headers = {"Content-Type": content_type, "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._post("/api/v1/sweeps", spec, headers, team=team)

    def sweeps(self, limit: int = 50) -> list[dict[str, Any]]:
        """List the newest sweeps."""
        answer: list[dict[str, Any]] = self._get("/api/v1/sweeps", limit=limit)["sweeps"]
        return answer

    def sweep(self, sweep_id: str) -> dict[str, Any]:
        """Return one sweep."""
        return self._get(_path(sweep_id))

    def cancel(self, sweep_id: str) -> dict[str, Any]:
        """Cancel a sweep: what waits never runs, what runs stops within seconds; return the sweep."""
        return self._act(sweep_id, "cancel")

    def pause(self, sweep_id: str) -> dict[str, Any]:
        """Pause a sweep: its running packs keep their state and stop within seconds; return the sweep."""
        return self._act(sweep_id, "pause")

    def resume(self, sweep_id: str) -> dict[str, Any]:
        """Let a paused sweep go on; return it."""
        return self._act(sweep_id, "resume")

    def retry(self, sweep_id: str) -> dict[str, Any]:
        """Queue a sweep's failed and cancelled packs again; return the sweep."""
        return self._act(sweep_id, "retry")

    def heatmap_json(self, sweep_id: str, **query: Any) -> dict[str, Any]:
        """Return a panel as the API answers it; query: metric, baseline, grid."""
        return self._get(f"{_path(sweep_id)}/heatmap", **query)

    def heatmap(self, sweep_id: str, **query: Any) -> Heatmap:
        """Return a panel."""
        return Heatmap.from_json(self.heatmap_json(sweep_id, **query))

    def summary_json(self, sweep_id: str, **query: Any) -> dict[str, Any]:
        """Return a summary of a sweep's runs as the API answers it; query: metric, baseline, grid."""
        return self._get(f"{_path(sweep_id)}/summary", **query)

    def summary(self, sweep_id: str, **query: Any) -> Summary:
        """Return a summary of a sweep's runs, of all grids if none is named."""
        return Summary.from_json(self.summary_json(sweep_id, **query))

    def runs(self, sweep_id: str) -> Iterator[dict[str, Any]]:
        """Yield every run of a sweep, page by page."""
        after: int | None = 0
        while after is not None:
            page = self._get(f"{_path(sweep_id)}/runs", after=after, limit=1000)
            yield from page["runs"]
            after = page["next"]

    def curves(self, sweep_id: str, **query: Any) -> list[dict[str, Any]]:
        """Return the curves of a grid's runs that have ended; query: metric, baseline, grid.

        Each has `steps` and `values`, in which a number that is not finite is None.
        """
        answer: list[dict[str, Any]] = self._get(f"{_path(sweep_id)}/curves", **query)["curves"]
        return answer

    def records(self, sweep_id: str, probe: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield what a probe recorded in every run of a grid, page by page; query: baseline, grid.

        Each has `steps` (P,) and, shaped as the probe's `shape` says, `values` (P, *shape): a numpy array in
        which a number that was not finite is NaN.
        """
        after: int | None = 0
        while after is not None:
            page = self._get(f"{_path(sweep_id)}/records", probe=probe, after=after, limit=1000, **query)
            for record in page["records"]:
                values = np.array(record["values"], dtype=np.float64)  # None becomes NaN
                yield record | {"values": values.reshape(len(record["steps"]), *page["shape"])}
            after = page["next"]

    def packs(self, sweep_id: str, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield a sweep's packs with their attempts, page by page; those in one state if it is named."""
        after: int | None = -1
        while after is not None:
            page = self._get(f"{_path(sweep_id)}/packs", after=after, limit=PACK_PAGE, state=state)
            yield from page["packs"]
            after = page["next"]

    def pack(self, sweep_id: str, position: int) -> dict[str, Any] | None:
        """Return a sweep's pack by its position; None if there is none."""
        page = self._get(f"{_path(sweep_id)}/packs", after=position - 1, limit=1)["packs"]
        return next((pack for pack in page if pack["pack"] == position), None)

    def log(
        self, sweep_id: str, pack: int, attempt: int | None = None, limit: int | None = None
    ) -> dict[str, Any]:
        """Return the end of what an attempt at a pack wrote: `attempt` and `log`.

        Args:
            sweep_id: the sweep.
            pack: the pack's position in it.
            attempt: which one; the last if not given.
            limit: most characters; all that is kept if not given.
        """
        return self._get(f"{_path(sweep_id)}/packs/{pack}/log", attempt=attempt, limit=limit)

    def teams(self) -> list[dict[str, Any]]:
        """List the teams."""
        answer: list[dict[str, Any]] = self._get("/api/v1/teams")["teams"]
        return answer

    def team(self, name: str) -> dict[str, Any]:
        """Return one team."""
        return self._get(_team_path(name))

    def put_team(
        self,
        name: str,
        weight: float = 1.0,
        max_devices: float | None = None,
        max_queued_runs: int | None = None,
    ) -> dict[str, Any]:
        """Make a team, or set an existing one's share and quotas, all of them; None sets no limit."""
        team = {"weight": weight, "max_devices": max_devices, "max_queued_runs": max_queued_runs}
        return self._send(self._http.build_request("PUT", _team_path(name), json=team))

    def cluster(self) -> dict[str, Any]:
        """Return what there is to train on, what runs there and for whom."""
        return self._get("/api/v1/cluster")

    def watch(self, sweep_id: str, period: float = 0.5) -> Iterator[dict[str, Any]]:
        """Yield the sweep again and again until it is over; a paused one may still go on."""
        while True:
            sweep = self.sweep(sweep_id)
            yield sweep
            if sweep["state"] in OVER:
                return
            time.sleep(period)

    def ready(self) -> bool:
        """Tell whether the server and its database answer."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _act(self, sweep_id: str, action: str) -> dict[str, Any]:
        return self._post(f"{_path(sweep_id)}/{action}")

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._send(self._http.build_request("GET", path, params=_given(query)))

    def _post(
        self, path: str, content: bytes = b"", headers: dict[str, str] | None = None, **query: Any
    ) -> dict[str, Any]:
        request = self._http.build_request(
            "POST", path, content=content, headers=headers, params=_given(query)
        )
        return self._send(request)

    def _send(self, request: httpx.Request) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                response = self._http.send(request)
            except httpx.TransportError as error:
                if attempt == TRIES:
                    raise CannotConnect(
                        f"no server answers at {self.url} ({type(error).__name__})"
                    ) from error
            else:
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE or attempt == TRIES:
                    return _answer(response)
            time.sleep(0.3 * attempt)
        raise AssertionError("unreachable")


def _path(sweep_id: str) -> str:
    if not (sweep_id.isascii() and sweep_id.isalnum()):
        raise Refused({"detail": f"no sweep {sweep_id!r}: an id has letters and digits alone"})
    return f"/api/v1/sweeps/{sweep_id}"


def _team_path(name: str) -> str:
    if not re.fullmatch("[a-z0-9-]+", name):
        raise InvalidInput({"detail": f"team: got {name!r}; allowed: small letters, digits and dashes"})
    return f"/api/v1/teams/{name}"


def _given(query: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        document: dict[str, Any] = response.json()
    except ValueError:
        document = {"title": f"HTTP {response.status_code}, not JSON: is this a ddpsweep server?"}
        raise Refused(document) from None
    if response.is_success:
        return document
    raise (InvalidInput if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY else Refused)(document)
