"""The dashboard's pages, rendered over real databases, and what other sites' pages may not do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest
from sqlalchemy import Engine, event, update
from starlette.testclient import TestClient

from ddpnopt.datasets.load import FILE_READERS
from service.app import create_app
from service.client import Client
from service.config import Settings
from service.dashboard import offers, views
from service.dashboard.pages import duration
from service.db.engine import read, write
from service.db.tables import dispatchers, packs, sweeps
from service.dispatch import leases
from service.errors import SetupError
from service.paper import presets
from service.paper.presets import PRESETS, Preset
from service.paper.run import run
from service.sweeps import queries
from service.sweeps.documents import parse_yaml
from service.sweeps.schemas import Sweep
from tests.conftest import ALONE, SMALL_SPEC
from tests.service import stage
from tests.service.helpers import ENVIRONMENT, outcome, pack_rows, submit
from tests.service.test_cli import InProcess

SWEEPS = "/api/v1/sweeps"
HOST = "127.0.0.1:8321"


@pytest.fixture
def client(sqlite_engine: Engine) -> Iterator[TestClient]:
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))
    with TestClient(app, base_url=f"http://{HOST}") as client:
        yield client


def live(client: TestClient, sweep_id: str) -> str:
    page = client.get(f"/sweeps/{sweep_id}/live")
    assert page.status_code == 200
    return page.text


def offered(text: str, sweep_id: str) -> list[str]:
    """Return the actions of a page's buttons, beside those of its failed packs."""
    pattern = rf'id="act-(\w+)" class="(\w+)" data-post="/api/v1/sweeps/{sweep_id}/(\w+)"'
    found = re.findall(pattern, text)
    assert all(len(set(names)) == 1 for names in found)
    return [names[0] for names in found]


