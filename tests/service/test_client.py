"""The client, against the API in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service import client as client_module
from service.app import create_app
from service.client import Client, InvalidInput, Refused
from service.config import Settings
from tests.service import stage
from tests.service.test_cli import URL, InProcess


@pytest.fixture
def client(sqlite_engine: Engine) -> Iterator[Client]:
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))
    with TestClient(app, base_url=URL) as api, Client(URL, InProcess(api)) as client:
        yield client


def test_actions(client: Client, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    done = [act(sweep_id)["state"] for act in (client.pause, client.resume, client.cancel, client.retry)]
    assert done == ["paused", "queued", "cancelled", "queued"]
    client.cancel(sweep_id)
    with pytest.raises(Refused, match="it cannot pause") as refused:
        client.pause(sweep_id)
    assert refused.value.problem["status"] == 409


def test_packs_come_page_by_page(
    client: Client, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PACK_PAGE", 2)
    sweep_id = stage.submit(sqlite_engine, "a", *["sgd"] * 5)
    stage.give_up(sqlite_engine, stage.running(sqlite_engine, 1)[0])
    assert [pack["pack"] for pack in client.packs(sweep_id)] == [0, 1, 2, 3, 4]
    assert [pack["pack"] for pack in client.packs(sweep_id, "queued")] == [1, 2, 3, 4]
    assert [pack["pack"] for pack in client.packs(sweep_id, "failed")] == [0]
    assert [(client.pack(sweep_id, n) or {}).get("pack") for n in (0, 4, 5)] == [0, 4, None]
    with pytest.raises(InvalidInput):
        list(client.packs(sweep_id, "odd"))


def test_a_summary(client: Client, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd", "adam")
    for lease in stage.running(sqlite_engine, 2):
        stage.finish(sqlite_engine, lease, 5.0)
    answer = client.summary_json(sweep_id, metric="accuracy", baseline="adam")
    summary = client.summary(sweep_id, metric="accuracy", baseline="adam")
    assert [row.learning_rate for row in summary.rows] == [0.1, 0.5, 0.1, 0.1, 0.5, 0.5]
    assert summary.rows[0].mean == answer["rows"][0]["mean"] == 5.0 + (0 + 3 + 6) / 3
    assert {row.grid for row in client.summary(sweep_id).rows} == {0, 1}
    with pytest.raises(InvalidInput, match="one of train_loss"):
        client.summary(sweep_id, metric="f1")


def test_logs(client: Client, sqlite_engine: Engine) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    assert client.log(sweep_id, 0) == {"attempt": 1, "log": "2 of 4 steps\n"}
    assert client.log(sweep_id, 1, attempt=1, limit=5)["log"] == stage.LOG[-5:]
    with pytest.raises(Refused, match="no attempt 2 at pack 1"):
        client.log(sweep_id, 1, attempt=2)


def test_teams_and_cluster(client: Client, sqlite_engine: Engine) -> None:
    made = client.put_team("vision", weight=2.0, max_queued_runs=100)
    assert (made["weight"], made["max_devices"], made["max_queued_runs"]) == (2.0, None, 100)
    assert client.team("vision") == made
    assert [team["name"] for team in client.teams()] == ["default", "vision"]
    with pytest.raises(Refused, match="no team 'nobody'"):
        client.team("nobody")
    for name in ("", "..", "a/b", "A", "a\n"):
        with pytest.raises(InvalidInput, match="small letters"):
            client.team(name)
    sweep_id = stage.submit(sqlite_engine, "a", "sgd", team="vision")
    assert client.sweep(sweep_id)["team"] == "vision"
    assert client.cluster()["teams"] == client.teams()


def test_submit_for_a_team(client: Client) -> None:
    client.put_team("vision")
    text = (
        b"{name: a, dataset: wine, model: {kind: fcn, hidden: [4]}, training: {steps: 4, batch_size: 16}, "
        b"seeds: 2, grids: [{baseline: sgd, learning_rate: [0.1], vxx_reg: [1.0e-4]}]}"
    )
    assert client.submit(text)["team"] == "default"
    assert client.submit(text, team="vision")["team"] == "vision"
    with pytest.raises(Refused, match="no team 'nobody'"):
        client.submit(text, team="nobody")


def test_watching_goes_on_while_a_sweep_is_paused(client: Client, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    client.pause(sweep_id)
    states = client.watch(sweep_id, period=0)
    assert [next(states)["state"] for _ in range(3)] == ["paused"] * 3
    client.cancel(sweep_id)
    assert [sweep["state"] for sweep in states] == ["cancelled"]
