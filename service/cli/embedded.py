"""A service of one's own for a while: `ddpsweep serve` in processes that end with who started them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from service.client import Client
from service.errors import SetupError

START_S: Final = 60
STOP_S: Final = 30


@contextmanager
def service(home: Path, **settings: str) -> Iterator[str]:
    """Run `ddpsweep serve` with some settings on a free port and yield its URL.

    It ends with the block and with this process, however that ends: it reads from a pipe that is held open
    here, as its own children do (`service.processes`). SIGTERM unwinds the block.

    Args:
        home: its folder, made if need be; its log is `serve.log` there.
        settings: by the names of their variables.

    Raises:
        SetupError: if it does not start.
    """
    environment = {name: value for name, value in os.environ.items() if name != "DDPSWEEP_DATABASE_URL"}
    environment |= {"DDPSWEEP_HOME": str(home)} | settings
    home.mkdir(parents=True, exist_ok=True)
    # Appended to: another of these may run over the same home.
    with (home / "serve.log").open("a") as log, _sigterm_as_exit(), _pipe() as lifeline:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--port", "0", "--lifeline", str(lifeline)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=(lifeline,),
        )
        try:
            yield _url(process, home)
        finally:
            _end(process)


@contextmanager
def _pipe() -> Iterator[int]:
    """Yield the end of a pipe that another process may read from, as long as this one lives."""
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack. Only the main thread may say so, and only what nobody else handles."""
    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and before is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _url(process: subprocess.Popen[str], home: Path) -> str:
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if found is None:
        raise SetupError(f"the service did not start: {_end_of_log(home)}")
    with Client(found.group()) as client:
        for _ in range(START_S * 5):
            if client.ready():
                return found.group()
            time.sleep(0.2)
    raise SetupError(f"the service was not ready within {START_S} s: {_end_of_log(home)}")


def _end_of_log(home: Path) -> str:
    lines = (home / "serve.log").read_text().strip().splitlines()
    return f"{lines[-1] if lines else 'it wrote nothing'} (all of it: {home / 'serve.log'})"
