"""Table 3: the test accuracy of every method at its best setting, on every dataset.

The rule, stated before anything was trained: of the learning rates, ε and options that a method has, the best
is that with the least mean training loss over the seeds, among those of which the fewest diverged. Test sets
do not choose among them. A mean agrees with the paper's if it is within `NEAR` points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.figure import Figure

from service.paper import published
from service.paper.results import Results
from service.paper.sections import Picture, Section, Table, Value
from service.results import figures
from service.results.statistics import SummaryRow

NEAR: Final = 1.5
METHODS: Final = (
    {"sgd-m": "SGD-m"}
    | {name: figures.BASELINES[name] for name in ("rmsprop", "adam", "ekfac", "emsa", "vanilla_ddp")}
    | {"ddpnopt": "DDPNOpt"}
)
"""In the order of Table 3."""
SAME: Final = 0.005
"""Points: means that are nearer are printed alike, and share a rank."""

COLUMNS: Final = (
    *("network", "dataset", "method", "setting", "steps", "batch", "n", "diverged", "train_loss"),
    *("accuracy", "ci_low", "ci_high"),
)
TITLES: Final = {"wine": "WINE", "digits": "DIGITS", "mnist": "MNIST", "fashion_mnist": "F-MNIST"} | {
    "svhn": "SVHN",
    "cifar10": "CIFAR-10",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method at one setting.

    Attributes:
        method: as in Table 3.
        loss, accuracy: the summaries of the training loss and of the test accuracy, over the same runs.
        steps, batch: of the training.
    """

    method: str
    loss: SummaryRow
    accuracy: SummaryRow
    steps: int
    batch: int

    @property
    def order(self) -> tuple[int, float]:
        """What the best has least of."""
        mean = self.loss.mean
        return self.loss.n_diverged, float("inf") if mean is None else mean

    @property
    def setting(self) -> str:
        """Return learning rate, ε and options."""
        row = self.loss
        reg = "" if row.vxx_reg is None else f"ε {row.vxx_reg:g}"
        return ", ".join(part for part in (f"lr {row.learning_rate:g}", reg, row.setting) if part)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: a net and a dataset.

    Attributes:
        best: each method's best setting, in the order of the table.
        tried: how many settings it was taken from, by method.
        paper: accuracies by method.
    """

    network: str
    dataset: str
    best: dict[str, Candidate]
    tried: dict[str, int]
    paper: dict[str, float]

    @property
    def title(self) -> str:
        """The dataset and the kind of net."""
        return f"{TITLES[self.dataset]} {self.network.upper()}"

    def ours(self) -> dict[str, float]:
        """Return the mean accuracies by method, of those that have one."""
        found = {name: candidate.accuracy.mean for name, candidate in self.best.items()}
        return {name: mean for name, mean in found.items() if mean is not None}


def section(results: Results) -> Section:
    """Build the section of a preset whose sweeps train methods on datasets, each in one sweep or more."""
    candidates: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    for sweep in results.sweeps.values():
        spec = sweep["spec"]
        candidates[spec["model"]["kind"], spec["dataset"]] += _candidates(
            results, sweep["id"], spec["training"]
        )
    lines = [line(*key, found) for key, found in candidates.items()]
    return Section(
        results.preset.name,
        results.preset.title,
        tuple(finding for one in lines for finding in _findings(one)),
        (
            Picture(
                "table3",
                "Test accuracy of each method at its best setting with the 95 % interval of its mean (dots), "
                "and the paper's (crosses)",
                _figure(lines),
            ),
        ),
        (
            Table(
                "table3",
                "each method at the setting of its least training loss, beside the paper's accuracy",
                (*COLUMNS, "settings_tried", "paper", "difference"),
                tuple(row for one in lines for row in _rows(one)),
            ),
            Table(
                "table3-tuning",
                "all settings that were trained",
                COLUMNS,
                tuple(_row(key, one) for key, found in candidates.items() for one in found),
            ),
        ),
        results.notes(),
    )


def line(network: str, dataset: str, candidates: Sequence[Candidate]) -> Line:
    """Choose each method's best."""
    by_method = {
        method: own
        for method in METHODS
        if (own := [candidate for candidate in candidates if candidate.method == method])
    }
    return Line(
        network,
        dataset,
        {method: min(own, key=lambda candidate: candidate.order) for method, own in by_method.items()},
        {method: len(own) for method, own in by_method.items()},
        published.accuracies(network, dataset),
    )


