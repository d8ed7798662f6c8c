"""The command line against a real service; foreseen errors are one line with the right exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from service.db import schema
from service.db.engine import open_engine, write
from tests.conftest import EXAMPLES
from tests.system.conftest import DDPSWEEP, Running

pytestmark = pytest.mark.ray


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DDPSWEEP, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def one_line_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_submit_list_show_heatmap(service: Running, tmp_path: Path) -> None:
    done = service.cli("submit", str(EXAMPLES / "wine-small.yaml"), "--watch")
    assert done.returncode == 0, done.stderr
    sweep_id = done.stdout.split()[0]
    assert "18/18 runs" in done.stdout
    assert sweep_id in service.cli("list").stdout
    assert [sweep["id"] for sweep in json.loads(service.cli("list", "--json").stdout)] == [sweep_id]
    shown = service.cli("show", sweep_id).stdout
    assert "DDPNOpt vs SGD: training loss" in shown
    assert "18/18" in shown
    assert json.loads(service.cli("show", sweep_id, "--json").stdout)["state"] == "completed"
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>", "json": b"["}
    for suffix, start in starts.items():
        path = tmp_path / "deep" / f"a.{suffix}"
        done = service.cli("heatmap", sweep_id, "--out", str(path))
        assert done.returncode == 0, done.stderr
        assert path.read_bytes().startswith(start)
    again = tmp_path / "again.png"
    service.cli("heatmap", sweep_id, "--out", str(again))
    assert again.read_bytes() == (tmp_path / "deep" / "a.png").read_bytes()
    path = tmp_path / "one.json"
    service.cli("heatmap", sweep_id, "--out", str(path), "--metric", "accuracy")
    assert json.loads(path.read_text())["metric"] == "accuracy"


def test_validate_stores_nothing(service: Running) -> None:
    before = service.cli("list").stdout
    done = service.cli("validate", str(EXAMPLES / "digits-fig4a-sgd.yaml"))
    # How many packs depends on the machine's cores.
    assert re.match(r"200 runs in [1-4] packs, 300,000 run-steps", done.stdout)
    assert service.cli("list").stdout == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- 1", "document: got [1]"),
        ("name: !!python/name:os.system", "tag"),
        ("seeds: 0", "seeds: got 0; allowed: greater than or equal to 1"),
        ("learning_rate: [1]", "learning_rate: got [1]; allowed: one of the keys name,"),
    ],
)
def test_a_bad_spec_is_one_line_and_exit_2(service: Running, text: str, named: str) -> None:
    document: Any = yaml.safe_load((EXAMPLES / "wine-small.yaml").read_text())
    if text.partition(":")[0] in ("seeds", "learning_rate"):
        text = yaml.safe_dump(document | yaml.safe_load(text))
    for command in ("submit", "validate"):
        assert named in one_line_error(service.cli(command, "-", stdin=text), 2)


def test_other_bad_input(service: Running, tmp_path: Path) -> None:
    assert "No such file" in one_line_error(service.cli("submit", str(tmp_path / "no.yaml")), 2)
    for sweep_id in ("nothere", "", "spec.schema.json", "a/../.."):
        assert f"no sweep {sweep_id!r}" in one_line_error(service.cli("show", sweep_id), 1)
    error = one_line_error(service.cli("heatmap", "x", "--out", str(tmp_path / "a.gif")), 2)
    assert "allowed: a name that ends in .png" in error
    assert service.cli("heatmap").returncode == 2
    assert service.cli("nonsense").returncode == 2


def test_a_proxy_does_not_stand_before_loopback(service: Running) -> None:
    done = run("list", DDPSWEEP_URL=service.url, HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="")
    assert done.returncode == 0, done.stderr


def test_no_server_is_one_line() -> None:
    done = run("list", DDPSWEEP_URL="http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in one_line_error(done, 1)


def test_version_and_doctor(service: Running) -> None:
    assert run("--version").stdout.startswith("ddpsweep ")
    done = service.cli("doctor")
    assert done.returncode == 0, done.stdout
    assert f"server     {service.url}: ready" in done.stdout


def test_a_port_in_use_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        home = tmp_path / "h"
        done = run("serve", "--port", str(taken.getsockname()[1]), DDPSWEEP_HOME=str(home))
    assert "Address already in use" in one_line_error(done, 1)
    assert not home.exists()


@pytest.mark.parametrize("role", ["all", "api", "dispatcher"])
def test_an_unwritable_home_is_one_line(tmp_path: Path, role: str) -> None:
    (tmp_path / "file").touch()
    done = run("serve", "--port", "0", "--role", role, DDPSWEEP_HOME=str(tmp_path / "file" / "home"))
    assert "cannot be written: Not a directory" in one_line_error(done, 1)


@pytest.mark.parametrize("role", ["all", "api", "dispatcher"])
def test_a_newer_database_is_one_line(tmp_path: Path, role: str) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'ddpsweep.db'}")
    schema.upgrade(engine)
    with write(engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    done = run("serve", "--port", "0", "--role", role, DDPSWEEP_HOME=str(tmp_path))
    assert "written by a newer ddpsweep" in one_line_error(done, 1)
    assert "newer" in one_line_error(run("db", "upgrade", DDPSWEEP_HOME=str(tmp_path)), 1)


def test_strangers_are_kept_out() -> None:
    assert "loopback only" in one_line_error(run("serve", "--host", "0.0.0.0", "--port", "0"), 1)


def test_a_bad_setting_is_one_line() -> None:
    assert "DDPSWEEP_SLOTS: got '0'" in one_line_error(run("serve", DDPSWEEP_SLOTS="0"), 2)


def test_db_commands(tmp_path: Path) -> None:
    home = str(tmp_path / "h")
    assert "run `ddpsweep db upgrade`" in one_line_error(run("serve", "--role", "api", DDPSWEEP_HOME=home), 1)
    assert run("db", "upgrade", DDPSWEEP_HOME=home).stdout == f"empty -> {schema.head()}\n"
    assert run("db", "upgrade", DDPSWEEP_HOME=home).stdout == f"{schema.head()}: nothing to do\n"
    assert run("db", "check", DDPSWEEP_HOME=home).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_of_ones_own_ends_with_its_owner(number: signal.Signals, tmp_path: Path) -> None:
    """However that ends: one left behind would take the packs of the next one over the same home."""
    script = (
        "import sys, time; from pathlib import Path; from service.cli.embedded import service\n"
        "with service(Path(sys.argv[1])) as url:\n    print(url, flush=True)\n    time.sleep(120)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline().startswith("http://")
    (served,) = psutil.Process(owner.pid).children()
    parts = [served, *served.children(recursive=True)]
    owner.send_signal(number)
    assert owner.wait(60) == {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}[number]
    _, left = psutil.wait_procs(parts, timeout=60)
    assert left == []


def test_reproduce_on_a_server_of_its_own_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    command = [*DDPSWEEP, "reproduce", "fig9", "--quick", "--out", str(tmp_path / "report")]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, and nobody answers
        environment = os.environ | {"DDPSWEEP_HOME": str(tmp_path / "home"), "DDPSWEEP_URL": url}
        stopped = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert stopped.stdout is not None
        said = stopped.stdout.readline()
        assert said.startswith("on a server of its own"), said
        while not said.startswith("  fig9"):
            said = stopped.stdout.readline()
            assert said
        stopped.terminate()
        assert stopped.wait(60) == 128 + signal.SIGTERM
        assert not (tmp_path / "report" / "report.html").exists()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "60/60 runs" in done.stdout
    assert {"report.html", "report.pdf", "fig9.png"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }
    with write(open_engine(f"sqlite:///{tmp_path / 'home' / 'ddpsweep.db'}")) as connection:
        assert connection.exec_driver_sql("select count(*) from sweeps").scalar_one() == 1
