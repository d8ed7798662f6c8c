"""Presets run as anybody's sweeps, and the report of them; the sweeps here are tiny."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from ddpnopt.pack import cost
from service.app import create_app
from service.client import Client
from service.config import Settings
from service.errors import InvalidInputError, SetupError
from service.paper import presets, report
from service.paper.build import BUILDERS
from service.paper.presets import PRESETS, Preset
from service.paper.results import Results, stacked
from service.paper.run import run
from service.paper.spectra import Spectra
from service.paper.vanishing import Line
from service.sweeps.documents import parse_spec
from tests.conftest import SMALL_SPEC
from tests.service.test_cli import URL, InProcess
from tests.service.test_reuse import train

TINY = {"steps": 4, "batch_size": 16, "eval_every": 2}


@pytest.fixture
def client(sqlite_engine: Engine) -> Iterator[Client]:
    app = create_app(Settings(database_url=sqlite_engine.url.render_as_string()))  # type: ignore[arg-type]
    with TestClient(app, base_url=URL) as api, Client(URL, InProcess(api)) as client:
        yield client


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every preset's specs be those of its axes and probes, on WINE, for four steps and two seeds."""
    whole = presets.spec

    def small(name: str) -> dict[str, Any]:
        document = whole(name)
        kept = {key: copy.deepcopy(document[key]) for key in ("name", "grids", "probes") if key in document}
        small = SMALL_SPEC | kept | {"seeds": 2, "training": TINY}
        if name.startswith(("fig3", "table4")):  # whose sweeps differ in their sizes alone
            hidden, batch = document["model"]["hidden"], document["training"]["batch_size"]
            small["model"] = SMALL_SPEC["model"] | {"hidden": [2 + hidden[0] // 32] * len(hidden)}
            small["training"] = TINY | {"batch_size": 4 + batch // 16}
        return small

    monkeypatch.setattr(presets, "spec", small)
    for name, value in {"FIRST": 1, "LEAST": 1, "LONGEST_S": 0.0}.items():
        monkeypatch.setattr(cost, name, value)


def last(_: str, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    *_, end = states
    return end


def done(client: Client, engine: Engine, preset: Preset) -> Results:
    """Run a preset: submit, train, and take what is there."""

    def trained(name: str, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        train(engine, rounds=400)
        return last(name, states)

    return run(client, preset, trained)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_specs_and_have_a_builder(name: str) -> None:
    preset = PRESETS[name]
    assert name in BUILDERS
    full, quick = (preset.documents(quick=q) for q in (False, True))
    assert set(full) == set(quick) == set(preset.sweeps)
    updates = [
        sum(spec.runs_total() * spec.training.steps for spec in map(parse_spec, documents.values()))
        for documents in (quick, full)
    ]
    assert updates[0] < updates[1]


def test_fig4a_is_600_runs_over_the_axes_of_the_tables() -> None:
    specs = [parse_spec(document) for document in PRESETS["fig4a"].documents().values()]
    assert sum(spec.runs_total() for spec in specs) == 600
    assert sum(parse_spec(d).runs_total() for d in PRESETS["fig9"].documents().values()) == 200


def test_quick_changes_keys_of_the_training_one_by_one() -> None:
    preset = Preset("x", "X", ("fig9",), {"seeds": 2, "training": {"steps": 7}})
    (document,) = preset.documents(quick=True).values()
    assert (document["seeds"], document["training"]) == (2, {"steps": 7, "batch_size": 8})
    assert preset.documents()["fig9"]["training"]["steps"] == 1500


def test_there_is_no_such_preset() -> None:
    with pytest.raises(InvalidInputError, match=r"one of fig3, .*, or all"):
        presets.get("fig7")


@pytest.mark.usefixtures("tiny")
def test_the_same_preset_again_takes_the_sweeps_that_are_there(client: Client, sqlite_engine: Engine) -> None:
    first = done(client, sqlite_engine, PRESETS["fig4a"])
    again = run(client, PRESETS["tables9-10"], last)  # the same specs
    assert {n: s["id"] for n, s in first.sweeps.items()} == {n: s["id"] for n, s in again.sweeps.items()}
    assert "--quick" in replace(again, quick=True).notes()[0]
    assert len(client.sweeps()) == 3


@pytest.mark.usefixtures("tiny")
def test_what_was_cancelled_or_paused_goes_on(client: Client, sqlite_engine: Engine) -> None:
    preset = PRESETS["fig9"]
    with pytest.raises(SetupError, match=r"\(fig9\) cancelled"):
        run(client, preset, lambda _, states: client.cancel(next(iter(states))["id"]))
    (sweep,) = client.sweeps()
    assert sweep["state"] == "cancelled"
    states = []
    with pytest.raises(SetupError):
        run(client, preset, lambda _, s: states.append(next(iter(s))["state"]) or client.pause(sweep["id"]))
    assert states == ["queued"]
    assert done(client, sqlite_engine, preset).sweeps["fig9"]["state"] == "completed"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", PRESETS)
def test_the_report_of_a_preset(name: str, client: Client, sqlite_engine: Engine, tmp_path: Path) -> None:
    section = BUILDERS[name](done(client, sqlite_engine, PRESETS[name]))
    written = report.save([section], tmp_path / "report")
    assert section.findings
    assert all(path.stat().st_size > 0 for path in written)
    drawn = {f"{picture.name}.png" for picture in section.pictures}
    assert {path.name for path in written} >= {"report.html", "report.pdf"} | drawn
    page = (tmp_path / "report" / "report.html").read_text()
    assert section.title in page
    assert page.count("data:image/png;base64,") == len(section.pictures)
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing comes from elsewhere
    for table in section.tables:
        with (tmp_path / "report" / f"{table.name}.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == table.columns
        assert len(rows) == len(table.rows) > 0
    assert "wine" in section.notes[0]
    assert "--quick" not in page


@pytest.mark.usefixtures("tiny")
def test_the_tables_hold_what_the_heatmaps_say(client: Client, sqlite_engine: Engine) -> None:
    results = done(client, sqlite_engine, PRESETS["fig4a"])
    section = BUILDERS["fig4a"](results)
    (table,) = [table for table in section.tables if table.name == "fig4a-train-loss"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert len(rows) == 48
    panel = client.heatmap(results.sweeps["fig4a-ekfac"]["id"], metric="train_loss")
    for row, cell in zip(rows[32:], panel.cells, strict=True):
        assert (row["baseline"], row["learning_rate"], row["vxx_reg"]) == (
            "ekfac",
            cell.learning_rate,
            cell.vxx_reg,
        )
        assert (row["improvement"], row["n"]) == (cell.improvement, cell.n)
    assert rows[0]["paper_baseline"] == 0.1974
    positive = sum((row["improvement"] or 0) > 0 for row in rows)
    assert section.findings[0].startswith(f"training loss: DDPNOpt is better in {positive} of 48 cells")


def spectra(*values: list[list[float]]) -> Spectra:
    """Of runs on 2 clusters, recorded at steps 0, 5 and 10."""
    return Spectra("mmc", 2, (0, 5, 10), np.array(values), tuple(range(len(values))))


def test_the_criterion_of_fig8() -> None:
    good = [[1.0, 0.5, 1e-9], [1.0, 1e-5, 0.0], [2.0, 1.0, 1e-7]]
    assert spectra(good, good).counts_match()
    assert spectra(good).grow()
    one_more, one_less = ([*good[:2], [2.0, 1.0, 1e-5]], [*good[:2], [2.0, 1e-6, 0.0]])
    for wrong in (one_more, one_less):
        assert not spectra(good, wrong).counts_match()
    shrinking = [good[0], [3.0, 1.0, 0.0], good[2]]
    assert not spectra(good, shrinking).grow()


def test_a_curve_that_breaks_off_has_no_end() -> None:
    """Also where all of them break off: else the last loss before would count as the end."""
    spec = parse_spec(SMALL_SPEC | {"training": TINY}).model_dump(mode="json")
    broken = [{"values": [10.0, 0.1]}, {"values": [10.0]}]
    steps, losses = stacked(spec, "train_loss", broken)
    assert steps.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(losses, [[10.0, 0.1, np.nan], [10.0, np.nan, np.nan]])
    line = Line("DDPNOpt", 0.1, steps, losses, None, 10.0)
    assert (line.escaped(), line.diverged(), line.final()) == (0, 2, None)
    out = Line("DDPNOpt", 0.1, steps, np.array([[10.0, 9.5, 8.9], [10.0, 9.5, 9.1]]), None, 10.0)
    assert (out.escaped(), out.diverged(), out.final()) == (1, 0, 9.0)
