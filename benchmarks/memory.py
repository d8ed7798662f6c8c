"""Memory of a pack's run at its peak: what torch allocates, against what the planner expects.

    python -m benchmarks.memory [--net 'FCN 784-32x4-10']

Measured is every allocation of torch's CPU allocator while a pack is made, does two updates as tensors, and
takes its metrics the same way, by the profiler's record: exact, and the same every time. Not counted are the
data and what libraries allocate by themselves. A process grows by about as much where the large tensors have
32 MiB and more; of smaller ones glibc keeps freed memory for later, a third to three quarters of the peak.

Expected is `service.sweeps.estimate.numbers`, by which the planner fills packs, with and without the metrics,
which small nets take in lanes. The goal is a ratio of expected to measured between 0.75 and 1.25
(`tests/service/test_estimate.py`).

The last columns set both peaks in relation to what a run cannot do without; the goal is at most 4:

    controls           entries of u
    + activations      B Σ_t (n_t + h_t): of a forward pass, the state before each layer and its output
    + preconditioner   a velocity; RMSprop's moment, Adam's two; KFAC's factors and their inverses' roots;
                       EKFAC's eigenvectors, the moments along them, and factors if they are averaged
    + value function   V_xx at the largest state, and every layer's gain: B (max n² + Σ h n) in full, and
                       B (max 2n + Σ 2h) of an outer product, t ≥ 1

Prints a table and writes out/bench-memory.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.settings import machine, save
from ddpnopt import allocations
from ddpnopt.config import (
    BaselineOptions,
    DType,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    PairedBaseline,
    RunConfig,
    TrainingConfig,
)
from ddpnopt.datasets.load import Dataset
from ddpnopt.lanes.rules import NUMBER_BYTES
from ddpnopt.pack.engine import Trainer
from service.sweeps import estimate
from service.sweeps.estimate import Layer, Method

CLASSES: Final = 10
SAMPLES: Final = 1024
"""In the training set, and half as many in the test set: both have a full chunk of metrics."""

UPDATES: Final = 2
"""The second has what the first one left behind."""

GOAL: Final = 4.0
"""At most so many times the necessary."""

PHASE: Final = "phase of a measurement"


@dataclass(frozen=True, slots=True)
class Net:
    """A net on data of some shape, in packs of some size.

    Attributes:
        runs: R. Large enough that what a pack has once does not show.
    """

    model: ModelConfig
    shape: tuple[int, ...]
    batch: int
    runs: int


NETS: Final = {
    "FCN 64-10x4-10": Net(ModelConfig((10,) * 4), (64,), 16, 64),
    "FCN 64-16x4-10": Net(ModelConfig((16,) * 4), (64,), 8, 64),
    "FCN 784-32x4-10": Net(ModelConfig((32,) * 4, "relu"), (784,), 128, 8),
    "FCN 64-256x2-10": Net(ModelConfig((256, 256)), (64,), 64, 2),
    "FCN 64-1024x2-10": Net(ModelConfig((1024, 1024), "relu"), (64,), 8, 2),
    "FCN 64-48x8-10, GELU": Net(ModelConfig((48,) * 8, "gelu"), (64,), 128, 4),
    "FCN 13-10x4-10, sigmoid": Net(ModelConfig((10,) * 4, "sigmoid", output="sigmoid"), (13,), 32, 32),
    "CNN 8-8-16-10 on 8x8": Net(ModelConfig((16,), "relu", "cnn", (8, 8)), (1, 8, 8), 16, 4),
    "CNN 32x4-32-10 on 28x28": Net(ModelConfig((32,), "relu", "cnn", (32,) * 4), (1, 28, 28), 128, 2),
}


FEEDBACKS: Final[dict[str, dict[str, Any]]] = {
    "outer product": {"terminal_hessian": "gauss_newton", "factorized": True},
    "exact": {"terminal_hessian": "exact"},
    "exact, psd": {"terminal_hessian": "exact", "safeguard": "psd"},
    "2nd order": {"dynamics": "second_order"},
    "2nd order, psd": {"dynamics": "second_order", "safeguard": "psd"},
    "off": {"feedback": False},
}
"""Options of DDPNOpt by the name that they have here."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of run.

    Attributes:
        net: a key of `NETS`.
        baseline: its name.
        feedback: a key of `FEEDBACKS`; None for the baseline itself.
        options: the baseline's.
        dtype: of its numbers.
        runs: of the pack; the net's own number if not given.
    """

    net: str
    baseline: PairedBaseline
    feedback: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: DType = "float32"
    runs: int = 0

    @property
    def size(self) -> int:
        """Return R."""
        return self.runs or NETS[self.net].runs

    @property
    def name(self) -> str:
        """Say what it is, besides the net."""
        said = [self.baseline if self.feedback is None else f"{self.baseline}, feedback {self.feedback}"]
        said += [f"{key} {value}" for key, value in self.options.items()]
        said += [self.dtype] if self.dtype != "float32" else []
        return ", ".join(said)

    def layers(self) -> tuple[Layer, ...]:
        """Return the sizes of the net's layers."""
        net = NETS[self.net]
        shapes = net.model.layers(net.shape, CLASSES)
        return estimate.layers(shapes, len(net.model.channels), net.model.activation, net.model.output)

    def method(self) -> Method:
        """Return the optimizer as the planner sees it."""
        return Method.of(self.baseline, BaselineOptions(**self.options), self._feedback())

    def configs(self) -> list[RunConfig]:
        """Return the pack's runs. Their steps are too small to leave the finite numbers."""
        net, options, feedback, rate = (
            NETS[self.net],
            BaselineOptions(**self.options),
            self._feedback(),
            1e-12,
        )
        optimizer = (
            OptimizerConfig(self.baseline, "baseline", rate, options=options)
            if feedback is None
            else OptimizerConfig(self.baseline, "ddpnopt", rate, rate, feedback, options)
        )
        training = TrainingConfig(UPDATES, net.batch, UPDATES)
        return [
            RunConfig("noise", net.model, "cross_entropy", training, optimizer, seed, self.dtype)
            for seed in range(self.size)
        ]

    def _feedback(self) -> FeedbackConfig | None:
        if self.feedback is None:
            return None
        chosen = FeedbackConfig(**FEEDBACKS[self.feedback])
        return chosen.resolved(convolutional=NETS[self.net].model.convolutional)


