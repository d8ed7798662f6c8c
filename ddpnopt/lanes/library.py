"""Compile `kernel.c` for this machine, once, and load it. Without a compiler there are no lanes.

The kernel is plain C of this package, handed to the system's compiler (`CC`, else cc, gcc or clang), and kept
in the user's cache under a name that says what it was made from. Nothing else is ever loaded from there.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ddpnopt.config import MAX_DEPTH, DType

log = logging.getLogger(__name__)

VARIABLE: Final = "DDPSWEEP_LANES"
"""`0` in this variable of the environment switches lanes off."""

SOURCE: Final = Path(__file__).with_name("kernel.c")
FLAGS: Final = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared"),
    # A product and a sum may become one instruction; nothing else of IEEE's arithmetic is given up.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
DEFINES: Final[dict[DType, tuple[str, ...]]] = {"float32": (), "float64": ("-DDOUBLE",)}
COMPILE_SECONDS: Final = 120


class Program(ctypes.Structure):
    """What the runs of a block share: `program` of kernel.c."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("layers", "batch", "hidden_activation", "output_activation", "loss"),
                *("preconditioner", "form", "exact_hessian", "psd", "per_sample_moment"),
                *("has_decay", "has_momentum", "has_reg", "baseline"),
            )
        ),
        *((name, c_double) for name in ("share", "weight", "to_loss")),
        ("widths", POINTER(c_int32)),
        ("centers", c_void_p),
    ]


class Block(ctypes.Structure):
    """One block of runs: `block` of kernel.c."""

    _fields_ = [
        *((name, c_void_p * 2) for name in ("u", "velocity", "moment1", "moment2")),
        *(
            (name, c_void_p)
            for name in (
                *("rates", "betas", "seed_row", "last_loss", "loss", "running"),
                *("alive", "bad_loss", "bad_controls"),
            )
        ),
        ("current", c_int64),
    ]


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled kernel for one kind of numbers.

    Attributes:
        lanes: runs of a block.
        name: what it was made by and for; part of what decides a result's bits.
        functions: of kernel.c, with their argument types.
    """

    lanes: int
    name: str
    functions: Any


@lru_cache(maxsize=2)
def library(dtype: DType) -> Library | None:
    """Return the kernel for a kind of numbers; None if it is switched off or (it is logged) not to be had."""
    if os.environ.get(VARIABLE) == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        log.warning("no C compiler: small nets train without the fast path (install gcc, or set CC)")
        return None
    try:
        path, name = _compiled(compiler, dtype)
        functions = _loaded(path)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the fast path could not be compiled, and is not used: %s", error)
        return None
    if functions.most_layers() <= MAX_DEPTH:
        raise AssertionError("kernel.c has less room for layers than config.MAX_DEPTH allows")
    return Library(functions.lanes(), name, functions)


def _compiler() -> str | None:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _compiled(compiler: str, dtype: DType) -> tuple[Path, str]:
    """Return the library's file, compiling it if it is not there, and its name."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
    ).stdout.partition("\n")[0]
    command = [compiler, *FLAGS, *DEFINES[dtype]]
    made_from = "\n".join([SOURCE.read_text(), version, *command, _instructions()])
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    path = _cache() / f"lanes-{dtype}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made), "-lm"],
                check=False,
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
            )
            if done.returncode:
                raise OSError(f"{compiler}: {done.stderr.strip()[-500:]}")
            # Another process may do the same: whoever comes last puts the same bytes there.
            made.replace(path)
    return path, f"lanes {key} ({version})"


def _instructions() -> str:
    """Return what decides the code for `-march=native`: the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path:
    try:  # Path.home() raises a RuntimeError for a user who has none
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(home) / "ddpnopt"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError) as error:
        log.info("no cache of compiled code: %s", error)
    return Path(tempfile.mkdtemp(prefix="ddpnopt-"))


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # a spoilt file would stand in the way for ever
        raise
    functions.lanes.restype = functions.most_layers.restype = c_int32
    functions.workspace.restype = functions.controls.restype = functions.train.restype = c_int64
    functions.evaluate.restype = functions.eigh.restype = None
    functions.eigh.argtypes = [c_int32, c_int32, c_void_p, c_void_p, c_void_p]
    for function in (functions.workspace, functions.controls):
        function.argtypes = [POINTER(Program)]
    functions.train.argtypes = [
        *(POINTER(Program), POINTER(Block), c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64),
    ]
    functions.evaluate.argtypes = [
        *(POINTER(Program), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
    ]
    return functions
