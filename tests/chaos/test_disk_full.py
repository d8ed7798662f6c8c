"""T6: the disk gets full under SQLite. What was acknowledged is kept; the rest goes on once there is room."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.scale import SCALE, TIMEOUT_S

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

ROOT = Path(__file__).parent.parent.parent
OWN_MOUNTS = ["unshare", "-rm"]


def why_not(disk: Path) -> str:
    """Say why no small disk can be had here; nothing if it can."""
    if shutil.which(OWN_MOUNTS[0]) is None:
        return "there is no unshare"
    trial = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    done = subprocess.run([*OWN_MOUNTS, *trial], capture_output=True, text=True)
    return done.stderr.strip()


def test_t6_disk_full(tmp_path: Path, say: Callable[[str], None]) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    elsewhere.mkdir()
    if reason := why_not(disk):
        pytest.skip(f"no mount namespace of its own: {reason}")
    script = [sys.executable, "-m", "tests.chaos.disk_full", str(disk), str(elsewhere), str(SCALE.fillings)]
    done = subprocess.run([*OWN_MOUNTS, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    counts = json.loads(done.stdout)
    say(
        f"T6 sqlite: a disk of 4 MB full {SCALE.fillings} times, {counts['kept while full']} sweeps "
        f"acknowledged before and while full, 0 lost; {counts['503']} answers of 503, none of 500; "
        f"{counts['warnings']} rounds of the dispatcher put off; resumed by itself {SCALE.fillings} times"
    )
    assert counts["503"] >= SCALE.fillings
    assert counts["warnings"] > 0
