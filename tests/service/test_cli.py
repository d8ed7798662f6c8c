"""The command line, against the API in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.app import create_app
from service.cli import main
from service.client import Client
from service.config import Settings
from service.results import plots
from service.results.statistics import Heatmap
from tests.conftest import ALONE
from tests.service import stage

URL = "http://127.0.0.1"


class InProcess(httpx.BaseTransport):
    """Hands requests to the application."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.client.request(
            request.method, str(request.url), content=request.read(), headers=request.headers
        )
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)


@pytest.fixture
def api(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The API, behind the command line's client."""
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))
    with TestClient(app, base_url=URL) as client:
        monkeypatch.setattr(main, "_client", lambda: Client(URL, InProcess(client)))
        yield client


@pytest.fixture
def sweep_id(api: TestClient, small_spec: dict[str, Any]) -> str:
    """A sweep of two grids."""
    other = small_spec["grids"][0] | {"baseline": "ekfac", "options": {"damping": 0.5}}
    small_spec["grids"].append(other)
    return str(api.post("/api/v1/sweeps", json=small_spec).json()["id"])


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run what must fail in the whole program; return its exit code and its one line."""
    monkeypatch.setattr("sys.argv", ["ddpsweep", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    (line,) = capsys.readouterr().err.splitlines()
    return f"{left.value.code} {line}"


def words(text: str) -> list[list[str]]:
    """Return a table's rows by their words."""
    return [line.split() for line in text.splitlines()]


def test_show_tells_the_grids_apart(sweep_id: str) -> None:
    shown = run("show", sweep_id)
    assert "DDPNOpt vs SGD: training loss" in shown
    assert "DDPNOpt vs EKFAC: test accuracy (percent points)\ndamping 0.5\n" in shown


def test_validate_speaks_of_all_grids(sweep_id: str, tmp_path: Path, small_spec: dict[str, Any]) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(small_spec))
    assert run("validate", str(path)).startswith("36 runs in 2 packs, 144 run-steps")


def test_heatmap_takes_all_grids_unless_told(
    sweep_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Heatmap]] = []
    monkeypatch.setattr(plots, "save", lambda panels, path: (drawn.append(panels), path.touch()))
    for choice in ([], ["--baseline", "ekfac"], ["--grid", "0", "--metric", "test_loss"]):
        run("heatmap", sweep_id, "--out", str(tmp_path / "a.png"), *choice)
    assert [[(panel.metric, panel.baseline) for panel in panels] for panels in drawn] == [
        [(metric, name) for metric in ("train_loss", "accuracy") for name in ("sgd", "ekfac")],
        [("train_loss", "ekfac"), ("accuracy", "ekfac")],
        [("test_loss", "sgd")],
    ]
    run("heatmap", sweep_id, "--out", str(tmp_path / "a.json"), "--metric", "accuracy")
    answers = json.loads((tmp_path / "a.json").read_text())
    assert [(answer["baseline"], answer["setting"]) for answer in answers] == [
        ("sgd", ""),
        ("ekfac", "damping 0.5"),
    ]


@pytest.fixture
def mixed_id(api: TestClient, small_spec: dict[str, Any]) -> str:
    """A sweep of a grid with cells and four without."""
    return str(api.post("/api/v1/sweeps", json=small_spec | {"grids": ALONE}).json()["id"])


@pytest.fixture
def lone_id(api: TestClient, small_spec: dict[str, Any]) -> str:
    """A sweep without any cells."""
    return str(api.post("/api/v1/sweeps", json=small_spec | {"grids": ALONE[3:]}).json()["id"])


def test_show_summarises_grids_without_cells(mixed_id: str) -> None:
    titles = [line for line in run("show", mixed_id).splitlines() if ": t" in line]
    assert titles == [
        "DDPNOpt vs SGD: training loss",
        "DDPNOpt vs SGD: test accuracy (percent points)",
        *(
            f"{name}: {metric}"
            for name in ("Adam", "SGD-VGR", "E-MSA", "Vanilla DDP")
            for metric in ("training loss", "test accuracy (%)")
        ),
    ]


