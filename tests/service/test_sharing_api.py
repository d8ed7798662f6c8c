"""REST of what a team shares: actions on sweeps, packs and logs, teams, the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service.app import create_app
from service.auth.roles import MOST_PRIORITY, Role, check_priority
from service.config import Settings
from service.db.engine import write
from service.dispatch import leases, presence
from service.errors import InvalidInputError
from tests.service.helpers import claim, submit
from workers.protocol import LOG_BYTES, Node, Pool

SWEEPS, TEAMS = "/api/v1/sweeps", "/api/v1/teams"


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    url = engine.url.render_as_string(hide_password=False)
    app = create_app(Settings(database_url=url))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def test_pause_resume_cancel_retry(client: TestClient, small_spec: dict[str, Any]) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    steps = [
        ("pause", "paused", ["resume", "cancel"]),
        ("pause", "paused", ["resume", "cancel"]),
        ("resume", "queued", ["pause", "cancel"]),
        ("cancel", "cancelled", ["retry"]),
        ("retry", "queued", ["pause", "cancel"]),
    ]
    for action, state, possible in steps:
        answer = client.post(f"{SWEEPS}/{sweep_id}/{action}")
        assert (answer.status_code, answer.json()["state"]) == (200, state)
        assert answer.json()["actions"] == possible
        assert client.get(f"{SWEEPS}/{sweep_id}").json()["state"] == state


def test_what_is_not_possible_is_a_conflict(client: TestClient, small_spec: dict[str, Any]) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    client.post(f"{SWEEPS}/{sweep_id}/cancel")
    answer = client.post(f"{SWEEPS}/{sweep_id}/pause")
    assert answer.status_code == 409
    assert answer.json()["detail"] == f"sweep {sweep_id} is cancelled: it cannot pause"
    assert client.post(f"{SWEEPS}/0123456789/pause").status_code == 404
    assert client.post(f"{SWEEPS}/{sweep_id}/explode").status_code == 422


def test_a_failed_pack_tells_its_cause_and_its_log(
    client: TestClient, engine: Engine, small_spec: dict[str, Any]
) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec | {"seeds": 60}).json()["id"]
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.start(connection, lease, "node 1", "a CPU")
        leases.progress(connection, lease, 2, "one\n")
        leases.requeue(connection, lease, 0.0, "worker lost", "a trace", "two\n")
        (lease,) = claim(connection, "b", 1)
        leases.give_up(connection, lease, "no such data", "another trace", "three\n")
    page = client.get(f"{SWEEPS}/{sweep_id}/packs", params={"limit": 1}).json()
    (pack,) = page["packs"]
    assert (pack["pack"], pack["state"], pack["error"]) == (0, "failed", "no such data")
    assert pack["error_detail"] == "another trace"
    first, second = pack["attempts"]
    assert (first["outcome"], first["node"], first["error"]) == ("failed", "node 1", "worker lost")
    assert (second["outcome"], second["node"], second["started_at"]) == ("failed", None, None)
    assert page["next"] == 0
    rest = client.get(f"{SWEEPS}/{sweep_id}/packs", params={"after": 0}).json()["packs"]
    assert {p["state"] for p in rest} == {"queued"}
    failed = client.get(f"{SWEEPS}/{sweep_id}/packs", params={"state": "failed"}).json()["packs"]
    assert [p["pack"] for p in failed] == [0]

    log = f"{SWEEPS}/{sweep_id}/packs/0/log"
    assert client.get(log).json() == {"attempt": 2, "log": "three\n"}
    assert client.get(log, params={"attempt": 1}).json() == {"attempt": 1, "log": "one\ntwo\n"}
    assert client.get(log, params={"attempt": 1, "limit": 4}).json()["log"] == "two\n"
    assert client.get(log, params={"attempt": 3}).status_code == 404
    assert client.get(log, params={"limit": LOG_BYTES + 1}).status_code == 422
    assert client.get(f"{SWEEPS}/{sweep_id}/packs/1/log").status_code == 404
    assert client.get(f"{SWEEPS}/0123456789/packs").status_code == 404


def test_teams(client: TestClient, small_spec: dict[str, Any]) -> None:
    quotas = {"weight": 2.0, "max_devices": 4.0, "max_queued_runs": 20}
    used = {"devices": 0.0, "packs_queued": 0, "device_seconds": 0.0, "run_steps": 0}
    assert client.put(f"{TEAMS}/physics", json=quotas).json() == {"name": "physics"} | quotas | used
    assert client.put(f"{TEAMS}/physics", json=quotas | {"weight": 3.0}).json()["weight"] == 3.0
    assert [team["name"] for team in client.get(TEAMS).json()["teams"]] == ["default", "physics"]
    sweep = client.post(SWEEPS, params={"team": "physics"}, json=small_spec).json()
    assert sweep["team"] == "physics"
    assert client.get(f"{TEAMS}/physics").json()["packs_queued"] == 1
    refused = client.post(SWEEPS, params={"team": "physics"}, json=small_spec)
    assert refused.status_code == 409
    assert "may have 20 runs waiting; with these there would be 36" in refused.json()["detail"]
    assert client.post(SWEEPS, params={"team": "chemistry"}, json=small_spec).status_code == 404
    assert client.get(f"{TEAMS}/chemistry").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 0}, {"weight": "1"}, {"max_devices": -1}, {"colour": "red"}, {"max_queued_runs": 0.5}],
)
def test_a_team_that_cannot_be(client: TestClient, wrong: dict[str, Any]) -> None:
    assert client.put(f"{TEAMS}/physics", json=wrong).status_code == 422
    assert client.put(f"{TEAMS}/Not a name", json={}).status_code == 422
    assert [team["name"] for team in client.get(TEAMS).json()["teams"]] == ["default"]


def test_a_key_is_a_teams_own(client: TestClient, small_spec: dict[str, Any]) -> None:
    client.put(f"{TEAMS}/physics", json={})
    key = {"Idempotency-Key": "k"}
    ids = [
        client.post(SWEEPS, params={"team": team}, json=small_spec, headers=key).json()["id"]
        for team in ("default", "physics", "default", "physics")
    ]
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]


def test_the_cluster(client: TestClient, engine: Engine, small_spec: dict[str, Any]) -> None:
    empty = client.get("/api/v1/cluster").json()
    assert (empty["dispatchers"], empty["nodes"], empty["packs"]) == ([], [], [])
    nodes = [Node("1", "10.0.0.1", Pool("gpu", "H100", "physics"), 8.0), Node("2", "10.0.0.2", Pool(), 2.0)]
    sweep_id = submit(engine, small_spec)
    submit(engine, small_spec)
    with write(engine) as connection:
        for owner in ("a", "b"):
            presence.announce(connection, owner, "one cluster", nodes)
        (lease,) = claim(connection, "a", 1)
        leases.start(connection, lease, "10.0.0.2", "a CPU")
        leases.progress(connection, lease, 3)
    view = client.get("/api/v1/cluster").json()
    assert [seen["owner"] for seen in view["dispatchers"]] == ["a", "b"]
    for node in view["nodes"]:
        assert node.pop("cluster") == "one cluster"
    assert view["nodes"] == [
        {"id": "1", "name": "10.0.0.1", "kind": "gpu", "model": "H100", "team": "physics", "devices": 8.0},
        {"id": "2", "name": "10.0.0.2", "kind": "cpu", "model": "cpu", "team": None, "devices": 2.0},
    ]
    (pack,) = view["packs"]
    assert (pack["sweep_id"], pack["team"], pack["pack"], pack["node"]) == (
        sweep_id,
        "default",
        0,
        "10.0.0.2",
    )
    assert (pack["step"], pack["steps"], pack["device"]) == (3, 4, "a CPU")
    (team,) = view["teams"]
    assert (team["devices"], team["packs_queued"]) == (1.0, 1)


@pytest.mark.parametrize("role", Role)
def test_priorities_are_bounded_by_role(role: Role) -> None:
    check_priority(MOST_PRIORITY[role], role)
    check_priority(-100, role)
    with pytest.raises(InvalidInputError, match=f"at most {MOST_PRIORITY[role]} for a {role}"):
        check_priority(MOST_PRIORITY[role] + 1, role)
