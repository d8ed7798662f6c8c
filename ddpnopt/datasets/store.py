"""Where the files of datasets are that no package carries: one folder each, below one directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ddpnopt.errors import DataError

VARIABLE: Final = "DDPSWEEP_DATA"


def directory() -> Path:
    """Return `$DDPSWEEP_DATA`; if that is not set, `ddpsweep/data` in the user's cache folder.

    Raises:
        DataError: if neither is known.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:
            raise DataError(f"no folder for datasets: {error}; set {VARIABLE} to one") from error
    return cache / "ddpsweep" / "data"


def first_of(folder: Path, *names: str) -> Path | None:
    """Return the path of the first of these that exists in a folder."""
    # os.path.exists, since Path.exists raises if the folder may not be entered.
    return next((folder / name for name in names if os.path.exists(folder / name)), None)
