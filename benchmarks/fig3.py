"""Fig. 3 and Table 4 of the paper: time and memory of a training step against its size.

    python -m benchmarks.fig3 [--device cuda] [--repeats 45]

Time of a step and peak memory against the batch size, on FCN 784-32-32-32-32-10 with random data of MNIST's
shape; then the exponents of time in batch size, width and depth (Table 4) at sizes where the arithmetic
dominates. All methods are timed in turn, with one thread, and the median is taken. Memory is what torch
allocates from the making of the model to the end of the third step, at its peak: the profiler's record of
every allocation on the CPU, `torch.cuda.max_memory_allocated` on a GPU, in a process of its own. Batches
are not counted: they are there before. Writes out/bench-fig3.json and, where matplotlib is installed,
out/fig3.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.settings import interleaved, machine, save
from ddpnopt import BaselineOptimizer, DDPNOpt, allocations
from ddpnopt.errors import ConfigError
from ddpnopt.layers.modules import KEPT_BYTES

WIDE: Final = (784, 32, 32, 32, 32, 10)
NARROW: Final = (64, 8, 8, 8, 8, 10)
"""For vanilla DDP, whose matrices grow with the square of the batch's states: the other net is refused at the
largest batch."""
BATCHES: Final = (8, 16, 32, 64, 128, 256, 512)
SLOW: Final = ("vanilla DDP", "E-MSA")
"""Timed on their own, at fewer batch sizes and with fewer repeats."""
SLOW_BATCHES: Final = (8, 64, 512)
GOALS: Final = (
    ("DDPNOpt", "Adam", "seconds", 8, 0.7),
    ("DDPNOpt", "Adam", "seconds", 512, 1.1),
    ("DDPNOpt, ε > 0", "Adam", "seconds", 8, 0.7),
    ("DDPNOpt, ε > 0", "Adam", "seconds", 512, 1.1),
    ("DDPNOpt", "Adam", "bytes", 8, 1.3),
    ("DDPNOpt", "Adam", "bytes", 512, 1.3),
    ("DDPNOpt EKFAC", "EKFAC", "seconds", 8, 1.3),
    ("DDPNOpt EKFAC", "EKFAC", "seconds", 512, 1.3),
)
"""Method, its partner, measure, batch size, and the largest ratio wanted."""

Step = Callable[[Tensor, Tensor], object]


def model_of(widths: Sequence[int], device: str) -> nn.Sequential:
    """Return a fully connected ReLU net."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device)


def adam(model: nn.Sequential) -> Step:
    """Return torch.optim.Adam's plain training step."""
    optimizer, loss_of = torch.optim.Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()

    return step


METHODS: Final[Mapping[str, Callable[[nn.Sequential], Step]]] = {
    "Adam": adam,
    "SGD": lambda model: BaselineOptimizer(model, "sgd", lr=1e-3).step,
    "DDPNOpt": lambda model: DDPNOpt(model, lr=1e-3, terminal_hessian="gauss_newton").step,
    "DDPNOpt, ε > 0": lambda model: (
        DDPNOpt(model, lr=1e-3, vxx_reg=1e-4, terminal_hessian="gauss_newton").step
    ),
    "EKFAC": lambda model: BaselineOptimizer(model, "ekfac", lr=1e-3).step,
    "DDPNOpt EKFAC": lambda model: (
        DDPNOpt(model, lr=1e-3, preconditioner="ekfac", terminal_hessian="gauss_newton").step
    ),
    "vanilla DDP": lambda model: BaselineOptimizer(model, "vanilla_ddp", lr=1e-3).step,
    "E-MSA": lambda model: BaselineOptimizer(model, "emsa", lr=1e-3).step,
}


def batch_of(widths: Sequence[int], size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return random inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, widths[0], generator=generator)
    targets = torch.randint(widths[-1], (size,), generator=generator)
    return inputs.to(device), targets.to(device)