def test_the_buttons_are_what_would_change_something(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd", "adam")

    def do(action: str) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(f"{SWEEPS}/{sweep_id}/{action}").json()
        assert offered(live(client, sweep_id), sweep_id) == answer["actions"]
        assert f'data-state="{answer["state"]}"' in live(client, sweep_id)
        return answer

    assert offered(live(client, sweep_id), sweep_id) == ["pause", "cancel"]
    assert do("pause")["state"] == "paused"
    assert do("resume")["state"] == "queued"
    lease = stage.running(sqlite_engine, 1)[0]
    assert do("pause")["actions"] == ["resume", "cancel"]
    stage.stop(sqlite_engine, lease)
    assert do("cancel")["actions"] == ["retry"]
    assert do("retry")["state"] == "running"
    for lease in stage.running(sqlite_engine, 2):
        stage.finish(sqlite_engine, lease)
    assert offered(live(client, sweep_id), sweep_id) == []


def test_only_cancel_is_asked_about(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, '"><script>alert(1)</script>', "sgd")
    buttons = re.findall(r"<button.*?</button>", live(client, sweep_id), re.DOTALL)
    assert ["data-confirm" in button for button in buttons] == [False, True]
    assert "<script" not in live(client, sweep_id)
    assert 'Cancel "><script>alert(1)</script>?' in unescape(buttons[1])
    for button in buttons:
        assert 'type="button"' in button
        assert re.search('aria-label="(Pause|Cancel) this sweep"', button)


def test_a_failed_pack_shows_its_cause_and_its_last_lines(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    page = live(client, sweep_id)
    assert "1 pack failed" in page
    assert f'<p class="problem">{stage.CAUSE}</p>' in page
    excerpt = re.findall(r'<pre class="excerpt".*?>(.*?)</pre>', page, re.DOTALL)
    # The end of the log, without what only a terminal understands.
    assert excerpt == ["\n".join([*(f"line {n}" for n in range(19, 30)), "out of memory &lt;b&gt;"])]
    assert f'id="retry-failed" class="retry" data-post="/api/v1/sweeps/{sweep_id}/retry"' in page
    assert f'href="/sweeps/{sweep_id}/packs/1/log"' in page


def test_a_pack_that_wrote_nothing_shows_its_traceback(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    with write(sqlite_engine) as connection:
        connection.execute(
            update(packs).values(state="failed", attempt=5, error="tried before", error_detail=stage.DETAIL)
        )
        connection.execute(update(sweeps).values(state="failed", packs_queued=0))
    page = unescape(live(client, sweep_id))
    assert f">{stage.DETAIL}</pre>" in page
    assert "tried before" in page


def test_the_list_of_packs_is_bounded_and_begins_with_the_failed(
    client: TestClient, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "SHOWN_PACKS", 4)
    sweep_id = stage.submit(sqlite_engine, "a", "sgd", "rmsprop", "adam", "kfac", "ekfac", "sgd")
    leases = stage.running(sqlite_engine, 4)
    stage.finish(sqlite_engine, leases[0])
    stage.give_up(sqlite_engine, leases[2])
    with read(sqlite_engine) as connection:
        sweep = Sweep.of(queries.get(connection, sweep_id))
        shown = views.first_packs(connection, sweep)
    assert [(pack.pack, pack.state) for pack in shown] == [
        (2, "failed"),
        (1, "running"),
        (3, "running"),
        (0, "completed"),
    ]
    page = live(client, sweep_id)
    assert "Packs: 2 queued, 2 running, 1 failed" in page
    assert page.count('aria-label="Log of pack 2, attempt 1"') == 1


def test_a_page_makes_no_more_queries_for_more_packs(client: TestClient, sqlite_engine: Engine) -> None:
    counts = []
    for baselines in (["sgd"] * 4, ["sgd"] * 40):
        sweep_id = stage.submit(sqlite_engine, "a", *baselines)
        for lease in stage.running(sqlite_engine, len(baselines)):
            stage.give_up(sqlite_engine, lease)
        asked: list[str] = []
        listener = lambda *call, asked=asked: asked.append(call[2])  # noqa: E731
        engine = client.app.state.engine  # type: ignore[attr-defined]
        event.listen(engine, "before_cursor_execute", listener)
        page = live(client, sweep_id)
        event.remove(engine, "before_cursor_execute", listener)
        assert page.count('<pre class="excerpt"') == views.SHOWN_FAILURES
        # A heatmap has a query or two of its own.
        counts.append(len([sql for sql in asked if "attempts" in sql or "packs.position" in sql]))
    assert counts[0] == counts[1]


def lone_tables(page: str) -> list[str]:
    """Return the tables of the grids without cells, as words."""
    tables = re.findall(r'<table class="cells lone".*?</table>', page, re.DOTALL)
    return [" ".join(re.sub("<[^>]*>", " ", table).split()) for table in tables]


def submit_mixed(engine: Engine) -> str:
    """Submit grids with cells and without, of which all but the last pack end, with one run diverged."""
    sweep_id = submit(engine, SMALL_SPEC | {"name": "mixed", "grids": ALONE[:4]})
    *most, last = stage.running(engine, len(pack_rows(engine)))
    for lease in most:
        with write(engine) as connection:
            runs = len(leases.runs_of(connection, lease))
            lost = frozenset({1}) if runs == 6 else frozenset()
            assert leases.finish(connection, lease, outcome(runs, diverged=lost), ENVIRONMENT)
    assert last
    return sweep_id


def test_grids_without_cells_are_tables(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = submit_mixed(sqlite_engine)
    page = client.get(f"/sweeps/{sweep_id}").text
    head = "learning rate training loss test accuracy (%) n diverged"
    adam, vgr, emsa = lone_tables(page)
    assert adam.startswith(f"Adam eps 1e-06 {head} 0.01 ")
    assert vgr == f"SGD-VGR {head} 0.5 2 ± 1.41 2 ± 1.41 2 / 3 1 0.1 5 ± 1 5 ± 1 3 / 3 0"
    assert emsa.startswith(f"E-MSA lbfgs_steps 2 {head} 1 ")
    # The grid with cells is drawn as ever, the others are not.
    assert page.count("data-figure=") == page.count('class="plot"') == 2
    assert "Mean paired improvement" in page
    assert "Of a baseline alone: mean ± standard deviation" in page
    for link in ("heatmap?metric=accuracy&amp;grid=0", "summary?metric=accuracy&amp;grid=3", "curves?grid=3"):
        assert f'href="/api/v1/sweeps/{sweep_id}/{link}"' in page
    assert "heatmap?metric=accuracy&amp;grid=3" not in page
    assert f"ddpsweep heatmap {sweep_id}" in page


def test_a_page_without_cells_speaks_of_no_heatmap(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = submit(sqlite_engine, SMALL_SPEC | {"grids": ALONE[3:]})
    page = client.get(f"/sweeps/{sweep_id}").text
    assert [table.split(" learning")[0] for table in lone_tables(page)] == [
        "E-MSA lbfgs_steps 2",
        "Vanilla DDP",
    ]
    assert lone_tables(page)[1].endswith("diverged 0.5 · · 0 / 3 0")
    for words in ("heatmap", "Mean paired improvement", "data-figure="):
        assert words not in page
    assert f"ddpsweep summary {sweep_id}" in page


def test_a_page_with_cells_alone_has_no_such_tables(client: TestClient, sqlite_engine: Engine) -> None:
    page = client.get(f"/sweeps/{stage.submit(sqlite_engine, 'a', 'sgd')}").text
    assert lone_tables(page) == []
    for words in ("Of a baseline alone", "/summary?", "ddpsweep summary"):
        assert words not in page


def test_grids_without_cells_take_a_query_for_each_metric(client: TestClient, sqlite_engine: Engine) -> None:
    counts = []
    for grids in (ALONE[3:4], ALONE[1:4] * 5):
        sweep_id = submit(sqlite_engine, SMALL_SPEC | {"grids": grids})
        asked: list[str] = []
        listener = lambda *call, asked=asked: asked.append(call[2])  # noqa: E731
        engine = client.app.state.engine  # type: ignore[attr-defined]
        event.listen(engine, "before_cursor_execute", listener)
        live(client, sweep_id)
        event.remove(engine, "before_cursor_execute", listener)
        counts.append(sum("FROM runs" in sql for sql in asked))
    assert counts == [2, 2]


def test_the_log_page(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    page = client.get(f"/sweeps/{sweep_id}/packs/1/log")
    assert page.status_code == 200
    assert "script-src 'self';" in page.headers["Content-Security-Policy"]
    text = unescape(page.text)
    assert "2 of 4 steps\nline 0\n" in text
    assert "out of memory <b>" in text
    assert stage.DETAIL in text
    assert client.get(f"/sweeps/{sweep_id}/packs/1/log?attempt=1").status_code == 200
    for path in ("packs/1/log?attempt=2", "packs/7/log"):
        assert client.get(f"/sweeps/{sweep_id}/{path}").status_code == 404
    assert client.get(f"/sweeps/{sweep_id}/packs/-1/log").status_code == 422


def test_reused_runs_are_told_where_there_are_any(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    for path in ("/", f"/sweeps/{sweep_id}"):
        assert "reused" not in client.get(path).text
    with write(sqlite_engine) as connection:
        connection.execute(update(sweeps).values(runs_reused=6))
    for path in ("/", f"/sweeps/{sweep_id}"):
        assert "6 reused" in client.get(path).text


def test_the_list_shows_team_and_state(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.busy_cluster(sqlite_engine)
    client.post(f"{SWEEPS}/{sweep_id}/pause")
    page = client.get("/").text
    assert "<td>vision</td>" in page
    assert '<span class="state pausing">pausing</span>' in page


def test_every_state_has_a_style(client: TestClient) -> None:
    style = client.get("/static/style.css").text
    for state in ("running", "pausing", "paused", "cancelling", "cancelled", "completed", "failed"):
        assert f".state.{state}" in style


def test_the_cluster_page(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.busy_cluster(sqlite_engine)
    page = client.get("/cluster").text
    assert 'href="/cluster"' in client.get("/").text
    assert "Nothing trains" not in page
    assert page.count("10.0.0.2") == 2  # the machine, and the pack on it
    for words in (
        "H100",
        "team vision",
        "all teams",
        "Xeon 8481C",
        f"/sweeps/{sweep_id}/packs/0/log",
        "2 / 4",
    ):
        assert words in page
    assert "100,000" in page
    assert "host:1" in page
    assert client.get("/cluster/live").text in page


def test_the_cluster_page_says_when_nobody_dispatches(client: TestClient, sqlite_engine: Engine) -> None:
    assert "Nothing trains: no dispatcher is running." in client.get("/cluster").text
    stage.announce(sqlite_engine)
    assert "Nothing trains" not in client.get("/cluster").text
    with write(sqlite_engine) as connection:
        connection.execute(update(dispatchers).values(seen_at=dispatchers.c.seen_at - 1000))
    assert "Nothing trains: no dispatcher is running." in client.get("/cluster").text


def test_the_cluster_page_is_bounded(
    client: TestClient, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "SHOWN_ROWS", 1)
    stage.busy_cluster(sqlite_engine)
    page = client.get("/cluster").text
    assert "and 2 more" in page  # machines
    assert "and 1 more" in page  # teams


# --- new sweeps ---


def offered_sweeps(page: str) -> dict[str, list[dict[str, Any]]]:
    """Return what each of the buttons submits, by its name."""
    buttons = re.findall(r"<button[^>]*aria-label=\"([^\"]*)\"[^>]*data-sweeps='([^']*)'>", page)
    return {unescape(label): json.loads(unescape(sweeps)) for label, sweeps in buttons}


def test_the_page_for_new_sweeps_offers_every_preset_in_two_sizes(client: TestClient) -> None:
    page = client.get("/new")
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    assert "form-action 'none'" in policy
    for element in ("<form", "<script>", "onclick"):
        assert element not in page.text
    offered = offered_sweeps(page.text)
    assert list(offered) == [f"Submit {size}: {name}" for name in PRESETS for size in ("quick", "full")]
    for name, preset in PRESETS.items():
        assert f"{preset.title} <code>{name}</code>" in unescape(page.text)
        for size in ("quick", "full"):
            documents = preset.documents(quick=size == "quick")
            sweeps = offered[f"Submit {size}: {name}"]
            assert {sweep["name"]: sweep["spec"] for sweep in sweeps} == documents


def test_the_page_counts_as_validate_does(client: TestClient) -> None:
    page = client.get("/new").text
    for label, submitted in offered_sweeps(page).items():
        size, name = label.removeprefix("Submit ").split(": ")
        found = [client.post(f"{SWEEPS}/validate", json=sweep["spec"]).json() for sweep in submitted]
        runs, updates, seconds = (
            sum(one[key] for one in found) for key in ("runs", "run_steps", "estimated_seconds")
        )
        words = f'id="size-{name}-{size}">{runs:,} runs, {updates:,} updates, {duration(seconds)}\n'
        assert words in page


def test_the_page_says_which_files_a_preset_needs(client: TestClient) -> None:
    articles = re.findall(
        r'<article class="preset" aria-labelledby="title-([^"]*)">(.*?)</article>',
        client.get("/new").text,
        re.DOTALL,
    )
    assert [name for name, _ in articles] == list(PRESETS)
    for name, article in articles:
        datasets = {document["dataset"] for document in PRESETS[name].documents().values()}
        assert ("Needs the files of" in article) == bool(datasets & set(FILE_READERS))
    assert "Needs the files of mnist</strong>" in dict(articles)["fig5"]


def test_what_a_button_submits_is_what_reproduce_submits(client: TestClient) -> None:
    (sweep,) = offered_sweeps(client.get("/new").text)["Submit quick: fig9"]
    headers = {"Idempotency-Key": sweep["key"], "Sec-Fetch-Site": "same-origin"}
    first = client.post(SWEEPS, json=sweep["spec"], headers=headers)
    again = client.post(SWEEPS, json=sweep["spec"], headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    with Client(f"http://{HOST}", InProcess(client)) as api, pytest.raises(SetupError, match="cancelled"):
        run(api, PRESETS["fig9"], lambda _, states: api.cancel(next(iter(states))["id"]), quick=True)
    (only,) = client.get(SWEEPS).json()["sweeps"]
    assert (only["id"], only["state"]) == (first.json()["id"], "cancelled")


def test_a_preset_that_is_too_large_here_says_why(sqlite_engine: Engine) -> None:
    database = sqlite_engine.url.render_as_string()
    app = create_app(Settings(database_url=database, slots=1, pack_memory=64 * 2**20))
    with TestClient(app, base_url=f"http://{HOST}") as client:
        page = client.get("/new").text
        full = client.post(f"{SWEEPS}/validate", json=PRESETS["fig5"].documents()["fig5"])
    assert full.status_code == 422
    assert f'<p class="problem">Full: {full.json()["detail"]}</p>' in unescape(page)
    assert "Submit full: fig5" not in offered_sweeps(page)
    assert "Submit full: fig4a" in offered_sweeps(page)


def test_a_presets_words_are_escaped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\"'><script>alert(1)</script>"
    preset = Preset("evil", evil, ("fig9",), {"name": evil})
    monkeypatch.setattr(offers, "PRESETS", {"evil": preset})
    state = client.app.state  # type: ignore[attr-defined]
    monkeypatch.setattr(state, "offers", offers.every(state.settings), raising=False)
    page = client.get("/new").text
    assert "<script>" not in page
    assert offered_sweeps(page)["Submit quick: evil"][0]["spec"]["name"] == evil


def text_area(page: str) -> str:
    # A line break just behind the tag is no part of the text.
    (text,) = re.findall(r'<textarea id="own-spec"[^>]*>\n(.*?)</textarea>', page, re.DOTALL)
    return unescape(text)


def test_a_spec_of_ones_own_begins_as_any_of_the_presets(client: TestClient) -> None:
    page = client.get("/new").text
    for name in {name for preset in PRESETS.values() for name in preset.sweeps}:
        assert f'href="/new?spec={name}#own"' in page
        text = text_area(client.get(f"/new?spec={name}").text)
        written = presets.FOLDER / f"{name}.yaml"
        assert written.is_file() != (name in presets.VARIANTS)
        if written.is_file():
            assert text.encode() == written.read_bytes()
        assert parse_yaml(text.encode()) == presets.spec(name)


def test_a_spec_of_ones_own_begins_as_the_first_if_none_is_named(client: TestClient) -> None:
    assert parse_yaml(text_area(client.get("/new").text).encode()) == presets.spec("fig4a-sgd")


@pytest.mark.parametrize("name", ["fig7", "", "../presets/fig9", "%00", "fig9.yaml"])
def test_no_other_file_is_shown(client: TestClient, name: str) -> None:
    assert client.get(f"/new?spec={name}").status_code == 404


def test_the_page_for_new_sweeps_is_linked(client: TestClient) -> None:
    page = client.get("/").text
    assert 'class="button" href="/new"' in page
    assert '<a href="/new">New sweep</a>' in client.get("/cluster").text
    for script in re.findall(r'<script src="([^"]*)"', client.get("/new").text):
        assert client.get(script).status_code == 200


# --- other sites' pages ---

FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none, cross-site"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": f"http://{HOST}.evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": f"ftp://{HOST}"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site", "Origin": f"http://{HOST}"},
]
OWN = [
    {},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": f"http://{HOST}"},
    {"Sec-Fetch-Site": "same-origin", "Origin": f"http://{HOST}"},
    # A proxy may speak TLS before us, and leave the default port out.
    {"Origin": "https://127.0.0.1", "Host": "127.0.0.1"},
    {"Origin": "https://LOCALHOST", "Host": "localhost:443"},
    {"Origin": "http://[::1]:8321", "Host": "[::1]:8321"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_changes_nothing(
    client: TestClient, sqlite_engine: Engine, headers: dict[str, str]
) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    calls = [
        ("POST", f"{SWEEPS}/{sweep_id}/cancel"),
        ("POST", SWEEPS),
        ("POST", f"{SWEEPS}/validate"),
        ("PUT", "/api/v1/teams/evil"),
        ("DELETE", f"{SWEEPS}/{sweep_id}"),
        ("PATCH", f"{SWEEPS}/{sweep_id}"),
        ("POST", "/nothing"),
    ]
    for method, path in calls:
        answer = client.request(method, path, json={"weight": 1}, headers=headers)
        assert answer.status_code == 403
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json() == {
            "type": "about:blank",
            "title": "Forbidden",
            "status": 403,
            "detail": f"{method} {path}: asked for by a page of another site",
        }
    assert client.get(f"{SWEEPS}/{sweep_id}", headers=headers).json()["state"] == "queued"
    assert len(client.get("/api/v1/teams").json()["teams"]) == 1


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_own_pages_and_programs_may(
    client: TestClient, sqlite_engine: Engine, headers: dict[str, str]
) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    answer = client.post(f"{SWEEPS}/{sweep_id}/pause", headers=headers)
    assert answer.status_code == 200
    assert answer.json()["state"] == "paused"


def test_a_second_origin_does_not_help(client: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    headers = [("Origin", f"http://{HOST}"), ("Origin", "https://evil.example")]
    answer = client.post(f"{SWEEPS}/{sweep_id}/pause", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 403
