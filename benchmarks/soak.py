"""Run sweeps for a while, killing the dispatcher now and then: nothing may be lost, and memory stay flat.

    python -m benchmarks.soak --minutes 10

Prints a line for every sweep: results recorded, kills so far, memory of the API and of the supervisor. Ends
with 1 if a run is missing or its result differs from the first sweep's.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from examples.demo import service
from service.client import Client

SPEC: Final = Path(__file__).parent.parent / "examples" / "wine-small.yaml"
KILL_EVERY: Final = 5


def processes() -> Iterator[tuple[int, list[str]]]:
    """Yield the id and the arguments of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), (folder / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue


def child_of(parent: int, role: str) -> int | None:
    """Return the process id of the service's API or dispatcher."""
    for pid, command in processes():
        if "service.processes" in command and role in command and _parent(pid) == parent:
            return pid
    return None


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def resident_mib(pid: int) -> float:
    """Return a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def digests(client: Client, sweep_id: str) -> list[Any]:
    """Return what identifies each run's result, in the order of the plan."""
    return [
        (r["method"], r["learning_rate"], r["vxx_reg"], r["seed"], r["weights_digest"])
        for r in client.runs(sweep_id)
    ]


def soak(seconds: float) -> int:
    """Run the soak; return the exit code."""
    until = time.monotonic() + seconds
    sweeps = kills = 0
    wanted: list[Any] = []
    with tempfile.TemporaryDirectory() as home, service(Path(home)) as url, Client(url) as client:
        supervisor = next(
            pid for pid, command in processes() if "serve" in command and _parent(pid) == os.getpid()
        )
        while time.monotonic() < until:
            sweep_id = client.submit(SPEC.read_bytes())["id"]
            if sweeps % KILL_EVERY == KILL_EVERY - 1 and (dispatcher := child_of(supervisor, "dispatcher")):
                os.kill(dispatcher, signal.SIGKILL)
                kills += 1
            last = list(client.watch(sweep_id))[-1]
            found = digests(client, sweep_id)
            wanted = wanted or found
            sweeps += 1
            api = child_of(supervisor, "api")
            memory = f"API {resident_mib(api):.0f} MiB, " if api else ""
            print(
                f"{sweeps} sweeps, {kills} kills, {last['progress']['runs_done']} runs recorded, "
                f"{memory}supervisor {resident_mib(supervisor):.0f} MiB",
                flush=True,
            )
            if last["state"] != "completed" or found != wanted:
                print(
                    f"sweep {sweep_id}: {last['state']}, results {'differ' if found != wanted else 'agree'}"
                )
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    sys.exit(soak(60 * parser.parse_args().minutes))