BASELINES: Final[tuple[PairedBaseline, ...]] = ("sgd", "rmsprop", "adam", "kfac", "ekfac")
OPTIONS: Final[dict[PairedBaseline, tuple[dict[str, Any], ...]]] = {
    "sgd": ({"momentum": 0.9}, {"weight_decay": 0.1}),
    "rmsprop": ({"second_moment": "per_sample"},),
    "adam": ({"second_moment": "per_sample", "weight_decay": 0.1},),
    "kfac": ({"factor_decay": 0.9, "momentum": 0.9},),
    "ekfac": ({"factor_decay": 0.9, "momentum": 0.9},),
}
"""Those that change what is held; tried on the baseline and with each way to hold V_xx."""

LARGE: Final = "CNN 32x4-32-10 on 28x28"
"""Too large for a matrix V_xx per sample."""


def cases() -> Iterator[Case]:
    """Yield the table's rows."""
    for net, baseline in product(NETS, BASELINES):
        thrifty = net == LARGE
        yield Case(net, baseline)
        for feedback in ("outer product", "off") if thrifty else FEEDBACKS:
            yield Case(net, baseline, feedback)
        for options in OPTIONS[baseline]:
            for some in (None, "outer product") if thrifty else (None, "outer product", "exact, psd"):
                yield Case(net, baseline, some, options)
    for net, baseline in product(("FCN 64-10x4-10", "CNN 8-8-16-10 on 8x8"), BASELINES):
        yield Case(net, baseline, dtype="float64")
        yield Case(net, baseline, "outer product", dtype="float64")
    for alone in (None, "outer product", "exact", "2nd order"):
        yield Case("CNN 8-8-16-10 on 8x8", "ekfac", alone, runs=1)


def allocated(*phases: Callable[[], object]) -> list[int]:
    """Make some calls, one after the other, and return what torch allocates for them.

    Returns:
        For each call, the bytes that torch's CPU allocator holds at the most while it goes on, of all that it
        made in these calls.
    """

    def work() -> None:
        for phase in phases:
            with torch.profiler.record_function(PHASE):
                phase()

    events = allocations.recorded(work)
    starts = sorted(e["ts"] for e in events if e["name"] == PHASE)
    times, sizes = zip(*allocations.changes(events), strict=True)
    held, phase_of = np.cumsum(sizes), np.searchsorted(starts, times, side="right") - 1
    return [int(held[phase_of == k].max()) for k in range(len(phases))]


def noise(case: Case) -> Dataset:
    """Draw data of the net's shape, of the run's own kind of numbers: torch need not copy them."""
    rng = np.random.default_rng(0)
    shape = NETS[case.net].shape
    samples, features = SAMPLES + SAMPLES // 2, math.prod(shape)
    x = rng.normal(size=(samples, features)).astype(case.dtype)
    y = np.arange(samples) % CLASSES
    return Dataset("noise", x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:], "none", shape)


