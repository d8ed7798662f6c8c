"""Presets run as anybody's sweeps, and the report of them; the sweeps here are tiny."""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import Engine
from starlette.testclient import TestClient
from torch import Tensor

from ddpnopt.config import RunConfig
from ddpnopt.pack import cost
from ddpnopt.pack.engine import Curves, Trainer
from ddpnopt.pack.part import Part
from service.app import create_app
from service.cli import display, reproduction
from service.client import Client
from service.config import Settings
from service.errors import InvalidInputError, SetupError
from service.paper import presets, report
from service.paper.accuracies import Candidate, line, rank, ties
from service.paper.build import BUILDERS, REMARKS, build, remarks
from service.paper.costs import Cost, fitted
from service.paper.policies import likeness
from service.paper.presets import PRESETS, Preset
from service.paper.results import Results, stacked
from service.paper.run import run
from service.paper.sections import Section, Table
from service.paper.spectra import Spectra
from service.paper.training import compared
from service.paper.vanishing import Line, agreement, told_apart
from service.results.statistics import SummaryRow
from service.sweeps.documents import parse_spec, parse_yaml
from tests.conftest import SMALL_SPEC
from tests.service.test_cli import URL, InProcess, refused
from tests.service.test_cli import run as run_cli
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


def in_the_paper(name: str) -> tuple[str, int]:
    """Sort figures before tables, by their numbers."""
    kind, number = re.fullmatch(r"(fig|table)s?(\d+).*", name).groups()  # type: ignore[union-attr]
    return kind, int(number)


