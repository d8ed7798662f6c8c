"""A pack's state in a file: written whole or not at all, and read back only by the very same pack."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ddpnopt.config import RunConfig

log = logging.getLogger(__name__)

FORMAT: Final = 2
EVERY_S: Final = 60.0
STALE_S: Final = 30 * 86400.0
PARTIAL: Final = ".part"
DIGEST_BYTES: Final = 32
"""SHA-256 of the rest, with which a file begins."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A folder of packs' states, each in a file that is named by the pack's key.

    Whoever trains the same pack may use the same file, at the same time too: all write the same states.

    Attributes:
        folder: made when first written to.
        every: seconds of training between two writes.
        owner: how the names of the files begin, which keeps apart those of equal packs.
    """

    folder: Path
    every: float = EVERY_S
    owner: str = ""

    def path(self, key: str) -> Path:
        """Return a pack's file."""
        return self.folder / f"{self.owner}{key[:32]}.pt"

    def save(self, key: str, state: dict[str, Any]) -> None:
        """Write a pack's state; whatever happens, the file holds the last one or this one.

        Raises:
            OSError: if the file cannot be written.
        """
        path = self.path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=PARTIAL)
        try:
            content = io.BytesIO()
            torch.save({"key": key, "state": state}, content)
            with os.fdopen(handle, "wb") as file:
                file.write(sealed(content.getvalue()))
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self, key: str) -> dict[str, Any] | None:
        """Return the state that was saved under a key; None if there is none that can be used."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            if sealed(content[DIGEST_BYTES:]) != content:
                raise ValueError("its checksum is wrong")
            found = torch.load(io.BytesIO(content[DIGEST_BYTES:]), weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # what a spoilt file raises depends on where it is spoilt
            log.warning("the checkpoint %s cannot be read, the pack starts afresh: %s", path, error)
            return None
        if not isinstance(found, dict) or found.get("key") != key:
            log.warning("the checkpoint %s is not this pack's; the pack starts afresh", path)
            return None
        state: dict[str, Any] = found["state"]
        return state

    def discard(self, key: str) -> None:
        """Remove a pack's file, if it is there."""
        self.path(key).unlink(missing_ok=True)

    def sweep(self, older_than: float = STALE_S) -> int:
        """Remove files that nobody has written to for so many seconds; return their number.

        They are what packs have left that were cancelled, or whose worker died and that nobody tried again.
        """
        before, removed = time.time() - older_than, 0
        for path in [*self.folder.glob("*.pt"), *self.folder.glob(f"*{PARTIAL}")]:
            try:
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:  # another worker was faster
                continue
        return removed


def sealed(content: bytes) -> bytes:
    """Return a file's bytes: the content after its checksum, since torch takes a flipped bit for a weight."""
    return hashlib.sha256(content).digest() + content


def key_of(runs: Sequence[RunConfig], *circumstances: str) -> str:
    """Name a pack by all that decides its results: its runs, and the circumstances that decide their bits."""
    # The text of a frozen dataclass names every field and has its floats in full; plain JSON takes longer.
    document = [FORMAT, list(map(repr, runs)), circumstances]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