def measured(case: Case) -> tuple[float, float]:
    """Return the bytes of one run during its updates and during metrics: its share of what the pack holds."""
    data, runs, made = noise(case), case.configs(), []

    def update() -> None:
        trainer = Trainer(runs, data, torch.device("cpu"), lanes=False)
        made.append(trainer)
        trainer.advance(UPDATES)

    def take_metrics() -> None:
        trainer = made.pop()
        trainer.take_metrics()
        assert trainer.active == len(runs)

    # Controls of float64 stay in the memory that NumPy drew them in, of which torch knows nothing.
    drawn = NUMBER_BYTES[case.dtype] * _controls(case.layers()) if case.dtype == "float64" else 0
    updates, metrics = (size / len(runs) + drawn for size in allocated(update, take_metrics))
    return updates, metrics


def expected(case: Case, samples: int = SAMPLES) -> int:
    """Return the bytes that the planner expects of one run with metrics of so many samples."""
    net, method = case.layers(), case.method()
    batch, runs, dtype = NETS[case.net].batch, case.size, case.dtype
    return NUMBER_BYTES[dtype] * estimate.numbers(net, batch, method, samples, runs=runs, dtype=dtype)


def necessary(case: Case) -> int:
    """Return the bytes of one run's controls, activations and curvature, as the module's text counts them."""
    net, batch, method = case.layers(), NETS[case.net].batch, case.method()
    activations = batch * sum(layer.n + layer.h for layer in net)
    curvature = _preconditioner(net, batch, method) + _value_function(net, batch, method)
    return NUMBER_BYTES[case.dtype] * (_controls(net) + activations + curvature)


def _controls(net: Sequence[Layer]) -> int:
    return sum(layer.controls for layer in net)


def _preconditioner(net: Sequence[Layer], batch: int, method: Method) -> int:
    moments = {"rmsprop": 1, "adam": 2}.get(method.preconditioner, 0) + bool(method.options.momentum)
    numbers = moments * _controls(net)
    if method.preconditioner == "kfac" or (method.preconditioner == "ekfac" and not method.spanned):
        numbers += sum(layer.factors for layer in net)
    if method.preconditioner == "kfac":
        numbers += sum(layer.factors for layer in net)
    if method.preconditioner == "ekfac":
        for layer in net:
            p, q = estimate.bases(layer, batch, method)
            numbers += layer.i * p + layer.o * q + p * q
    return numbers


def _value_function(net: Sequence[Layer], batch: int, method: Method) -> int:
    inner = net[1:]
    if method.feedback is None or not inner:
        return 0
    if method.outer_product:
        return batch * (2 * max(layer.n for layer in inner) + sum(2 * layer.h for layer in inner))
    return batch * (max(layer.n for layer in inner) ** 2 + sum(layer.h * layer.n for layer in inner))


def row(case: Case) -> dict[str, Any]:
    """Measure one case."""
    updates, metrics = measured(case)
    least = necessary(case)
    return {
        "net": case.net,
        "batch": NETS[case.net].batch,
        "run": case.name,
        "runs": case.size,
        "necessary_bytes": least,
        "updates": _against(updates, expected(case, samples=0), least),
        "all": _against(max(updates, metrics), expected(case), least),
    }


def _against(found: float, wanted: int, least: int) -> dict[str, float]:
    return {
        "measured_bytes": found,
        "expected_bytes": wanted,
        "ratio": wanted / found,
        "multiple": found / least,
    }


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the figures of one net."""
    first = rows[0]
    title = f"{first['net']}, batch {first['batch']}: MiB per run, and expected / measured"
    table = Table(title=title, title_justify="left")
    for column in ("run", "R", "updates", "ratio", "all", "ratio", "× necessary: updates", "all"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for r in rows:
        cells = [
            cell
            for part in ("updates", "all")
            for cell in (f"{r[part]['measured_bytes'] / 2**20:.3f}", f"{r[part]['ratio']:.2f}")
        ]
        multiples = (f"{r[part]['multiple']:.2f}" for part in ("updates", "all"))
        table.add_row(r["run"], str(r["runs"]), *cells, *multiples)
    console.print(table)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--net", choices=NETS, help="this one alone")
    chosen = parser.parse_args().net
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(machine())
    rows: list[dict[str, Any]] = []
    for net in [chosen] if chosen else NETS:
        rows += (of_net := [row(case) for case in cases() if case.net == net])
        show(console, of_net)
    for part in ("updates", "all"):
        ratios = [r[part]["ratio"] for r in rows]
        within = sum(r[part]["multiple"] <= GOAL for r in rows)
        console.print(
            f"{part}: expected / measured {min(ratios):.2f} to {max(ratios):.2f}; "
            f"{within} of {len(rows)} rows have at most {GOAL:g} times the necessary"
        )
    save(Path("out/bench-memory.json"), {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
