"""What may be imported without what, each in a Python of its own that lacks the blocked packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Blocked:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked(frozenset(sys.argv[1].split(","))))
"""

WALK = """
import importlib, pkgutil, ddpnopt
names = [m.name for m in pkgutil.walk_packages(ddpnopt.__path__, "ddpnopt.", onerror=print)]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def python(blocked: str, program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + program, blocked]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    ["ddpnopt.config", "ddpnopt.dense", "ddpnopt.results", "ddpnopt.datasets.catalog", "workers.protocol"],
)
def test_what_the_service_sees_needs_no_tensor_library(module):
    done = python("torch,ray,fastapi,sqlalchemy,sklearn,pydantic", f"import {module}")
    assert done.returncode == 0, done.stderr


def test_the_numerics_know_nothing_of_ray_sql_or_http():
    done = python("ray,fastapi,starlette,sqlalchemy,pydantic,httpx,service,workers", WALK)
    assert done.returncode == 0, done.stderr
    assert {"ddpnopt.pack.engine", "ddpnopt.optimizers.ddpnopt", "ddpnopt.datasets.wine"} <= set(
        done.stdout.split()
    )


def test_what_a_worker_runs_needs_no_service():
    done = python(
        "fastapi,starlette,sqlalchemy,pydantic,httpx,service", "import workers.runner, workers.local"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("blocked", "program"), [("torch", "import ddpnopt.linalg"), ("ray", "import ray")])
def test_the_block_would_notice(blocked, program):
    done = python(blocked, program)
    assert done.returncode == 1
    assert f"{blocked} is blocked" in done.stderr
