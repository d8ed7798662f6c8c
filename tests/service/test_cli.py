"""The command line's pictures, against the API in this process."""

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
def sweep_id(
    sqlite_engine: Engine, small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A sweep of two grids, behind the command line's client."""
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))
    other = small_spec["grids"][0] | {"baseline": "ekfac", "options": {"damping": 0.5}}
    small_spec["grids"].append(other)
    with TestClient(app, base_url=URL) as client:
        monkeypatch.setattr(main, "_client", lambda: Client(URL, InProcess(client)))
        yield client.post("/api/v1/sweeps", json=small_spec).json()["id"]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


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
