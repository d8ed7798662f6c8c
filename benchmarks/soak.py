"""Run sweeps for an hour while things are killed, paused and cancelled: nothing is lost, memory stays flat.

    python -m benchmarks.soak --minutes 60

The whole service, as `ddpsweep serve` starts it, gets sweep after sweep of 120 runs from three teams, two at
a time. Every fifth time the dispatcher is killed in mid-sweep, every seventh sweep is paused and resumed,
every eleventh cancelled and retried, every thirteenth may take the results of those before. Every five
seconds the memory of the API, the supervisor, the dispatcher and the workers is written down, and the size of
the database.

Prints a line a minute; writes out/soak.json and out/soak.png. Ends with 1 if a result differs from the first
sweep's, a sweep does not complete, a lease is stuck, or the API or the supervisor has grown by more than a
tenth since the first tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from sqlalchemy import func, select

from benchmarks.settings import machine, save
from service.cli.embedded import service
from service.client import Client
from service.db.engine import clock, open_engine, read
from service.db.tables import is_running, packs, results, runs

SAMPLE_S: Final = 5.0
SAY_S: Final = 60.0
IN_FLIGHT: Final = 2
KILL, PAUSE, CANCEL, REUSE = 5, 7, 11, 13
TEAMS: Final = {"default": 1.0, "one": 1.0, "two": 2.0}
STUCK_S: Final = 60.0
"""A lease that ran out so long ago should have been taken back."""
GROWTH: Final = 0.1
ROLES: Final = ("API", "supervisor", "dispatcher", "workers")

SPEC: Final[dict[str, Any]] = {
    "name": "soak",
    "dataset": "digits",
    "model": {"kind": "fcn", "hidden": [10, 10, 10, 10]},
    "training": {"steps": 6000, "batch_size": 16, "eval_every": 500},
    "seeds": 10,
    "reuse": False,
    "grids": [{"baseline": "sgd", "learning_rate": [0.4, 0.6, 0.7], "vxx_reg": [5e-5, 1e-4, 1e-3]}],
}


def processes() -> Iterator[tuple[int, int, list[str]]]:
    """Yield the id, the parent's id and the arguments of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text().split("\0")


