"""Presets run as anybody's sweeps, and the report of them; the sweeps here are tiny."""

from __future__ import annotations

import copy
import csv
import re
import sys
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
from service.paper.accuracies import Candidate, line, rank
from service.paper.build import BUILDERS, REMARKS, build, remarks
from service.paper.costs import Cost, fitted
from service.paper.presets import PRESETS, Preset
from service.paper.results import Results, stacked
from service.paper.run import run
from service.paper.spectra import Spectra
from service.paper.vanishing import Line
from service.results.statistics import SummaryRow
from service.sweeps.documents import parse_spec, parse_yaml
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
    assert "://" not in page.replace("http://www.w3.org", "")  # nothing comes from elsewhere
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
    ends = np.array([[10.0, 9.5, 8.9], [10.0, 9.5, 9.1], [10.0, 9.5, 1e6]])
    out = Line("DDPNOpt", 0.1, steps, ends, None, 10.0)
    assert (out.escaped(), out.diverged(), out.blown(), out.final()) == (1, 0, 1, 9.0)


def test_remarks_are_of_presets_and_name_files_that_are_there() -> None:
    root = Path(__file__).parents[2]
    groups = parse_yaml(REMARKS.read_bytes())["groups"]
    assert {name for group in groups for name in group["presets"]} <= set(PRESETS)
    told = " ".join(text for name in PRESETS for text in remarks(name))
    for name in re.findall(r"(?:docs|examples|benchmarks)/[\w/.-]+\w", told):
        assert (root / name).is_file(), name


def test_variants_differ_from_their_base_in_what_they_say() -> None:
    for name, (base, changes) in presets.VARIANTS.items():
        document, original = presets.spec(name), presets.spec(base)
        assert document["name"] == name
        for key in ("training", "model"):
            assert document[key] == original[key] | changes.get(key, {})
        other = {key for key in document if document[key] != original[key]}
        assert other <= {"name", *changes}


def test_a_sweep_whose_data_are_not_there_is_left_out_and_named(
    client: Client, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DDPSWEEP_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pooch", None)  # nothing is fetched
    names = {"table3-wine": "wine", "table3-svhn-cnn": "svhn"}
    whole = presets.spec
    monkeypatch.setattr(
        presets, "spec", lambda name: whole(name) | {"seeds": 2, "training": TINY | {"steps": 2}}
    )
    preset = Preset("table3", "Table 3", tuple(names), {})
    results = done(client, sqlite_engine, preset)
    assert set(results.sweeps) == {"table3-wine"}
    section = build(results)
    assert re.match("table3-svhn-cnn did not run: svhn: found no train_32x32.mat", section.findings[-1])
    (table, _) = section.tables
    assert {row[1] for row in table.rows} == {"wine"}
    alone = build(replace(results, sweeps={}))
    assert alone.findings == section.findings[-1:]
    assert section.remarks
    # The files may be there the next time: it is tried again.
    assert done(client, sqlite_engine, preset).missing == results.missing
    (sweep,) = [sweep for sweep in client.sweeps() if sweep["name"] == "table3-svhn-cnn"]
    assert sweep["state"] == "failed"


def row(rate: float, mean: float | None, diverged: int = 0, **changes: Any) -> SummaryRow:
    values = {"grid": 0, "baseline": "adam", "setting": "", "method": "baseline", "vxx_reg": None, "n": 3}
    values |= {"n_ended": 3, "n_total": 3, "sd": None, "ci_low": None, "ci_high": None, "min": None}
    values |= {"max": None, "learning_rate": rate, "mean": mean, "n_diverged": diverged}
    return SummaryRow(**values | changes)


def candidate(method: str, rate: float, loss: float | None, accuracy: float, diverged: int = 0) -> Candidate:
    return Candidate(method, row(rate, loss, diverged), row(rate, accuracy, diverged), 10, 4)


def test_the_best_setting_of_table3_is_that_of_the_least_training_loss() -> None:
    candidates = [
        candidate("adam", 0.1, 0.5, 99.0),
        candidate("adam", 0.2, 0.4, 95.0),
        candidate("adam", 0.3, 0.1, 97.0, diverged=1),
        candidate("adam", 0.4, None, 97.0),
        candidate("ddpnopt", 0.1, 0.2, 96.0),
    ]
    found = line("fcn", "digits", candidates)
    assert {name: one.loss.learning_rate for name, one in found.best.items()} == {"adam": 0.2, "ddpnopt": 0.1}
    assert found.ours() == {"adam": 95.0, "ddpnopt": 96.0}
    assert found.paper["adam"] == 94.98
    assert rank({"a": 1.0, "b": 3.0, "c": 3.0}, "a") == 3
    assert rank({"a": 1.0, "b": 3.0, "c": 3.0}, "c") == 1


def test_exponents_are_fitted_where_nothing_else_differs() -> None:
    def cost_of(batch: int, width: int, seconds: float) -> Cost:
        return Cost("adam", "adam", {"B": batch, "X": width, "L": 3}, seconds, 1.0)

    costs = [cost_of(n, 8, 0.01 * n**1.5) for n in (16, 32, 64)] + [cost_of(16, 16, 9.0)]
    growth = fitted(costs, "Adam", "adam", "seconds", "B")
    assert growth is not None
    assert growth.sizes == (16, 32, 64)
    assert growth.exponent == pytest.approx(1.5)
    width = fitted(costs, "Adam", "adam", "seconds", "X")
    assert width is not None
    assert width.exponent == pytest.approx(np.log2(9.0 / (0.01 * 16**1.5)))
    assert fitted(costs, "Adam", "adam", "seconds", "L") is None


@pytest.mark.usefixtures("tiny")
def test_costs_stand_beside_those_of_the_baseline(client: Client, sqlite_engine: Engine) -> None:
    section = BUILDERS["fig3"](done(client, sqlite_engine, PRESETS["fig3"]))
    (table,) = section.tables
    methods = {row[0] for row in table.rows}
    assert methods == {"Adam", "EKFAC", "E-MSA", "DDPNOpt (Adam)", "DDPNOpt (EKFAC)", "Vanilla DDP"}
    assert all(row[-2] > 0 and row[-1] > 0 for row in table.rows)
    assert any(finding.startswith("DDPNOpt (EKFAC) against EKFAC: ") for finding in section.findings)
