"""What torch allocates on the CPU, from the profiler's record of every allocation."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

Event = dict[str, Any]


def recorded(work: Callable[[], None]) -> list[Event]:
    """Do some work; return the events of the profiler's record of it.

    What C++ writes to standard error meanwhile is dropped: the profiler has a line for every start and stop.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _without_messages(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[Event] = json.loads(trace.read_text())["traceEvents"]
    return events


def changes(events: Sequence[Event]) -> list[tuple[float, int]]:
    """Return when torch's CPU allocator gave how many bytes, or took them back, in order of time."""
    return sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")


def peak(work: Callable[[], None]) -> int:
    """Do some work; return the most bytes that torch's CPU allocator held of what it allocated in it."""
    sizes = [size for _, size in changes(recorded(work))]
    return int(max(np.cumsum(sizes), default=0))


@contextmanager
def _without_messages() -> Iterator[None]:
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(sink)
        os.close(kept)