def test_a_summary(
    mixed_id: str,
    sqlite_engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = run("summary", mixed_id)
    assert shown.count("training loss") == shown.count("test accuracy (%)") == 5
    assert "E-MSA: training loss\nlbfgs_steps 2\n" in shown
    one = run("summary", mixed_id, "--grid", "2", "--metric", "accuracy")
    assert one.startswith("SGD-VGR: test accuracy (%)\n")
    assert one.count("baseline") == 2
    answer = json.loads(run("summary", mixed_id, "--baseline", "emsa", "--metric", "test_loss", "--json"))
    assert [(row["grid"], row["n_total"]) for row in answer["rows"]] == [(3, 3)]
    answers = json.loads(run("summary", mixed_id, "--json"))
    assert [answer["metric"] for answer in answers] == ["train_loss", "accuracy"]
    assert refused(capsys, monkeypatch, "summary", mixed_id, "--grid", "9").startswith("2 error: grid: got 9")


def test_a_heatmap_leaves_out_what_has_no_cells(
    mixed_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("png", "svg", "pdf", "html", "json"):
        path = tmp_path / f"a.{suffix}"
        done = CliRunner().invoke(main.app, ["heatmap", mixed_id, "--out", str(path)])
        assert (done.exit_code, done.stdout) == (0, f"{path}\n")
        told = done.stderr.splitlines()
        assert [line.partition(" trains")[0] for line in told] == [
            "grid 1 (adam)",
            "grid 2 (sgd_vgr)",
            "grid 3 (emsa)",
            "grid 4 (vanilla_ddp)",
        ]
        assert told[2].endswith(f"has no heatmap: `ddpsweep summary {mixed_id} --grid 3`")
        assert path.stat().st_size > 0
    assert {answer["baseline"] for answer in json.loads(path.read_text())} == {"sgd"}
    line = refused(capsys, monkeypatch, "heatmap", mixed_id, "--grid", "3", "--out", str(path))
    assert line.startswith("2 error: grid: got 3; allowed: one of 0 (sgd): a heatmap compares DDPNOpt with")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "html", "json"])
