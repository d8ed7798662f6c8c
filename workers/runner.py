"""Train one pack and speak of it in protocol events. What every executor runs in the end."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ddpnopt import NUMERICS_VERSION
from ddpnopt.datasets.load import load
from ddpnopt.errors import DDPNOptError
from ddpnopt.pack.engine import train
from ddpnopt.results import Progress
from workers.protocol import Environment, PackEvent, PackFailed, PackFinished, PackProgress, PackTask


def run_pack(task: PackTask) -> Iterator[PackEvent]:
    """Train a pack.

    Yields:
        `PackProgress` at every point of the curves, then `PackFinished` or `PackFailed`. Nothing that
        goes wrong in training escapes as an exception.
    """
    try:
        data = load(task.runs[0].dataset)
        for event in train(task.runs, data):
            if isinstance(event, Progress):
                yield PackProgress(task.pack_id, task.attempt, event.step, event.steps, event.active)
            else:
                yield PackFinished(task.pack_id, task.attempt, event.results, environment(data.checksum))
    except DDPNOptError as error:
        yield _failed(task, error, retryable=False)
    except Exception as error:
        # The edge of the worker: all that goes wrong becomes an event. torch reports a lack of memory as a
        # RuntimeError; another attempt may find more.
        yield _failed(task, error, retryable=True)


def _failed(task: PackTask, error: Exception, *, retryable: bool) -> PackFailed:
    lines = str(error).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    return PackFailed(task.pack_id, task.attempt, reason[:500], traceback.format_exc()[-8000:], retryable)


def environment(data_checksum: str) -> Environment:
    """Describe this process's device and libraries."""
    versions = {
        "numerics": str(NUMERICS_VERSION),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
    }
    return Environment(cpu_name(), versions, data_checksum)


def cpu_name() -> str:
    """Return the CPU's model name, or the machine's architecture where the name is not told."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