def done(client: Client, engine: Engine, preset: Preset, *, quick: bool = False) -> Results:
    """Run a preset: submit, train, and take what is there."""

    def trained(name: str, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        train(engine, rounds=400)
        return last(name, states)

    return run(client, preset, trained, quick=quick)


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
    assert "--quick" in build(replace(again, quick=True)).findings[0]
    assert not any("--quick" in said for said in build(again).findings)
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


LOST: dict[str, tuple[Callable[[RunConfig], bool], int]] = {
    "all at once": (lambda run: True, 0),
    "all on the way": (lambda run: True, 2),
    "every second": (lambda run: run.seed == 0, 2),
    "DDPNOpt at the end": (lambda run: run.optimizer.method == "ddpnopt", 4),
}
"""Which runs diverge, and from which point of the curves on."""


def let_diverge(monkeypatch: pytest.MonkeyPatch, diverges: Callable[[RunConfig], bool], at: int) -> None:
    """Let runs leave the finite numbers at a point of the curves."""
    take = Trainer._take

    def lose(self: Trainer, curves: Curves, measure: Callable[[Part], Tensor]) -> None:
        def measured(part: Part) -> Tensor:
            values = measure(part).clone()
            if self.step >= at:
                values[[row for row, place in enumerate(part.index) if diverges(self.runs[place])]] = (
                    torch.nan
                )
            return values

        take(self, curves, measured)

    monkeypatch.setattr(Trainer, "_take", lose)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        *((name, lost) for name in PRESETS for lost in ("all on the way", "every second")),
        *((name, "all at once") for name in ("fig4a", "fig4b", "fig5", "fig8", "fig12")),
        *((name, "DDPNOpt at the end") for name in ("fig4b", "fig5", "fig8", "tables6-8")),
    ],
)
def test_the_report_of_runs_that_diverged(
    name: str,
    lost: str,
    client: Client,
    sqlite_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Divergence is a result: nothing may fail where runs have no end."""
    let_diverge(monkeypatch, *LOST[lost])
    results = done(client, sqlite_engine, PRESETS[name])
    assert sum(sweep["progress"]["runs_diverged"] for sweep in results.sweeps.values()) > 0
    section = build(results)
    assert section.findings
    assert not [found for found in section.findings if re.search(r"\b(nan|inf|None)\b", found)]
    assert report.save([section], tmp_path / "report")


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
    found = sum(row["q_value"] is not None and row["q_value"] < 0.05 for row in rows)
    assert section.findings[0].endswith(f" {found} cells differ.")


@pytest.mark.usefixtures("tiny")
def test_fig6_shows_one_learning_rate_of_each_method_of_fig12(client: Client, sqlite_engine: Engine) -> None:
    results = done(client, sqlite_engine, PRESETS["fig12"])
    chosen, every = (
        {row[1:3] for row in BUILDERS[name](results).tables[0].rows} for name in ("fig6", "fig12")
    )
    assert chosen == {("SGD-VGR", 0.1), ("EKFAC", 0.01), ("DDPNOpt", 0.01), ("DDPNOpt2nd", 0.01)}
    assert chosen < every


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


@pytest.mark.usefixtures("tiny")
def test_runs_that_diverged_are_left_out_of_the_spectra_and_counted(
    client: Client, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_diverge(monkeypatch, *LOST["every second"])
    section = build(done(client, sqlite_engine, PRESETS["fig8"]))
    assert all(finding.endswith("; DDPNOpt runs that diverged: 1.") for finding in section.findings)
    (table,) = section.tables
    assert {row[2] for row in table.rows} == {1}  # the other seed


def test_the_spread_is_compared_where_two_runs_have_an_end() -> None:
    steps = np.array([0, 5])

    def said(baseline: list[float], ddpnopt: list[float]) -> str:
        curves = {
            name: (steps, np.array([[1.0, end] for end in ends]))
            for name, ends in (("baseline", baseline), ("ddpnopt", ddpnopt))
        }
        finding = compared("sgd", "accuracy", curves)
        return finding.removeprefix("SGD at learning rate 0.6, ε 0.001, test accuracy (%) at the end: ")

    whole = "SGD 2 ± 1.4 (2 of 2 seeds); DDPNOpt 3 ± 0.71 (2 of 3 seeds); the spread is smaller with DDPNOpt."
    assert said([1.0, 3.0], [2.5, 3.5, math.nan]) == whole
    assert said([1.0, 3.0], [1.0, 4.0]).endswith("the spread is not smaller with DDPNOpt.")
    few = "SGD 2 ± 1.4 (2 of 2 seeds); DDPNOpt 3 (1 of 2 seeds): too few to compare the spread."
    assert said([1.0, 3.0], [3.0, math.nan]) == few
    assert "DDPNOpt diverged (0 of 1 seeds): too few" in said([1.0, 3.0], [math.nan])


def test_images_of_policies_are_like_differences_that_have_their_class() -> None:
    digits = np.eye(3)  # a sample of each of three classes
    layer = np.array([digits[0] - digits[2], digits[2] - digits[1], np.zeros(3)])
    rows = list(likeness(np.stack([digits, layer])))
    assert [(t, label, seen) for t, label, *_, seen in rows] == [(1, 0, "yes"), (1, 1, "yes"), (1, 2, "no")]
    assert [row[2] for row in rows[:2]] == [2, 2]
    assert [row[3:6] for row in rows[:2]] == [pytest.approx((1.0, 0.75, 0.5))] * 2
    assert rows[2][3:6] == (0.0, 0.0, 0.0)


def test_a_preset_of_other_numerics_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    document = presets.spec("fig9")
    key = presets.idempotency_key(document)
    assert presets.idempotency_key(dict(reversed(document.items()))) == key
    monkeypatch.setattr(presets, "NUMERICS_VERSION", presets.NUMERICS_VERSION + 1)
    assert presets.idempotency_key(document) != key


def test_a_curve_that_breaks_off_has_no_end() -> None:
    """Also where all of them break off: else the last loss before would count as the end."""
    spec = parse_spec(SMALL_SPEC | {"training": TINY}).model_dump(mode="json")
    broken = [{"values": [10.0, 0.1]}, {"values": [10.0]}]
    steps, losses = stacked(spec, "train_loss", broken)
    assert steps.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(losses, [[10.0, 0.1, np.nan], [10.0, np.nan, np.nan]])
    line = Line("DDPNOpt", 0.1, (), steps, losses, None, 10.0)
    assert (line.escaped(), line.back(), line.diverged(), line.final()) == (0, 1, 2, None)
    ends = np.array([[10.0, 8.5, 8.9], [10.0, 9.5, 9.1], [10.0, 0.5, 1e6]])
    out = Line("DDPNOpt", 0.1, (), steps, ends, None, 10.0)
    assert (out.escaped(), out.back(), out.diverged(), out.blown(), out.final()) == (1, 1, 0, 1, 9.0)


def test_lines_say_in_what_those_of_one_name_differ() -> None:
    nothing = np.zeros((1, 1))

    def line_of(name: str, *settings: tuple[str, str]) -> Line:
        return Line(name, 0.1, settings, np.zeros(1, dtype=np.int64), nothing, None, 10.0)

    same, damping = ("dynamics", "second_order"), ("damping", "0.003")
    lines = [
        line_of("EKFAC", damping),
        line_of("DDPNOpt2nd", damping, same),
        line_of("DDPNOpt2nd", damping, same, ("safeguard", "psd")),
        line_of("DDPNOpt2nd", ("damping", "0.002"), same),
    ]
    assert [found.label for found in told_apart(lines)] == [
        "EKFAC, 0.1",
        "DDPNOpt2nd, 0.1, damping 0.003",
        "DDPNOpt2nd, 0.1, damping 0.003, safeguard psd",
        "DDPNOpt2nd, 0.1, damping 0.002",
    ]


def test_escapes_agree_with_the_paper_by_learning_rate() -> None:
    def line_of(name: str, rate: float, *ends: float) -> Line:
        return Line(name, rate, (), np.zeros(1, dtype=np.int64), np.array([ends]).T, None, 10.0)

    lines = [
        line_of("EKFAC", 0.1, 10.0, 10.0),
        line_of("EKFAC", 0.2, 10.0, 1.0),
        line_of("DDPNOpt", 0.1, 1.0, 1.0),
        line_of("DDPNOpt", 0.2, 1.0, math.nan),
        line_of("Adam", 0.1, 1.0, 1.0),  # of which Fig. 12 says nothing
    ]
    assert agreement("fig12", lines).endswith(
        "for 2 of 4 methods at a learning rate, and otherwise for: EKFAC, 0.2 (1 of 2 seeds); "
        "DDPNOpt, 0.2 (1 of 2 seeds)."
    )


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
    names = ("table3-wine", "table3-svhn-cnn", "table3-emsa-svhn-cnn")
    whole = presets.spec
    monkeypatch.setattr(
        presets, "spec", lambda name: whole(name) | {"seeds": 2, "training": TINY | {"steps": 2}}
    )
    preset = Preset("table3", "Table 3", names, {})
    results = done(client, sqlite_engine, preset)
    assert set(results.sweeps) == {"table3-wine"}
    section = build(results)
    assert re.fullmatch(
        r"table3-svhn-cnn, table3-emsa-svhn-cnn did not run: svhn: found no train_32x32.mat "
        r"\(docs/datasets.md .*",
        section.findings[-1],
    )
    (table, _) = section.tables
    assert {row[1] for row in table.rows} == {"wine"}
    alone = build(replace(results, sweeps={}))
    assert alone.findings == section.findings[-1:]
    assert section.remarks
    # One that is there and is damaged is another matter.
    (tmp_path / "svhn").mkdir(exist_ok=True)
    for file in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / "svhn" / file).write_bytes(b"damaged")
    with pytest.raises(SetupError, match=r"\(table3-svhn-cnn\) failed: DataError: .*train_32x32.mat"):
        done(client, sqlite_engine, preset)
    for file in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / "svhn" / file).unlink()
    # The files may be there the next time: it is tried again.
    assert done(client, sqlite_engine, preset).missing == results.missing
    (sweep,) = [sweep for sweep in client.sweeps() if sweep["name"] == "table3-svhn-cnn"]
    assert sweep["state"] == "failed"


@pytest.fixture
def command(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ddpsweep reproduce` take the API of this process for a server that runs."""
    monkeypatch.setattr(reproduction, "Client", lambda url: contextlib.nullcontext(client))


@pytest.mark.usefixtures("tiny", "command")
def test_the_command_takes_what_was_done_and_writes_the_report(
    client: Client, sqlite_engine: Engine, tmp_path: Path
) -> None:
    done(client, sqlite_engine, PRESETS["fig9"])
    said = run_cli("reproduce", "fig9", "--out", str(tmp_path / "[deep]"))
    assert "on the server at http" in said
    assert "200" not in said  # the tiny one
    assert "· training loss: DDPNOpt is better in" in said
    assert str(tmp_path / "[deep]" / "report.html") in said.replace("\n", "")
    assert {path.name for path in (tmp_path / "[deep]").iterdir()} == {
        *("report.html", "report.pdf", "fig9.png", "fig9-train-loss.csv", "fig9-accuracy.csv")
    }
    assert len(client.sweeps()) == 1


def test_the_commands_help_names_the_presets() -> None:
    said = " ".join(run_cli("reproduce", "--help").split())
    assert f"{', '.join(sorted(PRESETS, key=in_the_paper))}, or all." in said


@pytest.mark.usefixtures("tiny", "command")
@pytest.mark.parametrize(("quick", "name"), [((), "fig9"), (("--quick",), "fig9-quick")])
def test_reports_of_several_presets_do_not_overwrite_each_other(
    quick: tuple[str, ...],
    name: str,
    client: Client,
    sqlite_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done(client, sqlite_engine, PRESETS["fig9"], quick=bool(quick))
    run_cli("reproduce", "fig9", *quick)
    assert (tmp_path / "out" / "reproduction" / name / "report.html").is_file()


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fig7",), r"2 error: name: got fig7; allowed: one of fig3, .*, or all"),
        (
            ("fig9", "--data", "x"),
            r"1 error: --data: the server at http\S+ has workers of its own.*leave --data out",
        ),
        (("fig9", "--out", "/proc/x"), r"1 error: --out: got '/proc/x', which cannot be made: .*"),
    ],
)
def test_what_the_command_refuses(
    arguments: tuple[str, ...],
    line: str,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(line, refused(capsys, monkeypatch, "reproduce", *arguments))
    assert client.sweeps() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny", "command")
def test_a_sweep_that_does_not_complete_costs_no_other_preset(
    client: Client,
    sqlite_engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of `all` are not lost to one: the report has the others, and the command says which failed."""
    chosen = {name: PRESETS[name] for name in ("fig8", "fig9", "fig11")}
    for name in ("fig9", "fig11"):
        done(client, sqlite_engine, chosen[name])
    follow = display.follow

    def cancelled(console: Any, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        (first, *_) = taken = [next(iter(states))]
        return client.cancel(first["id"]) if first["name"].startswith("fig8") else follow(console, taken)

    monkeypatch.setattr(display, "follow", cancelled)
    monkeypatch.setattr(reproduction, "PRESETS", chosen)
    said = refused(capsys, monkeypatch, "reproduce", "all", "--out", str(tmp_path))
    assert re.fullmatch(r"1 error: fig8: sweep \w+ \(fig8-mmc-5\) cancelled: None", said)
    page = (tmp_path / "report.html").read_text()
    assert "Not reproduced: sweep " in page
    assert all(f'id="{name}"' in page for name in chosen)
    assert {"fig9.png", "fig11.png"} < {path.name for path in tmp_path.iterdir()}


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    table = Table("t", bad, (bad,), ((bad,),))
    report.save([Section("x", bad, (bad,), (), (table,), (bad,), (bad,))], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 8


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
    assert found.tried == {"adam": 4, "ddpnopt": 1}
    values = {"a": 1.0, "b": 3.0, "c": 3.0 + 1e-14, "d": 2.9}
    assert [rank(values, name) for name in values] == [4, 1, 1, 3]
    assert [ties(values, name) for name in values] == [0, 1, 1, 0]


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