def resident_mib(pid: int) -> float:
    """Return a process's resident memory; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Family:
    """The processes of the service."""

    supervisor: int

    def members(self) -> dict[str, list[int]]:
        """Return the ids by role."""
        found: dict[str, list[int]] = {
            "supervisor": [self.supervisor],
            "API": [],
            "dispatcher": [],
            "workers": [],
        }
        running = {pid: (parent, command) for pid, parent, command in processes()}
        for pid, (parent, command) in running.items():
            if parent == self.supervisor and "service.processes" in command:
                found["API" if "api" in command else "dispatcher"].append(pid)
            elif command[0].startswith("ray::PackActor") and self._descends(pid, running):
                found["workers"].append(pid)
        return found

    def _descends(self, pid: int, running: dict[int, tuple[int, list[str]]]) -> bool:
        """Tell whether a process descends from the supervisor."""
        while pid in running:
            pid = running[pid][0]
            if pid == self.supervisor:
                return True
        return False

    def memory(self) -> dict[str, float]:
        """Return the resident MiB by role; that of the workers is their mean."""
        return {
            role: float(np.mean([resident_mib(pid) for pid in pids])) if pids else 0.0
            for role, pids in self.members().items()
        }


@dataclass
class Soak:
    """What has happened so far."""

    client: Client
    database: Path
    family: Family
    seconds: float
    started: float = field(default_factory=time.monotonic)
    submitted: int = 0
    kills: int = 0
    completed: int = 0
    cancelled: int = 0
    reused: int = 0
    samples: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wanted: list[Any] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def run(self) -> None:
        """Submit, disturb, look, until the time is over and all is done."""
        for team, weight in TEAMS.items():
            self.client.put_team(team, weight=weight)
        said = 0.0
        while self.elapsed() < self.seconds or self.open:
            while len(self.open) < IN_FLIGHT and self.elapsed() < self.seconds:
                self._submit()
            self._look()
            self._sample()
            if self.elapsed() - said >= SAY_S:
                said = self.elapsed()
                self._say()
            time.sleep(0.5)
        self._say()

    def _submit(self) -> None:
        self.submitted += 1
        again = self.submitted % REUSE == 0
        team = list(TEAMS)[self.submitted % len(TEAMS)]
        body = json.dumps(SPEC | {"reuse": again}).encode()
        sweep_id = self.client.submit(body, "application/json", team=team)["id"]
        self.open[sweep_id] = self.submitted

    def _look(self) -> None:
        for sweep_id, number in list(self.open.items()):
            sweep = self.client.sweep(sweep_id)
            state = sweep["state"]
            if state in ("completed", "failed"):
                del self.open[sweep_id]
                self._ended(sweep)
            elif state == "cancelled":
                self.cancelled += 1
                self.client.retry(sweep_id)
            elif state == "paused":
                self.client.resume(sweep_id)
            elif state == "running" and sweep["progress"]["run_steps_done"] > 0:
                self._disturb(sweep_id, number)

    def _disturb(self, sweep_id: str, number: int) -> None:
        """Do once to a sweep what its number says."""
        if number < 0:
            return
        self.open[sweep_id] = -1
        if number % KILL == 0 and (found := self.family.members()["dispatcher"]):
            os.kill(found[0], signal.SIGKILL)
            self.kills += 1
        if number % PAUSE == 0:
            self.client.pause(sweep_id)
        if number % CANCEL == 0:
            self.client.cancel(sweep_id)

    def _ended(self, sweep: dict[str, Any]) -> None:
        self.completed += sweep["state"] == "completed"
        self.reused += sweep["progress"]["runs_reused"]
        keys = ("method", "learning_rate", "vxx_reg", "seed", "weights_digest", "train_loss")
        found = [tuple(run[key] for key in keys) for run in self.client.runs(sweep["id"])]
        self.wanted = self.wanted or found
        if sweep["state"] != "completed":
            self.problems.append(f"sweep {sweep['id']} {sweep['state']}: {sweep['error']}")
        if found != self.wanted:
            self.problems.append(f"sweep {sweep['id']}: its results differ")

    def _sample(self) -> None:
        if self.samples and self.elapsed() - self.samples[-1]["seconds"] < SAMPLE_S:
            return
        size = sum(path.stat().st_size for path in self.database.parent.glob("ddpsweep.db*")) / 2**20
        self.samples.append(
            {"seconds": self.elapsed(), "database": size, "stuck": float(self._stuck())}
            | self.family.memory()
        )

    def _stuck(self) -> int:
        engine = open_engine(f"sqlite:///{self.database}")
        with read(engine) as connection:
            late = select(func.count()).where(is_running, packs.c.lease_until < clock() - STUCK_S)
            found = int(connection.execute(late).scalar_one())
        engine.dispose()
        return found

    def recorded(self) -> tuple[int, int]:
        """Return the runs that are stored, and the results."""
        engine = open_engine(f"sqlite:///{self.database}")
        with read(engine) as connection:
            counts = [
                connection.execute(select(func.count()).select_from(t)).scalar_one() for t in (runs, results)
            ]
        engine.dispose()
        return counts[0], counts[1]

    def growth(self, role: str) -> float:
        """Return by how much a role's memory grew from the second tenth of the time to the last."""
        values = np.array([sample[role] for sample in self.samples if sample[role] > 0])
        tenth = max(1, len(values) // 10)
        return float(np.median(values[-tenth:]) / np.median(values[tenth : 2 * tenth]) - 1)

    def _say(self) -> None:
        last = self.samples[-1]
        memory = ", ".join(
            f"{role} {last[role]:.0f}" for role in ("API", "supervisor", "dispatcher", "workers")
        )
        print(
            f"{self.elapsed() / 60:5.1f} min: {self.completed} of {self.submitted} sweeps completed, "
            f"{self.kills} kills, {self.cancelled} cancelled, {self.reused} runs reused; MiB: {memory}, "
            f"database {last['database']:.0f}",
            flush=True,
        )

    def judge(self) -> list[str]:
        """Return all that is wrong."""
        stored, recorded = self.recorded()
        found = list(self.problems)
        if stored != recorded:
            found.append(f"{stored} runs, {recorded} results")
        if any(sample["stuck"] for sample in self.samples):
            found.append("a lease was stuck")
        growing = [role for role in ("API", "supervisor") if self.growth(role) > GROWTH]
        return found + [f"the {role} grew by {self.growth(role):.0%}" for role in growing]


def draw(samples: list[dict[str, float]], path: Path) -> None:
    """Draw memory over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for role in ("dispatcher", "workers", "API", "supervisor"):
        axes.plot(minutes, [sample[role] or np.nan for sample in samples], label=role, linewidth=1)
    axes.plot(minutes, [sample["database"] for sample in samples], "k:", label="database (file)", linewidth=1)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Soak, print and save; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, service(Path(home)) as url, Client(url) as client:
        supervisor = next(
            pid for pid, parent, command in processes() if "serve" in command and parent == os.getpid()
        )
        soak = Soak(client, Path(home) / "ddpsweep.db", Family(supervisor), 60 * arguments.minutes)
        soak.run()
        problems = soak.judge()
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(soak.samples, arguments.out / "soak.png")
    kept = ("submitted", "completed", "kills", "cancelled", "reused", "problems", "samples")
    growth = {role: soak.growth(role) for role in ("API", "supervisor", "workers")}
    facts = {key: getattr(soak, key) for key in kept}
    save(arguments.out / "soak.json", {"machine": machine(), "growth": growth} | facts)
    print("; ".join(problems) or f"nothing lost, nothing stuck; growth {growth}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
