"""The REST API, in this process, over both databases where SQL matters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
import yaml
from sqlalchemy import Engine, event, update
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from ddpnopt.config import Baseline
from service.app import create_app
from service.config import MAX_BODY_BYTES, Settings
from service.db.engine import write
from service.db.tables import sweeps
from service.dispatch import leases
from service.sweeps.device import Device
from service.sweeps.expand import Plan, plan
from service.sweeps.spec import SweepSpec
from tests.conftest import ALONE, STORED_BEFORE
from tests.service.helpers import ENVIRONMENT, claim, outcome

SWEEPS = "/api/v1/sweeps"


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    url = engine.url.render_as_string(hide_password=False)
    app = create_app(Settings(database_url=url))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def sqlite_client(sqlite_engine: Engine) -> Iterator[TestClient]:
    url = sqlite_engine.url.render_as_string()
    app = create_app(Settings(database_url=url))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def finish_all(engine: Engine, diverged: frozenset[int] = frozenset()) -> None:
    with write(engine) as connection:
        for lease in claim(connection, "a", 100):
            runs = len(leases.runs_of(connection, lease))
            assert leases.finish(connection, lease, outcome(runs, diverged=diverged), ENVIRONMENT)


def test_submit_poll_heatmap(client: TestClient, engine: Engine, small_spec: dict[str, Any]) -> None:
    checked = client.post(f"{SWEEPS}/validate", json=small_spec)
    assert checked.status_code == 200
    assert checked.json() | {"estimated_seconds": 0} == {
        "runs": 18,
        "packs": 1,
        "run_steps": 72,
        "estimated_seconds": 0,
    }
    assert client.get(SWEEPS).json() == {"sweeps": [], "next": None}

    answer = client.post(SWEEPS, json=small_spec)
    assert answer.status_code == 201
    sweep = answer.json()
    assert answer.headers["Location"] == f"{SWEEPS}/{sweep['id']}"
    assert (sweep["state"], sweep["progress"]["runs_done"]) == ("queued", 0)
    assert client.get(f"{SWEEPS}/{sweep['id']}/heatmap").json()["cells"][0]["state"] == "pending"
    runs = client.get(f"{SWEEPS}/{sweep['id']}/runs").json()["runs"]
    assert {run["state"] for run in runs} == {"queued"}

    finish_all(engine, diverged=frozenset({0}))
    sweep = client.get(f"{SWEEPS}/{sweep['id']}").json()
    assert sweep["state"] == "completed"
    assert sweep["progress"]["runs_done"] == 18
    assert sweep["progress"]["runs_diverged"] == 1
    assert sweep["progress"]["seconds_left"] is None
    for metric in ("train_loss", "accuracy", "test_loss", "train_accuracy"):
        panel = client.get(
            f"{SWEEPS}/{sweep['id']}/heatmap", params={"metric": metric, "baseline": "sgd"}
        ).json()
        assert [(c["learning_rate"], c["vxx_reg"]) for c in panel["cells"]] == [
            (rate, reg) for rate in (0.1, 0.5) for reg in (1e-4, 1e-3)
        ]
        assert [(c["n"], c["n_diverged_baseline"]) for c in panel["cells"]] == [
            (2, 1),
            (2, 1),
            (3, 0),
            (3, 0),
        ]
        sign = 1 if "accuracy" in metric else -1
        assert panel["cells"][2]["improvement"] == sign * 1.0  # partners follow their baseline in the pack


def test_runs_and_curves(client: TestClient, engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    finish_all(engine, diverged=frozenset({1}))
    pages, after = [], 0
    while after is not None:
        page = client.get(f"{SWEEPS}/{sweep_id}/runs", params={"limit": 7, "after": after}).json()
        pages.append(page["runs"])
        after = page["next"]
    assert [len(page) for page in pages] == [7, 7, 4]
    runs = [run for page in pages for run in page]
    assert len({run["id"] for run in runs}) == 18
    lost = runs[1]
    assert (lost["state"], lost["train_loss"], lost["diverged_kind"]) == ("diverged", None, "nan")
    assert (lost["diverged_step"], lost["diverged_quantity"], lost["last_finite"]) == (3, "batch_loss", 2.5)
    curves = client.get(f"{SWEEPS}/{sweep_id}/curves", params={"metric": "accuracy", "limit": 5}).json()
    assert len(curves["curves"]) == 5
    assert curves["curves"][0]["steps"] == [0, 2, 4]
    assert curves["curves"][0]["values"] == [3.0, None, 1.0]


def test_yaml_is_taken_too(sqlite_client: TestClient, small_spec: dict[str, Any]) -> None:
    text = yaml.safe_dump(small_spec)
    for media in ("application/yaml", "text/yaml; charset=utf-8"):
        answer = sqlite_client.post(SWEEPS, content=text, headers={"Content-Type": media})
        assert answer.status_code == 201


def test_checking_a_spec_does_not_keep_other_writers_waiting(
    sqlite_client: TestClient, small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one submit is being planned, another goes through: nothing holds SQLite's write lock yet."""
    planning, others_done = threading.Event(), threading.Event()

    def slow_for_one(spec: SweepSpec, device: Device) -> Plan:
        if spec.name == "slow":
            planning.set()
            assert others_done.wait(20)
        return plan(spec, device)

    monkeypatch.setattr("service.sweeps.endpoints.plan", slow_for_one)
    slow: list[int] = []
    thread = threading.Thread(
        target=lambda: slow.append(sqlite_client.post(SWEEPS, json=small_spec | {"name": "slow"}).status_code)
    )
    thread.start()
    assert planning.wait(20)
    assert sqlite_client.post(SWEEPS, json=small_spec).status_code == 201
    others_done.set()
    thread.join(20)
    assert slow == [201]


