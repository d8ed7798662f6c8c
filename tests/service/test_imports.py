"""Importing the API loads neither torch nor ray, and works where they are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "sklearn")
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError(name + " is not to be imported here")
sys.meta_path.insert(0, Blocker())
import {module}
assert not [name for name in {heavy!r} if name in sys.modules]
"""


@pytest.mark.parametrize(
    "module",
    ["service.app", "service.cli.main", "service.client", "service.processes", "service.dispatch.main"],
)
def test_the_service_imports_without_torch_and_ray(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(heavy=HEAVY, module=module)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
