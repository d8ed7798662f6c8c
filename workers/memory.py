"""How much memory a worker may take, and what it looks like when there is none left."""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Final

import torch

log = logging.getLogger(__name__)

MESSAGES: Final = (
    *("allocate memory", "not enough memory", "out of memory", "cannot allocate"),
    "could not create a primitive",  # of oneDNN, which says no more
)
"""Of errors that torch raises as plain RuntimeErrors."""


def limit(nbytes: int) -> None:
    """Let this process take so many bytes more than it has, and no more.

    An allocation beyond that fails, which splits a pack; without a limit the kernel would kill some process
    of the machine instead, perhaps another one. Where the system does not say how much a process has, as
    outside of Linux, nothing is limited.
    """
    held = _held()
    if held is None:
        log.warning("this system does not tell a process's memory: it is not limited")
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + nbytes
    resource.setrlimit(
        resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
    )


def is_exhausted(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MESSAGES)


def _held() -> int | None:
    """Return the bytes that count against RLIMIT_DATA."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return next((int(kib) * 1024 for kib in found), None)