def side(method: str, widths: Sequence[int], batch: int, device: str, steps: int) -> Callable[[], None]:
    """Return a call that does some steps.

    Raises:
        ConfigError: if the method refuses the net.
    """
    inputs, targets = batch_of(widths, batch, device)
    step = METHODS[method](model_of(widths, device))

    def call() -> None:
        for _ in range(steps):
            step(inputs, targets)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def times(
    methods: Sequence[str],
    widths: Sequence[int],
    batch: int,
    device: str,
    repeats: int,
    steps: int = 0,
) -> dict[str, float | None]:
    """Return each method's median seconds of a step; None where it refuses the net."""
    steps = steps or max(8, 320 // batch)
    found: dict[str, float | None] = dict.fromkeys(methods)
    sides: dict[str, Callable[[], None]] = {}
    for method in methods:
        try:
            sides[method] = side(method, widths, batch, device, steps)
            sides[method]()
        except ConfigError:
            sides.pop(method, None)
    for method, seconds in zip(sides, interleaved(list(sides.values()), repeats), strict=True):
        found[method] = seconds / steps
    return found


def peak_bytes(task: tuple[str, Sequence[int], int, str]) -> int | None:
    """Return what torch allocates for the model and three steps, at its peak; None if the net is refused."""
    method, widths, batch, device = task
    inputs, targets = batch_of(widths, batch, device)

    def train() -> None:
        step = METHODS[method](model_of(widths, device))
        for _ in range(3):
            step(inputs, targets)

    try:
        if device == "cuda":
            train()  # what the libraries keep for themselves
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train()
            return torch.cuda.max_memory_allocated() - before
        events = allocations.recorded(train)
    except ConfigError:
        return None
    # The buffer that is never written to (`modules.KEPT_BYTES`) is no memory.
    sizes = [size for _, size in allocations.changes(events) if abs(size) != KEPT_BYTES // 2]
    return int(np.cumsum(sizes).max())


def exponents(device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Fit time ~ Bᵃ Xᵇ Lᶜ along each axis by least squares in log-log.

    Returns:
        method to axis to exponent.
    """
    found: dict[str, dict[str, float]] = {}
    plans: dict[tuple[str, ...], dict[str, tuple[Sequence[int], Callable[[int], tuple[Sequence[int], int]]]]]
    plans = {
        ("Adam", "DDPNOpt"): {
            "B": ((512, 1024, 2048), lambda n: ((128,) * 5, n)),
            "X": ((256, 512, 1024), lambda n: ((n,) * 4, 256)),
            "L": ((4, 8, 16), lambda n: ((128,) * (n + 1), 512)),
        },
        ("vanilla DDP",): {
            "B": ((64, 128, 256), lambda n: ((8,) * 4, n)),
            # Batches of more samples than inputs: the span of less takes the batch's size in the place of X.
            "X": ((8, 16, 24), lambda n: ((n,) * 4, 32)),
            "L": ((2, 4, 8), lambda n: ((8,) * (n + 1), 32)),
        },
    }
    for methods, axes in plans.items():
        for axis, (sizes, shape_of) in axes.items():
            table = [
                times(methods, *shape_of(n), device=device, repeats=max(3, repeats // 3), steps=1)
                for n in sizes
            ]
            for method in methods:
                seconds = [row[method] for row in table]
                if all(s is not None for s in seconds):
                    slope = np.polyfit(np.log(sizes), np.log(np.array(seconds, dtype=float)), 1)[0]
                    found.setdefault(method, {})[axis] = float(slope)
    return found


def draw(path: Path, document: Mapping[str, Any]) -> bool:
    """Draw time and memory over the batch size as Fig. 3 does; return whether matplotlib was there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, measure, unit, label in (
        (panels[0], "seconds", 1e-3, "ms per iteration"),
        (panels[1], "bytes", 2**20, "peak memory, MiB"),
    ):
        for method, row in document["wide"][measure].items():
            points = [(int(b), value / unit) for b, value in row.items() if value is not None]
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=method, base=2)
        panel.set_xlabel("batch size")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def measure(widths: Sequence[int], methods: Sequence[str], device: str, repeats: int) -> dict[str, Any]:
    """Measure time and memory of one net: measure to method to batch size to value."""
    fast = [m for m in methods if m not in SLOW and "EKFAC" not in m]
    eigen = [m for m in methods if "EKFAC" in m]
    slow = [m for m in methods if m in SLOW]
    seconds: dict[str, dict[int, float | None]] = {m: {} for m in methods}
    for batch in BATCHES:
        found = times(fast, widths, batch, device, repeats)
        found |= times(eigen, widths, batch, device, repeats, steps=1) if eigen else {}
        if batch in SLOW_BATCHES:
            for method in slow:
                found |= times([method], widths, batch, device, 2, steps=1)
        for method, value in found.items():
            seconds[method][batch] = value
    tasks = [(m, widths, b, device) for m in methods for b in seconds[m] if b in SLOW_BATCHES]
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        peaks = pool.map(peak_bytes, tasks, chunksize=1)
    memory: dict[str, dict[int, int | None]] = {m: {} for m in methods}
    for (method, _, batch, _), value in zip(tasks, peaks, strict=True):
        memory[method][batch] = value
    return {"widths": list(widths), "seconds": seconds, "bytes": memory}


def show(document: Mapping[str, Any]) -> None:
    """Print the tables, the ratios and the exponents."""
    for net in ("wide", "narrow"):
        part = document[net]
        for kind, unit, name in (("seconds", 1e-3, "ms"), ("bytes", 2**20, "MiB")):
            print(f"\nFCN {'-'.join(map(str, part['widths']))}: {name} over the batch size")
            print(" " * 16 + "".join(f"{b:>9}" for b in BATCHES))
            for method, row in part[kind].items():
                cells = [
                    "" if b not in row else "N/A" if row[b] is None else f"{row[b] / unit:.2f}"
                    for b in BATCHES
                ]
                print(f"{method:16}" + "".join(f"{cell:>9}" for cell in cells))
    print("\nratios")
    for ratio in document["ratios"]:
        print(
            f"{ratio['method']:16} / {ratio['to']:6} {ratio['measure']:8} batch {ratio['batch']:>3}: "
            f"{ratio['ratio']:.2f} (wanted: at most {ratio['wanted']})"
        )
    print(
        "\nexponents of the time of a step (Table 4: Adam and DDPNOpt B X² L, vanilla DDP B³ X³ L, backward)"
    )
    for method, axes in document["exponents"].items():
        print(f"{method:16}" + "".join(f"  {axis} {value:.2f}" for axis, value in axes.items()))


def main() -> None:
    """Measure, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=45)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, repeats = arguments.device, arguments.repeats
    wide = measure(WIDE, list(METHODS), device, repeats)
    narrow = measure(NARROW, ["Adam", "DDPNOpt", "vanilla DDP"], device, repeats)
    ratios = [
        {
            "method": method,
            "to": partner,
            "measure": kind,
            "batch": batch,
            "ratio": wide[kind][method][batch] / wide[kind][partner][batch],
            "wanted": wanted,
        }
        for method, partner, kind, batch, wanted in GOALS
    ]
    where = machine()
    if device == "cuda":
        where["gpu"] = torch.cuda.get_device_name()
    document = {
        "machine": where,
        "device": device,
        "wide": wide,
        "narrow": narrow,
        "ratios": ratios,
        "exponents": exponents(device, repeats),
    }
    print(where)
    show(document)
    save(Path("out/bench-fig3.json"), document)
    if not draw(Path("out/fig3.png"), document):
        print("no matplotlib: out/fig3.png was not drawn")


if __name__ == "__main__":
    main()