def rank(values: dict[str, float], method: str) -> int:
    """Return the place of a method's accuracy among all, from 1; equals share the better one."""
    return 1 + sum(value - values[method] > SAME for value in values.values())


def ties(values: dict[str, float], method: str) -> int:
    """Count the other methods of the same accuracy."""
    return sum(abs(value - values[method]) <= SAME for value in values.values()) - 1


def _candidates(results: Results, sweep_id: str, training: dict[str, int]) -> Iterator[Candidate]:
    losses, accuracies = (
        results.client.summary(sweep_id, metric=metric).rows for metric in ("train_loss", "accuracy")
    )
    for loss, accuracy in zip(losses, accuracies, strict=True):
        method = "ddpnopt" if loss.method == "ddpnopt" else loss.baseline
        name = "sgd-m" if method == "sgd" else method
        yield Candidate(name, loss, accuracy, training["steps"], training["batch_size"])


def _findings(one: Line) -> Iterator[str]:
    ours, paper = one.ours(), one.paper
    far = [
        f"{METHODS[name]} {ours[name]:.2f} (the paper: {paper[name]:.2f})"
        for name in ours
        if name in paper and abs(ours[name] - paper[name]) > NEAR
    ]
    shared = [name for name in ours if name in paper]
    said = f"; further off: {', '.join(far)}" if far else ""
    yield (
        f"{one.title}: {len(shared) - len(far)} of {len(shared)} methods are within {NEAR:g} points of the "
        f"paper{said}."
    )
    if "ddpnopt" in ours and "ddpnopt" in paper:
        others = ties(ours, "ddpnopt")
        tied = f", with {others} other{'s' if others > 1 else ''}," if others else ""
        yield (
            f"{one.title}: DDPNOpt is number {rank(ours, 'ddpnopt')} of {len(ours)}{tied} by its mean of "
            f"{ours['ddpnopt']:.2f} (the paper: number {rank(paper, 'ddpnopt')} of {len(paper)} by "
            f"{paper['ddpnopt']:.2f})."
        )


def _row(key: tuple[str, str], one: Candidate) -> tuple[Value, ...]:
    loss, accuracy = one.loss, one.accuracy
    return (
        *(*key, METHODS[one.method], one.setting, one.steps, one.batch, loss.n, loss.n_diverged, loss.mean),
        *(accuracy.mean, accuracy.ci_low, accuracy.ci_high),
    )


def _rows(one: Line) -> Iterator[tuple[Value, ...]]:
    for method, candidate in one.best.items():
        paper, mean = one.paper.get(method), candidate.accuracy.mean
        difference = None if paper is None or mean is None else mean - paper
        yield (*_row((one.network, one.dataset), candidate), one.tried[method], paper, difference)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis for the means: an interval of few seeds may reach far beyond 0 and 100."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    room = max(0.5, 0.15 * (high - low))
    return low - room, high + room


def _figure(lines: Sequence[Line]) -> Figure:
    across = 2
    down = -(-len(lines) // across)
    figure = Figure(figsize=(9, 2.5 * down + 0.3), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, one in zip(panels, lines, strict=False):
        names = list(METHODS)[::-1]
        for method, candidate in one.best.items():
            row, place = candidate.accuracy, names.index(method)
            colour = "C0" if method == "ddpnopt" else "0.35"
            if row.mean is not None:
                axes.plot(row.mean, place, "o", color=colour, markersize=5)
            if row.ci_low is not None and row.ci_high is not None:
                axes.hlines(place, row.ci_low, row.ci_high, color=colour, linewidth=1.5)
        for method, value in one.paper.items():
            axes.plot(value, names.index(method), "x", color="C3", markersize=6)
        axes.set_xlim(*_limits([*one.ours().values(), *one.paper.values()]))
        axes.set_yticks(range(len(names)), [METHODS[name] for name in names], fontsize=8)
        axes.set_title(one.title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.3, axis="x")
    for axes in panels[len(lines) :]:
        axes.set_axis_off()
    figure.supxlabel("test accuracy, %", fontsize=9)
    return figure
