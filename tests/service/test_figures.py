"""What the heatmap looks like: blue where DDPNOpt is better, honest where nothing is sure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ddpnopt.config import Baseline
from ddpnopt.results import METRICS
from service.cli import display
from service.results import figures, page, plots
from service.results.statistics import Cell, CellState, Heatmap, Outcome, Summary, summary_rows


def cell(rate: float, reg: float, improvement: float | None, state: CellState, **changes: Any) -> Cell:
    values: dict[str, Any] = {
        "learning_rate": rate,
        "vxx_reg": reg,
        "n": 3,
        "n_ended": 3,
        "n_diverged_baseline": 0,
        "n_diverged_ddpnopt": 0,
        "baseline_mean": 1.0,
        "ddpnopt_mean": 0.5,
        "improvement": improvement,
        "ci_low": -0.1,
        "ci_high": 0.9,
        "p_value": 0.2,
        "q_value": 0.3,
        "state": state,
    }
    return Cell(**values | changes)


@pytest.fixture
def panel() -> Heatmap:
    cells = (
        cell(0.1, 1e-4, 0.5, CellState.BETTER),
        cell(0.1, 1e-3, -1.0, CellState.WORSE),
        cell(0.2, 1e-4, 0.4, CellState.INCONCLUSIVE, n_diverged_baseline=1),
        cell(0.2, 1e-3, None, CellState.DIVERGED, n=0, n_diverged_ddpnopt=3),
    )
    return Heatmap("id", "a name", 0, "sgd", "train_loss", (0.1, 0.2), (1e-4, 1e-3), cells)


def test_labels(panel: Heatmap) -> None:
    digits = figures.digits(panel)
    shown = [figures.label(cell, digits) for cell in panel.cells]
    assert shown == ["+0.50", "-1.00", "(+0.40)\ndiv 1|0", "div 0|3"]
    assert figures.label(cell(0.1, 0.1, None, CellState.PENDING), 2) == "·"


def test_blue_is_better_and_the_scale_is_symmetric(panel: Heatmap) -> None:
    figure = figures.plotly_figure(panel)
    (trace,) = figure["data"]
    assert (trace["zmin"], trace["zmax"]) == (-1.0, 1.0)
    low, high = trace["colorscale"][0][1], trace["colorscale"][-1][1]
    red, blue = (tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5)) for colour in (low, high))
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert trace["z"][0] == [0.5, -1.0]
    assert trace["z"][1] == [pytest.approx(0.4 * figures.PALE), None]
    assert figure["layout"]["yaxis"]["range"] == [
        1.5,
        -0.5,
    ]  # the smallest learning rate on top, as in Fig. 4a


@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_pictures_are_drawn_alike_each_time(panel: Heatmap, tmp_path: Path, suffix: str) -> None:
    first, again = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    plots.save([panel, panel], first)
    plots.save([panel, panel], again)
    assert first.read_bytes() == again.read_bytes()
    assert first.stat().st_size > 5000


def test_the_svg_bears_numbers_and_hatching(panel: Heatmap, tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plots.save([panel], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in ("+0.50", "-1.00", "(+0.40)", "div 0|3", "learning rate", "DDPNOpt vs SGD: training loss"):
        assert words in text
    assert text.count("<pattern") == 2
    for place in (0.75, 0.0):  # +0.5 and -1.0 on a scale from -1 to 1
        assert mpl.colors.to_hex(mpl.colormaps["RdBu"](place)) in text


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("width", [1, 4])
def test_words_stay_inside_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, width: int
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **kw: drawn.append(Figure(**kw)) or drawn[-1])
    regs = tuple(10.0**-k for k in range(width))
    cells = tuple(cell(0.1, reg, 0.5, CellState.BETTER) for reg in regs)
    plots.save([Heatmap("id", "n", 0, "sgd", "accuracy", (0.1,), regs, cells)] * count, tmp_path / "a.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    titles = [ax.title for ax in figure.axes if ax.get_title()]
    words = [*figure.texts, *titles, *(text for ax in figure.axes for text in ax.texts)]
    assert len(words) == 2 + count * (1 + width)
    for text in words:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
    boxes = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[k + 1 :])


def test_a_panel_without_any_result_can_be_drawn(panel: Heatmap, tmp_path: Path) -> None:
    empty = cell(0.1, 1e-4, None, CellState.PENDING, n=0, n_ended=0)
    bare = Heatmap("id", "n", 0, "sgd", "accuracy", (0.1,), (1e-4,), (empty,))
    plots.save([bare], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert figures.plotly_figure(bare)["data"][0]["z"] == [[None]]


def test_a_page_of_its_own_escapes_names(panel: Heatmap, tmp_path: Path) -> None:
    nasty = Heatmap("id", "<b>&", 0, "sgd", "train_loss", (0.1, 0.2), (1e-4, 1e-3), panel.cells)
    page.save([nasty, nasty], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<title>&lt;b&gt;&amp;</title>" in text
    assert text.count('class="plotly-graph-div"') == 2


def test_every_baseline_of_a_grid_has_a_title(panel: Heatmap) -> None:
    assert list(figures.BASELINES) == list(get_args(Baseline))
    assert figures.title(replace(panel, baseline="ekfac")) == "DDPNOpt vs EKFAC: training loss"


def test_grids_of_one_baseline_are_told_apart(panel: Heatmap, tmp_path: Path) -> None:
    tuned = replace(panel, grid=1, setting="momentum 0.9, safeguard psd")
    plain, other = (figures.plotly_figure(p)["layout"]["title"]["text"] for p in (panel, tuned))
    assert plain == "DDPNOpt vs SGD: training loss"
    assert other.startswith(plain)
    assert "momentum 0.9, safeguard psd" in other
    console = Console(width=80, record=True)
    console.print(display.heatmap_table(tuned))
    assert "training loss\nmomentum 0.9, safeguard psd\n" in console.export_text()
    page.save([panel, tuned], tmp_path / "a.html")
    assert "momentum 0.9, safeguard psd" in (tmp_path / "a.html").read_text()


def drawn_figure(monkeypatch: pytest.MonkeyPatch, panels: list[Heatmap], path: Path) -> Figure:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **kw: drawn.append(Figure(**kw)) or drawn[-1])
    plots.save(panels, path)
    (figure,) = drawn
    figure.draw_without_rendering()
    return figure


def test_several_grids_are_drawn_as_in_fig_4a(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, panel: Heatmap
) -> None:
    """Grids side by side, metrics one below the other, and no words over each other."""
    grids = [
        panel,
        replace(
            panel, grid=1, baseline="rmsprop", setting="rho 0.98, momentum 0.9, eps 1e-08, factorized true"
        ),
        replace(panel, grid=2, baseline="ekfac"),
    ]
    panels = [replace(p, metric=metric) for metric in ("train_loss", "train_accuracy") for p in grids]
    figure = drawn_figure(monkeypatch, panels, tmp_path / "a.png")
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title().partition(" vs ")[2].partition("\n")[0] for ax in axes] == [
        "SGD: training loss",
        "RMSprop: training loss",
        "EKFAC: training loss",
        "SGD: training accuracy (percent points)",
        "RMSprop: training accuracy (percent points)",
        "EKFAC: training accuracy (percent points)",
    ]
    boxes = [ax.title.get_window_extent() for ax in axes]
    assert boxes[0].y0 > boxes[3].y1
    assert boxes[0].x1 < boxes[1].x0
    for k, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in [*boxes[k + 1 :], *(ax.bbox for ax in axes)])


def test_many_grids_stay_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, panel: Heatmap) -> None:
    bare = replace(panel, learning_rate=(0.1,), vxx_reg=(1e-4,), cells=panel.cells[:1])
    figure = drawn_figure(monkeypatch, [replace(bare, grid=k) for k in range(6)], tmp_path / "a.svg")
    assert sum(bool(ax.get_title()) for ax in figure.axes) == 6
    assert len({round(ax.get_position().x0, 3) for ax in figure.axes if ax.get_title()}) == plots.COLUMNS


def summary_of(*values: float | None) -> Summary:
    outcomes = [Outcome(0.1, None, seed, value) for seed, value in enumerate(values)]
    rows = (
        summary_rows((0.1, 0.2), regs, outcomes, 4, grid=grid, baseline=name, setting=setting)
        for grid, name, regs, setting in ((0, "emsa", (), "lbfgs_steps 7"), (2, "sgd", (1e-4,), ""))
    )
    return Summary("id", "n", "accuracy", tuple(row for grid in rows for row in grid))


def test_a_summary_is_printed_grid_by_grid() -> None:
    console = Console(width=120, record=True)
    console.print(display.summary_tables(summary_of(90.0, 92.5, None)))
    lines = console.export_text().splitlines()
    assert lines[:2] == ["E-MSA: test accuracy (%)", "lbfgs_steps 7"]
    assert "SGD: test accuracy (%)" in lines
    words = [line.replace("│", " ").replace("┃", " ").split() for line in lines]
    header = ["method", "lr", "ε", "n", "diverged", "mean", "sd", "95", "%", "min", "max"]
    assert words.count(header) == 2
    row = ["baseline", "0.1", "2/4", "1", "91.25", "1.768", "75.37", "…", "107.1", "90", "92.5"]
    assert words.count(row) == 2
    assert words.count(["baseline", "0.2", "0/4", "0", *"·" * 5]) == 2
    assert ["ddpnopt", "0.1", "0.0001", "0/4", "0", *"·" * 5] in words


@pytest.mark.parametrize(
    ("values", "shown"), [((), "·"), ((None,), "·"), ((0.25, None), "0.25"), ((1.0, 2.0), "1.5 ± 0.707")]
)
def test_spread_is_shown_as_far_as_there_is_any(values: tuple[float | None, ...], shown: str) -> None:
    assert figures.spread(summary_of(*values).rows[0]) == shown


def test_every_metric_has_titles() -> None:
    assert set(figures.VALUES) == set(figures.TITLES) == set(METRICS)
    assert figures.summary_title("vanilla_ddp", "train_loss") == "Vanilla DDP: training loss"
