"""Packs on a GPU: run-steps per second from one run to 10,000, and the ratio to one run at a time.

    python -m benchmarks.gpu [--device cuda] [--seconds 3]

One run at a time is the better of two: torch.optim.SGD's plain loop of one net on the same device, and a pack
of one. The net is 64-16-16-16-16-10 at batch 8. Needs torch, numpy and scikit-learn alone. Prints a table and
writes out/bench-gpu.json with the device's name.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ddpnopt.config import FeedbackConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.datasets.load import load
from ddpnopt.pack.engine import Trainer

HIDDEN: Final = (16,) * 4
BATCH: Final = 8
SIZES: Final = (1, 10, 100, 1000, 10_000)
METHODS: Final[dict[str, FeedbackConfig | None]] = {
    "SGD": None,
    "DDPNOpt, GN, outer product": FeedbackConfig("gauss_newton"),
    "DDPNOpt, exact, full": FeedbackConfig(),
}
WARM_UP: Final = 5


def rate(update: Callable[[int], None], device: torch.device, seconds: float) -> float:
    """Return updates per second, timed for about so many seconds after a warm-up."""
    update(WARM_UP)
    _wait(device)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        update(5)
        done += 5
        _wait(device)
    return done / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pack(method: str, runs: int, device: torch.device) -> Callable[[int], None]:
    """Return a call that does so many updates of a pack, as tensors."""
    feedback = METHODS[method]
    optimizer = OptimizerConfig(
        "sgd",
        "baseline" if feedback is None else "ddpnopt",
        0.05,
        None if feedback is None else 1e-4,
        feedback,
    )
    training = TrainingConfig(10**7, BATCH, 10**7)
    configs = [
        RunConfig("digits", ModelConfig(HIDDEN), "cross_entropy", training, optimizer, seed)
        for seed in range(runs)
    ]
    trainer = Trainer(configs, load("digits"), device, lanes=False)
    return lambda count: trainer.advance(trainer.step + count)


def plain_loop(device: torch.device) -> Callable[[int], None]:
    """Return a call that does so many updates of one net by torch.optim.SGD's plain loop."""
    data = load("digits")
    inputs = torch.from_numpy(data.train_inputs).float().to(device)
    targets = torch.from_numpy(data.train_targets).to(device)
    layers: list[nn.Module] = []
    for n, m in pairwise((64, *HIDDEN, 10)):
        layers += [nn.Linear(n, m), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_of = nn.CrossEntropyLoss()
    rows = torch.randint(len(targets), (100, BATCH), device=device)

    def updates(count: int) -> None:
        for i in range(count):
            optimizer.zero_grad()
            loss_of(model(inputs[rows[i % 100]]), targets[rows[i % 100]]).backward()
            optimizer.step()

    return updates


def measure(device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all methods and sizes on a device."""
    plain = rate(plain_loop(device), device, seconds)
    rows = []
    for method in METHODS:
        alone = 0.0
        for runs in SIZES:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            updates = rate(pack(method, runs, device), device, seconds)
            alone = updates if runs == 1 else alone
            rows.append(
                {
                    "method": method,
                    "runs": runs,
                    "run_steps_per_second": updates * runs,
                    "ratio_to_one_at_a_time": updates * runs / max(alone, plain),
                    "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "plain_sgd_steps_per_second": plain,
        "packs": rows,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing")
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu.json"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: this benchmark is about one")
    torch.backends.cuda.matmul.allow_tf32 = False
    report = measure(torch.device(options.device), options.seconds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['device']}: torch.optim.SGD's plain loop {report['plain_sgd_steps_per_second']:.0f} steps/s"
    )
    for row in report["packs"]:
        print(
            f"{row['method']:>28} {row['runs']:>6} runs: {row['run_steps_per_second']:>12.0f} run-steps/s, "
            f"{row['ratio_to_one_at_a_time']:.1f}x one at a time"
        )


if __name__ == "__main__":
    main()