def test_concurrent_submits_with_one_key_make_one_sweep(
    client: TestClient, small_spec: dict[str, Any]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: client.post(SWEEPS, json=small_spec, headers={"Idempotency-Key": "k"}), range(16)
            )
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_an_idempotency_key_makes_one_sweep(client: TestClient, small_spec: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.post(SWEEPS, json=small_spec, headers=headers)
    again = client.post(SWEEPS, json=small_spec, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = client.post(SWEEPS, json=small_spec | {"name": "other"}, headers=headers)
    assert other.status_code == 409
    assert first.json()["id"] in other.json()["detail"]
    assert len(client.get(SWEEPS).json()["sweeps"]) == 1


def test_sweeps_are_listed_newest_first_in_pages(client: TestClient, small_spec: dict[str, Any]) -> None:
    ids = [client.post(SWEEPS, json=small_spec).json()["id"] for _ in range(5)]
    seen, after = [], None
    while True:
        page = client.get(SWEEPS, params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [sweep["id"] for sweep in page["sweeps"]]
        after = page["next"]
        if after is None:
            break
    assert seen == ids[::-1]


def check_problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert {"type", "title", "detail"} <= set(document)
    return document


@pytest.mark.parametrize("path", [SWEEPS, f"{SWEEPS}/validate"])
def test_a_bad_spec_is_a_422_and_nothing_is_stored(
    sqlite_client: TestClient, small_spec: dict[str, Any], path: str
) -> None:
    small_spec["grids"][0]["learning_rate"] = [0.1, -0.2]
    document = check_problem(sqlite_client.post(path, json=small_spec), 422)
    (error,) = document["errors"]
    assert error == {
        "field": "grids[0].learning_rate[1]",
        "value": "-0.2",
        "allowed": "greater than 0",
    }
    assert sqlite_client.get(SWEEPS).json()["sweeps"] == []


@pytest.mark.parametrize(
    ("content", "media", "field"),
    [
        (b"- 1", "application/yaml", "document"),
        (b"a: !!python/name:os.system", "application/yaml", "line 1"),
        (b'{"a": NaN}', "application/json", "a"),
        (b'{"name": "\\ud800"}', "application/json", "name"),
        (b"\xff\xfe", "application/json", "document"),
        (b"", "application/json", "document"),
        (b"{}", "application/x-www-form-urlencoded", "Content-Type"),
        (b"{}", "", "Content-Type"),
    ],
)
def test_bad_bodies(sqlite_client: TestClient, content: bytes, media: str, field: str) -> None:
    answer = sqlite_client.post(SWEEPS, content=content, headers={"Content-Type": media})
    assert field in [error["field"] for error in check_problem(answer, 422)["errors"]]


def test_a_huge_body_is_not_read(sqlite_client: TestClient) -> None:
    answer = sqlite_client.post(
        SWEEPS, content=b" " * (MAX_BODY_BYTES + 1), headers={"Content-Type": "application/json"}
    )
    check_problem(answer, 413)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{SWEEPS}/nothere", 404),
        (f"{SWEEPS}/nothere/runs", 404),
        (f"{SWEEPS}/nothere/heatmap", 404),
        (f"{SWEEPS}/nothere/curves", 404),
        (f"{SWEEPS}/nothere/summary", 404),
        (f"{SWEEPS}?after=nothere", 404),
        (f"{SWEEPS}?limit=0", 422),
        (f"{SWEEPS}?limit=x", 422),
        (f"{SWEEPS}/ID/heatmap?metric=f1", 422),
        (f"{SWEEPS}/ID/heatmap?baseline=adam", 422),
        (f"{SWEEPS}/ID/heatmap?grid=7", 422),
        (f"{SWEEPS}/ID/heatmap?grid=99999999999999999999", 422),
        (f"{SWEEPS}/ID/summary?metric=f1", 422),
        (f"{SWEEPS}/ID/summary?baseline=adam", 422),
        (f"{SWEEPS}/ID/summary?grid=7", 422),
        (f"{SWEEPS}/ID/summary?grid=-1", 422),
        (f"{SWEEPS}/ID/runs?after=-1", 422),
        (f"{SWEEPS}/ID/runs?limit=1001", 422),
        (f"{SWEEPS}/%00", 404),
        ("/api/v1/nothing", 404),
    ],
)
def test_bad_queries(client: TestClient, small_spec: dict[str, Any], path: str, status: int) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    check_problem(client.get(path.replace("ID", sweep_id)), status)


def test_a_wrong_method_is_a_problem_too(sqlite_client: TestClient) -> None:
    check_problem(sqlite_client.delete(SWEEPS), 405)


def test_several_grids_must_be_told_apart(sqlite_client: TestClient, small_spec: dict[str, Any]) -> None:
    second = small_spec["grids"][0] | {"ddpnopt": {"safeguard": "psd"}, "learning_rate": [0.2]}
    small_spec["grids"].append(second)
    sweep_id = sqlite_client.post(SWEEPS, json=small_spec).json()["id"]
    document = check_problem(sqlite_client.get(f"{SWEEPS}/{sweep_id}/heatmap?baseline=sgd"), 422)
    allowed = "one of 0 (sgd), 1 (sgd, safeguard psd), since several grids fit"
    assert document["errors"][0]["allowed"] == allowed
    panel = sqlite_client.get(f"{SWEEPS}/{sweep_id}/heatmap?grid=1").json()
    assert (panel["learning_rate"], panel["setting"]) == ([0.2], "safeguard psd")
    check_problem(sqlite_client.get(f"{SWEEPS}/{sweep_id}/curves?baseline=sgd"), 422)
    assert sqlite_client.get(f"{SWEEPS}/{sweep_id}/curves?grid=1").status_code == 200


def test_several_baselines_in_one_sweep(
    client: TestClient, engine: Engine, small_spec: dict[str, Any]
) -> None:
    plain = small_spec["grids"][0]
    small_spec["grids"] = [
        plain | {"baseline": "sgd", "options": {"momentum": 0.9}},
        plain | {"baseline": "adam", "learning_rate": [0.01]},
        plain | {"baseline": "ekfac", "ddpnopt": {"terminal_hessian": "gauss_newton"}},
    ]
    assert client.post(f"{SWEEPS}/validate", json=small_spec).json()["runs"] == 18 + 9 + 18
    sweep = client.post(SWEEPS, json=small_spec).json()
    assert sweep["spec"]["grids"][0]["options"] == {"momentum": 0.9, "weight_decay": 0.0}
    finish_all(engine)
    wanted = {"sgd": "momentum 0.9", "adam": "", "ekfac": "terminal_hessian gauss_newton"}
    for baseline, setting in wanted.items():
        panel = client.get(f"{SWEEPS}/{sweep['id']}/heatmap", params={"baseline": baseline}).json()
        assert (panel["baseline"], panel["setting"]) == (baseline, setting)
        assert {cell["n"] for cell in panel["cells"]} == {3}
    refused = check_problem(client.get(f"{SWEEPS}/{sweep['id']}/heatmap?baseline=kfac"), 422)
    assert refused["errors"][0]["allowed"].endswith(
        "0 (sgd, momentum 0.9), 1 (adam), 2 (ekfac, terminal_hessian gauss_newton)"
    )
    runs = client.get(f"{SWEEPS}/{sweep['id']}/runs", params={"limit": 1000}).json()["runs"]
    assert [sum(run["baseline"] == name for run in runs) for name in wanted] == [18, 9, 18]
    text = client.get(f"/sweeps/{sweep['id']}").text
    for words in ("vs SGD", "vs Adam", "vs EKFAC", "<small>momentum 0.9</small>", "curves?grid=2"):
        assert words in text


def test_a_summary_counts_what_ended_and_what_diverged(
    client: TestClient, engine: Engine, small_spec: dict[str, Any]
) -> None:
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    before = client.get(f"{SWEEPS}/{sweep_id}/summary").json()
    assert (before["sweep_id"], before["name"], before["metric"]) == (sweep_id, "small", "train_loss")
    nothing = dict.fromkeys(("mean", "sd", "ci_low", "ci_high", "min", "max"))
    assert before["rows"][1] == nothing | {
        "grid": 0,
        "baseline": "sgd",
        "setting": "",
        "method": "baseline",
        "learning_rate": 0.5,
        "vxx_reg": None,
        "n": 0,
        "n_ended": 0,
        "n_diverged": 0,
        "n_total": 3,
    }
    # A row of a baseline and its two partners for each of three seeds; a run's metrics are 1 + its place.
    finish_all(engine, diverged=frozenset({0, 1, 4}))
    for metric in ("train_loss", "train_accuracy", "test_loss", "accuracy"):
        rows = client.get(f"{SWEEPS}/{sweep_id}/summary", params={"metric": metric}).json()["rows"]
        told = [(row["n"], row["n_ended"], row["n_diverged"], row["mean"]) for row in rows]
        assert told == [
            (2, 3, 1, 5.5),
            (3, 3, 0, 13),
            (1, 3, 2, 8),
            (3, 3, 0, 6),
            (3, 3, 0, 14),
            (3, 3, 0, 15),
        ]
        first, third = rows[0], rows[2]
        assert (first["min"], first["max"], first["sd"]) == (4, 7, pytest.approx(4.5**0.5))
        assert first["ci_low"] == pytest.approx(5.5 - 12.7062047 * 1.5)
        assert (third["sd"], third["ci_low"], third["ci_high"]) == (None, None, None)


def test_grids_without_cells(client: TestClient, engine: Engine, small_spec: dict[str, Any]) -> None:
    small_spec["grids"] = ALONE
    checked = client.post(f"{SWEEPS}/validate", json=small_spec).json()
    assert (checked["runs"], checked["run_steps"]) == (33, 132)
    sweep = client.post(SWEEPS, json=small_spec).json()
    assert [grid["vxx_reg"] for grid in sweep["spec"]["grids"][1:]] == [[]] * 4
    url = f"{SWEEPS}/{sweep['id']}"
    finish_all(engine)
    assert client.get(url).json()["progress"]["runs_done"] == 33
    # Only grids with cells are candidates for a heatmap.
    assert client.get(f"{url}/heatmap").json()["grid"] == 0
    wanted = (
        "one of 0 (sgd): a heatmap compares DDPNOpt with its baseline, and there are no runs of DDPNOpt in "
    )
    for query, field, value, named in (
        ("grid=3", "grid", "3", "3 (emsa, lbfgs_steps 2)"),
        ("baseline=adam", "baseline", '"adam"', "1 (adam, eps 1e-06)"),
        ("baseline=vanilla_ddp&grid=4", "grid", "4", "4 (vanilla_ddp)"),
    ):
        (error,) = check_problem(client.get(f"{url}/heatmap?{query}"), 422)["errors"]
        assert error == {
            "field": field,
            "value": value,
            "allowed": f"{wanted}{named}; ask for the summary",
        }
    rows = client.get(f"{url}/summary").json()["rows"]
    assert [sum(row["grid"] == grid for row in rows) for grid in range(5)] == [6, 1, 2, 1, 1]
    for query, grids in (("baseline=emsa", {3}), ("grid=2", {2}), ("grid=2&baseline=sgd_vgr", {2})):
        found = client.get(f"{url}/summary?{query}").json()["rows"]
        assert {row["grid"] for row in found} == grids
        assert found == [row for row in rows if row["grid"] in grids]
    check_problem(client.get(f"{url}/summary?grid=2&baseline=sgd"), 422)
    assert len(client.get(f"{url}/curves?grid=3").json()["curves"]) == 3
    runs = client.get(f"{url}/runs", params={"limit": 1000}).json()["runs"]
    assert sum(run["baseline"] == "vanilla_ddp" for run in runs) == 3


def test_several_grids_of_one_baseline_are_summarised_together(
    client: TestClient, engine: Engine, small_spec: dict[str, Any]
) -> None:
    plain = small_spec["grids"][0]
    small_spec["grids"] = [plain | {"vxx_reg": []}, plain | {"options": {"momentum": 0.9}}]
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    rows = client.get(f"{SWEEPS}/{sweep_id}/summary?baseline=sgd").json()["rows"]
    assert [(row["grid"], row["setting"]) for row in rows] == [(0, "")] * 2 + [(1, "momentum 0.9")] * 6
    # The one with cells is meant, since the other has no heatmap.
    assert client.get(f"{SWEEPS}/{sweep_id}/heatmap?baseline=sgd").json()["grid"] == 1


def test_a_sweep_without_any_cells_has_no_heatmap(client: TestClient, small_spec: dict[str, Any]) -> None:
    small_spec["grids"] = ALONE[3:4]
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    (error,) = check_problem(client.get(f"{SWEEPS}/{sweep_id}/heatmap"), 422)["errors"]
    assert (error["field"], error["value"]) == ("grid", "null")
    assert error["allowed"].startswith("none of this sweep's grids: a heatmap compares")


def test_a_sweep_that_an_older_version_stored(
    client: TestClient, engine: Engine, small_spec: dict[str, Any]
) -> None:
    small_spec["name"] = STORED_BEFORE["name"]
    key = {"Idempotency-Key": "before"}
    sweep_id = client.post(SWEEPS, json=small_spec, headers=key).json()["id"]
    with write(engine) as connection:
        connection.execute(update(sweeps).values(spec=STORED_BEFORE))
    finish_all(engine)
    assert client.get(f"{SWEEPS}/{sweep_id}").json()["spec"] == STORED_BEFORE
    panel = client.get(f"{SWEEPS}/{sweep_id}/heatmap").json()
    assert (panel["setting"], panel["cells"][0]["n"]) == ("", 3)
    assert client.get(f"{SWEEPS}/{sweep_id}/curves").status_code == 200
    assert {row["n"] for row in client.get(f"{SWEEPS}/{sweep_id}/summary").json()["rows"]} == {3}
    assert "DDPNOpt vs SGD" in client.get(f"/sweeps/{sweep_id}").text
    # The same request is the same sweep, though the spec has more fields now.
    assert client.post(SWEEPS, json=small_spec, headers=key).json()["id"] == sweep_id
    other = small_spec["grids"][0] | {"options": {"momentum": 0.9}}
    check_problem(client.post(SWEEPS, json=small_spec | {"grids": [other]}, headers=key), 409)


def test_a_database_that_is_away_is_a_503(sqlite_client: TestClient) -> None:
    engine = sqlite_client.app.state.engine  # type: ignore[attr-defined]

    def refuse(*_: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    event.listen(engine, "before_cursor_execute", refuse)
    for path in (SWEEPS, "/readyz"):
        answer = sqlite_client.get(path)
        check_problem(answer, 503)
        assert answer.headers["Retry-After"]
    event.remove(engine, "before_cursor_execute", refuse)
    assert sqlite_client.get("/readyz").json() == {"status": "ready"}


def test_an_unforeseen_error_is_a_500_that_tells_nothing(
    sqlite_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("service.sweeps.queries.newest", broken)
    assert "secret" not in json.dumps(check_problem(sqlite_client.get(SWEEPS), 500))


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").status_code == 200


def test_openapi_names_every_route_and_the_spec(sqlite_client: TestClient) -> None:
    document = sqlite_client.get("/openapi.json").json()
    assert {
        SWEEPS,
        f"{SWEEPS}/validate",
        f"{SWEEPS}/{{sweep_id}}",
        f"{SWEEPS}/{{sweep_id}}/runs",
        f"{SWEEPS}/{{sweep_id}}/heatmap",
        f"{SWEEPS}/{{sweep_id}}/summary",
        f"{SWEEPS}/{{sweep_id}}/curves",
        f"{SWEEPS}/{{sweep_id}}/records",
        f"{SWEEPS}/{{sweep_id}}/{{action}}",
        f"{SWEEPS}/{{sweep_id}}/packs",
        f"{SWEEPS}/{{sweep_id}}/packs/{{pack}}/log",
        "/api/v1/teams",
        "/api/v1/teams/{name}",
        "/api/v1/cluster",
        "/healthz",
        "/readyz",
    } == set(document["paths"])
    body = document["paths"][SWEEPS]["post"]["requestBody"]["content"]["application/yaml"]["schema"]
    assert body == {"$ref": "#/components/schemas/SweepSpec"}
    schemas = document["components"]["schemas"]
    assert set(schemas["SweepSpec"]["properties"]) == set(SweepSpec.model_fields)
    variants = schemas["SweepSpec"]["properties"]["grids"]["items"]
    assert set(variants["discriminator"]["mapping"]) == set(get_args(Baseline))
    assert "setting" in schemas["Heatmap"]["properties"]
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    submit = document["paths"][SWEEPS]["post"]["responses"]
    assert set(submit) == {"200", "201", "404", "409", "413", "422", "503"}
    for status in ("404", "409", "413", "422", "503"):
        assert set(submit[status]["content"]) == {"application/problem+json"}
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas


def test_a_page_elsewhere_cannot_reach_it_under_its_own_name(sqlite_client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert sqlite_client.get(SWEEPS, headers={"Host": host}).status_code == 400
    for host in ("localhost:8321", "127.0.0.1:1", "[::1]:8321"):
        assert sqlite_client.get(SWEEPS, headers={"Host": host}).status_code == 200


def test_pages(client: TestClient, engine: Engine, small_spec: dict[str, Any]) -> None:
    assert "No sweep yet" in client.get("/").text
    small_spec["name"] = "<script>alert(1)</script>"
    sweep_id = client.post(SWEEPS, json=small_spec).json()["id"]
    finish_all(engine)
    for path in ("/", "/live", f"/sweeps/{sweep_id}", f"/sweeps/{sweep_id}/live"):
        page = client.get(path)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        policy = page.headers["Content-Security-Policy"]
        assert "script-src 'self';" in policy
    assert 'data-learning-rate="0.1" data-vxx-reg="0.0001"' in client.get(f"/sweeps/{sweep_id}").text
    for path in ("/static/live.js", "/static/style.css", "/static/icon.svg", "/static/plotly.min.js"):
        assert client.get(path).status_code == 200
    assert client.get("/sweeps/nothere").status_code == 404