def test_a_sweep_without_cells_is_summarised_in_place_of_a_picture(
    lone_id: str, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    done = CliRunner().invoke(main.app, ["heatmap", lone_id, "--out", str(path), "--metric", "accuracy"])
    assert done.exit_code == 0
    assert done.stderr == (
        f"sweep {lone_id} has no heatmap, since no grid of it trains DDPNOpt: here is its summary\n"
    )
    assert done.stdout == run("summary", lone_id, "--metric", "accuracy")
    assert not path.exists()


def test_watching_a_sweep_without_cells(
    api: TestClient, sqlite_engine: Engine, small_spec: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(small_spec | {"grids": ALONE[3:]}))
    assert run("validate", str(path)).startswith("6 runs in 4 packs, 24 run-steps")
    sweep_id = run("submit", str(path)).strip()
    for lease in stage.running(sqlite_engine, 4):
        stage.finish(sqlite_engine, lease)
    assert "6/6 runs" in run("watch", sweep_id)
    assert "6/6" in run("show", sweep_id)


def test_cancel_pause_resume_retry(
    sweep_id: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("pause", sweep_id) == f"{sweep_id} paused\n"
    assert run("pause", sweep_id) == f"{sweep_id} paused\n"
    assert run("resume", sweep_id) == f"{sweep_id} queued\n"
    assert run("cancel", sweep_id) == f"{sweep_id} cancelled\n"
    line = refused(capsys, monkeypatch, "resume", sweep_id)
    assert line == f"1 error: sweep {sweep_id} is cancelled: it cannot resume"
    assert json.loads(run("retry", sweep_id, "--json"))["state"] == "queued"
    assert refused(capsys, monkeypatch, "pause", "nothere") == "1 error: no sweep 'nothere'"


def test_watching_a_cancelled_sweep_fails_with_a_line(
    api: TestClient,
    sqlite_engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    run("cancel", sweep_id)
    assert refused(capsys, monkeypatch, "watch", sweep_id) == f"1 error: sweep {sweep_id} cancelled"
    failed = stage.failed_sweep(sqlite_engine)
    assert refused(capsys, monkeypatch, "watch", failed) == f"1 error: sweep {failed} failed: {stage.CAUSE}"


def test_submit_for_a_team(
    api: TestClient,
    small_spec: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(small_spec))
    run("team", "set", "vision")
    sweep_id = run("submit", str(path), "--team", "vision").strip()
    for listed in (run("list"), run("show", sweep_id)):
        assert [sweep_id, "small", "vision", "queued", "0/18", "0", "0"] in [row[:7] for row in words(listed)]
    line = refused(capsys, monkeypatch, "submit", str(path), "--team", "nobody")
    assert line == "1 error: no team 'nobody'"


def test_packs(
    api: TestClient,
    sqlite_engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    header, first, second = words(run("packs", sweep_id))
    assert header == ["pack", "state", "runs", "step", "attempts", "node", "device-seconds", "error"]
    assert first == ["0", "completed", "18", "4/4", "1", "10.0.0.2", "0.0"]
    assert " ".join(second) == f"1 failed 18 2/4 1 10.0.0.2 0.0 {stage.CAUSE}"
    (pack,) = json.loads(run("packs", sweep_id, "--state", "failed", "--json"))
    assert (pack["pack"], pack["error"]) == (1, stage.CAUSE)
    assert refused(capsys, monkeypatch, "packs", sweep_id, "--state", "odd").startswith("2 error: state: got")


def test_logs(
    api: TestClient,
    sqlite_engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep_id = stage.failed_sweep(sqlite_engine)
    shown = run("logs", sweep_id)
    assert shown.startswith(f"== pack 1, attempt 1: failed: {stage.CAUSE}\n2 of 4 steps\nline 0\n")
    # What a terminal would obey is gone, and the traceback follows, since the log has none.
    assert shown.endswith(f"line 29\nout of memory <b>\n{stage.DETAIL}\n")
    assert run("logs", sweep_id, "--pack", "1", "--attempt", "1") == shown
    assert run("logs", sweep_id, "--pack", "0") == "== pack 0, attempt 1: completed\n2 of 4 steps\n"
    untouched = stage.submit(sqlite_engine, "a", "sgd", "adam")
    assert [row[:2] for row in words(run("logs", untouched))[1:]] == [["0", "queued"], ["1", "queued"]]
    for arguments, line in (
        ((sweep_id, "--attempt", "1"), "2 error: --attempt: needs --pack"),
        ((sweep_id, "--pack", "7"), f"1 error: sweep {sweep_id} has no pack 7"),
        ((sweep_id, "--pack", "0", "--attempt", "2"), f"1 error: sweep {sweep_id}: no attempt 2 at pack 0"),
        ((untouched, "--pack", "0"), f"1 error: sweep {untouched}: no attempt at pack 0"),
    ):
        assert refused(capsys, monkeypatch, "logs", *arguments) == line


def test_many_logs_are_cut(api: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", *["sgd"] * (main.LOGS_SHOWN + 2))
    for lease in stage.running(sqlite_engine, main.LOGS_SHOWN + 2):
        stage.give_up(sqlite_engine, lease, "#" * 9000)
    shown = run("logs", sweep_id)
    assert shown.count("== pack ") == main.LOGS_SHOWN
    assert shown.count("#") == main.LOGS_SHOWN * main.LOG_EXCERPT
    assert shown.endswith(f"2 more packs failed: `ddpsweep packs {sweep_id} --state failed`\n")


def test_cluster(api: TestClient, sqlite_engine: Engine) -> None:
    assert run("cluster").startswith("nothing trains: no dispatcher is running\n")
    sweep_id = stage.busy_cluster(sqlite_engine)
    shown = run("cluster")
    assert shown.startswith("dispatchers: 1\n")
    rows = words(shown)
    assert ["10.0.0.3", "gpu", "H100", "vision", "2"] in rows
    running = [sweep_id, "busy", "vision", "0", "10.0.0.2", "Xeon", "8481C", "2/4"]
    assert running in [row[:-1] for row in rows]
    assert ["vision", "2", "8", "100000", "1", "1", "0.0", "0"] in rows
    assert set(json.loads(run("cluster", "--json"))) == {"dispatchers", "nodes", "packs", "teams"}


def test_teams(api: TestClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("team", "set", "vision", "--weight", "2", "--max-devices", "1.5", "--max-queued-runs", "1000")
    # What is not given stays.
    run("team", "set", "vision", "--weight", "3")
    assert [row[:4] for row in words(run("team", "list"))[1:]] == [
        ["default", "1", "none", "none"],
        ["vision", "3", "1.5", "1000"],
    ]
    run("team", "set", "vision", "--max-devices", "none")
    team = json.loads(run("team", "list", "--json"))[1]
    assert (team["weight"], team["max_devices"], team["max_queued_runs"]) == (3, None, 1000)
    assert json.loads(run("team", "set", "vision", "--json"))["name"] == "vision"
    for arguments, line in (
        (
            ("vision", "--max-devices", "nan"),
            "--max-devices: got 'nan'; allowed: a number, or none for no limit",
        ),
        (("vision", "--max-queued-runs", "1.5"), "--max-queued-runs: got '1.5'; allowed: a whole number, or"),
        (("vision", "--max-devices", "-1"), "max_devices: got -1"),
        (("Vision",), "team: got 'Vision'; allowed: small letters, digits and dashes"),
    ):
        found = refused(capsys, monkeypatch, "team", "set", *arguments)
        assert found.startswith(f"2 error: {line}")


def test_a_log_cannot_speak_to_the_terminal(api: TestClient, sqlite_engine: Engine) -> None:
    sweep_id = stage.submit(sqlite_engine, "a", "sgd")
    (lease,) = stage.running(sqlite_engine, 1)
    stage.give_up(sqlite_engine, lease, "\x1b]0;title\x07one\rtwo\x1b[2J\x08\n")
    assert "\none\ntwo\n" in run("logs", sweep_id)
