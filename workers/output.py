"""What an attempt writes: caught where the system takes it, so that C code and loggers are in it too."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import stat
import sys
import tempfile
from typing import Final, Protocol

from workers.protocol import LOG_BYTES

MOST_BYTES: Final = 4 * 2**20
"""A file that has grown beyond that is emptied once it is read."""

LOGGERS: Final = ("ddpnopt", "workers")
LINE: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Output(Protocol):
    """Where an attempt's text comes from."""

    def take(self) -> str:
        """Return what was written since the last time: its end, `LOG_BYTES` at the most."""
        ...

    def trim(self) -> None:
        """Let go of what nobody will ask for; called every few seconds."""
        ...


class Silence:
    """Nothing."""

    def take(self) -> str:
        """See `Output`."""
        return ""

    def trim(self) -> None:
        """See `Output`."""


class StandardStreams:
    """What this process writes to stdout and stderr, from now on and for good, in one order.

    Ray gives a worker a file for each stream. Both go to that of stderr here, and are read from there, so
    that what a crash says last is still found where Ray keeps it. Elsewhere they go to a file without a name.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if _is_appended_to(2):
            self._file = os.open("/proc/self/fd/2", os.O_RDONLY)
            os.dup2(2, 1)
        else:
            self._file = _nameless()
            os.dup2(self._file, 1)
            os.dup2(self._file, 2)
        self._seen = os.fstat(self._file).st_size
        self._before = b""
        self._c = ctypes.CDLL(None)

    def take(self) -> str:
        """See `Output`."""
        self._read()
        text, self._before = clean(self._before), b""
        return text

    def trim(self) -> None:
        """See `Output`."""
        if os.fstat(self._file).st_size > MOST_BYTES:
            self._read()

    def _read(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._c.fflush(None)
        size = os.fstat(self._file).st_size
        start = max(self._seen, size - LOG_BYTES)
        read = os.pread(self._file, size - start, start) if size > start else b""
        self._before = (self._before + read)[-LOG_BYTES:]
        self._seen = size
        if size > MOST_BYTES:
            # Whoever writes appends, so nothing is left but an empty file that fills again.
            os.ftruncate(2, 0)
            self._seen = 0


class LoggedOnly(logging.Handler):
    """What the project's loggers say, where the streams of the process are not this attempt's alone."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(LINE))
        self._text = b""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's line."""
        line = self.format(record) + "\n"
        self._text = (self._text + line.encode("utf-8", "replace"))[-LOG_BYTES:]

    def take(self) -> str:
        """See `Output`."""
        text, self._text = clean(self._text), b""
        return text

    def trim(self) -> None:
        """See `Output`."""

    def __enter__(self) -> None:
        """Listen."""
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)


def log_to_stderr() -> None:
    """Let this process's loggers write: the project's what is of interest, all others what is wrong."""
    logging.basicConfig(level=logging.WARNING, format=LINE)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)


def clean(written: bytes) -> str:
    """Return bytes as text that any database takes: the end of it, `LOG_BYTES` in UTF-8 at the most."""
    text = written[-LOG_BYTES:].decode("utf-8", "replace").replace("\0", "\ufffd")
    return text.encode()[-LOG_BYTES:].decode("utf-8", "ignore")


def _is_appended_to(stream: int) -> bool:
    """Tell whether a stream goes to a file of which what was read can be cut off while others write."""
    if not stat.S_ISREG(os.fstat(stream).st_mode) or not os.path.exists("/proc/self/fd"):
        return False
    return bool(fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_APPEND)


def _nameless() -> int:
    handle, name = tempfile.mkstemp(prefix="ddpsweep-")
    os.unlink(name)
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | os.O_APPEND)
    return handle
