"""The dispatcher's process ends even where a call into a lost Ray never returns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from service.config import Settings
from service.db import schema
from service.db.engine import open_engine
from service.dispatch.main import EXIT_LOST
from tests.service.helpers import pack_rows, submit

STUCK = """
import sys, time, types
from workers.protocol import Node, Pool
class RayExecutor:
    cluster = "stuck"
    def __init__(self, *_, **__): self.task = None
    def problem(self): return "its node is gone" if self.task else None
    def nodes(self): return [Node("n", "here", Pool(), 1)]
    def backlog(self): return 0
    def submit(self, task):
        self.task = task
        time.sleep(600)
sys.modules["workers.ray_executor"] = types.SimpleNamespace(RayExecutor=RayExecutor)
from service.config import Settings
from service.dispatch.main import run
run(Settings(), "stuck")
"""


def test_a_call_that_hangs_does_not_keep_the_packs(small_spec: dict[str, object], tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    engine = open_engine(settings.resolved_database_url())
    schema.upgrade(engine)
    submit(engine, small_spec)
    environment = os.environ | {"DDPSWEEP_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", STUCK], env=environment, timeout=60, capture_output=True)
    assert done.returncode == EXIT_LOST, done.stderr
    (pack,) = pack_rows(engine)
    assert (pack.state, pack.attempt, pack.lease_owner) == ("queued", 1, None)
