"""Simulate the dispatcher's fair share: a discrete-event cluster whose devices `schedule` gives out.

    python -m benchmarks.fairness

Nothing is trained and no clock is read but for the CPU time of a decision: packs have lengths drawn from
log-normal distributions, estimates of these are wrong, and the seeds are fixed. Prints tables; writes
out/bench-fairness.json.

- crowd: 10,000 sweeps on 1,000 devices. A hog submits 20,000 packs, a minute before all others; teams
  of weights 1, 2 and 4 have more to do than their share; of one the estimates are three times too low, of
  another three times too high; a team submits small sweeps now and then.
- few: 2, 3 and 8 devices under teams of weights 1, 2 and 4.
- quota: a team that may hold 5 of 40 devices.
- return: a team that was away for an hour comes back to 40 devices.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.settings import machine, save
from service.dispatch.fairness import (
    Decision,
    Running,
    Snapshot,
    Team,
    Waiting,
    correction,
    schedule,
)
from workers.protocol import Pool

STOP_S: Final = 3.0
"""From asking a pack to stop until its device is free."""
LOST_S: Final = 5.0
"""What a stopped pack has to do again, with what it takes to start."""
FIRST_SWEEPS: Final = 100
"""Of each team, what the database hands to a decision."""
POOL: Final = Pool("gpu", "H100")


@dataclass(frozen=True, slots=True)
class Load:
    """What a team submits: sweeps of `packs` packs each, at `start` and then every `every` seconds.

    Attributes:
        team: whose.
        sweeps: how many.
        packs: of each.
        seconds: median length of a pack.
        spread: standard deviation of its logarithm.
        bias: factor of all estimates; each is wrong by another, random one.
        start: when the first sweep comes.
        every: seconds between sweeps; 0 for all at once.
    """

    team: str
    sweeps: int
    packs: int
    seconds: float
    spread: float = 0.5
    bias: float = 1.0
    start: float = 0.0
    every: float = 0.0


@dataclass(slots=True)
class Sweep:
    """A sweep in the simulated database; `left` holds seconds of each pack not yet claimed."""

    name: str
    team: str
    created_at: float
    estimate: float
    left: deque[float]
    running: int = 0
    since: float = 0.0
    waits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Attempt:
    """A pack that holds a device."""

    pack_id: int
    sweep: Sweep
    start: float
    seconds: float
    charged: float
    ends: float
    stopping: bool = False


class Cluster:
    """Devices, a queue, and a dispatcher that decides every `tick` seconds."""

    def __init__(
        self,
        teams: Sequence[Team],
        devices: int,
        loads: Iterable[Load],
        *,
        preemption: bool = True,
        tick: float = 1.0,
        seed: int = 1,
    ) -> None:
        self.teams = {team.name: team for team in teams}
        self.devices, self.tick, self.preemption = devices, tick, preemption
        self.random = random.Random(seed)
        self.now, self.virtual = 0.0, 0.0
        self.arrivals = sorted((s for load in loads for s in self._sweeps(load)), key=lambda s: s.created_at)
        self.arrivals.reverse()
        self.waiting: dict[str, dict[str, Sweep]] = {team.name: {} for team in teams}
        self.running: dict[int, Attempt] = {}
        self.ends: list[tuple[float, int]] = []
        self.times = {team.name: 0.0 for team in teams}
        self.served: dict[str, float] = defaultdict(float)
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.longest_gap: dict[str, float] = defaultdict(float)
        self.last_claim: dict[str, float] = {}
        self.most: Counter[str] = Counter()
        self.stops, self.packs, self.idle, self.decisions = 0, 0, 0.0, [0.0]

    def _sweeps(self, load: Load) -> Iterable[Sweep]:
        for k in range(load.sweeps):
            left = deque(
                load.seconds * math.exp(self.random.gauss(0, load.spread)) for _ in range(load.packs)
            )
            estimate = load.bias * load.seconds * math.exp(self.random.gauss(0, 0.4))
            at = load.start + k * load.every
            yield Sweep(f"{load.team}-{load.start:.0f}-{k:05}", load.team, at, estimate, left, since=at)

    def run(self, until: float) -> None:
        """Go on to a time."""
        while self.now < until:
            self._end()
            while self.arrivals and self.arrivals[-1].created_at <= self.now:
                sweep = self.arrivals.pop()
                self.waiting[sweep.team][sweep.name] = sweep
            if any(self.waiting.values()):
                self._decide()
            self._tally()
            self.now += self.tick

    def _end(self) -> None:
        while self.ends and self.ends[0][0] <= self.now:
            at, pack_id = heapq.heappop(self.ends)
            attempt = self.running.get(pack_id)
            if attempt is None or attempt.ends != at:
                continue
            del self.running[pack_id]
            sweep, used = attempt.sweep, at - attempt.start
            sweep.running -= 1
            weight = self.teams[sweep.team].weight
            self.times[sweep.team] += correction(attempt.charged, used, 1.0, weight)
            self.served[sweep.team] += used
            if attempt.stopping and used < attempt.seconds:
                sweep.left.append(attempt.seconds - used + LOST_S)
                self.waiting[sweep.team][sweep.name] = sweep

    def _decide(self) -> None:
        snapshot = self.snapshot()
        start = time.process_time()
        decision = schedule(snapshot)
        self.decisions.append(time.process_time() - start)
        self._carry_out(decision)

    def snapshot(self) -> Snapshot:
        """Return what the dispatcher would read from the database."""
        free = self.devices - len(self.running)
        return Snapshot(
            teams=[
                replace(team, virtual_times={POOL: self.times[team.name]}) for team in self.teams.values()
            ],
            waiting=[
                Waiting(
                    s.name,
                    s.team,
                    0,
                    s.created_at,
                    s.running,
                    len(s.left),
                    s.estimate,
                    waited=self.now - s.since,
                )
                for sweeps in self.waiting.values()
                for s in heapq.nsmallest(
                    FIRST_SWEEPS, sweeps.values(), key=lambda s: (s.running, s.created_at, s.name)
                )
            ],
            running=[self._row(attempt) for attempt in self.running.values()],
            devices={POOL: self.devices},
            free={POOL: free},
            virtual_times={POOL: self.virtual},
        )

    def _row(self, attempt: Attempt) -> Running:
        elapsed = self.now - attempt.start
        return Running(
            attempt.pack_id,
            attempt.sweep.name,
            attempt.sweep.team,
            0,
            1.0,
            POOL,
            elapsed,
            attempt.charged,
            max(0.0, attempt.seconds - elapsed),
            stoppable=self.preemption,
            stopping=attempt.stopping,
        )

    def _carry_out(self, decision: Decision) -> None:
        for (team, _), virtual in decision.team_times.items():
            self.times[team] = virtual
        self.virtual = decision.virtual_times.get(POOL, self.virtual)
        claims = {claim.sweep_id: claim for claim in decision.claims}
        for sweeps in self.waiting.values():
            for sweep in [sweeps[name] for name in claims if name in sweeps]:
                self._start(sweep, claims[sweep.name].packs, claims[sweep.name].charged)
        for pack_id in decision.preempt:
            attempt = self.running[pack_id]
            attempt.stopping, self.stops = True, self.stops + 1
            attempt.ends = min(attempt.ends, self.now + STOP_S)
            heapq.heappush(self.ends, (attempt.ends, pack_id))

    def _start(self, sweep: Sweep, packs: int, charged: float) -> None:
        if not sweep.waits:
            self.waits[sweep.team].append(self.now - sweep.created_at)
        sweep.waits.append(self.now - sweep.since)
        sweep.since = self.now
        sweep.running += packs
        for _ in range(packs):
            self.packs += 1
            seconds = sweep.left.popleft()
            attempt = Attempt(self.packs, sweep, self.now, seconds, charged, self.now + seconds)
            self.running[self.packs] = attempt
            heapq.heappush(self.ends, (attempt.ends, self.packs))
        if not sweep.left:
            del self.waiting[sweep.team][sweep.name]
        self.last_claim[sweep.team] = self.now

    def _tally(self) -> None:
        held = Counter(attempt.sweep.team for attempt in self.running.values())
        for team, count in held.items():
            self.most[team] = max(self.most[team], count)
        wanted = sum(len(s.left) for sweeps in self.waiting.values() for s in sweeps.values())
        self.idle += self.tick * min(self.devices - len(self.running), wanted)
        for team, sweeps in self.waiting.items():
            if sweeps:
                gap = self.now - self.last_claim.get(team, self.now)
                self.longest_gap[team] = max(self.longest_gap[team], gap)

    def usage(self) -> dict[str, float]:
        """Return the device-seconds that every team has had so far."""
        used = {team: self.served[team] for team in self.teams}
        for attempt in self.running.values():
            used[attempt.sweep.team] += self.now - attempt.start
        return used


def share_error(before: dict[str, float], after: dict[str, float], weights: dict[str, float]) -> float:
    """Return the largest relative deviation of the teams' device-seconds from their weighted share."""
    used = {team: after[team] - before[team] for team in weights}
    total, weight = sum(used.values()), sum(weights.values())
    return max(abs(used[team] * weight / (weights[team] * total) - 1) for team in weights)


def quantile(values: Sequence[float], q: float) -> float:
    """Return a quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


def crowd(*, preemption: bool, scale: float = 1.0, hours: float = 3.0, tick: float = 2.0) -> dict[str, Any]:
    """Return figures of the crowd; `scale` makes both the cluster and what is submitted smaller."""
    devices = round(1000 * scale)
    weights = {"hog": 1.0, "one": 1.0, "two": 2.0, "four": 4.0}
    teams = [Team(name, weight) for name, weight in weights.items()] + [Team("small", 1.0)]

    def sweeps(count: int) -> int:
        return max(1, round(count * scale))

    loads = [
        Load("hog", sweeps(20), 1000, 600.0),
        Load("one", sweeps(1800), 10, 120.0, bias=3.0, start=60.0),
        Load("two", sweeps(2600), 15, 120.0, bias=1 / 3, start=60.0),
        Load("four", sweeps(5000), 16, 120.0, start=60.0),
        Load("small", round(hours * 180), 4, 15.0, start=70.0, every=20.0),
    ]
    cluster = Cluster(teams, devices, loads, preemption=preemption, tick=tick)
    cluster.run(60.0)
    before = cluster.usage()
    cluster.run(hours * 3600.0)
    after = cluster.usage()
    backlogged = {team for team in weights if cluster.waiting[team]}
    assert backlogged == set(weights), f"only {backlogged} have work left"
    return {
        "devices": devices,
        "sweeps": sum(load.sweeps for load in loads),
        "preemption": preemption,
        "share_error": share_error(before, after, weights),
        "utilisation": 1 - cluster.idle / (devices * cluster.now),
        "wait_small": [quantile(cluster.waits["small"], q) for q in (0.5, 0.95, 1.0)],
        "wait_all": [
            quantile([w for waits in cluster.waits.values() for w in waits], q) for q in (0.5, 0.95, 1.0)
        ],
        "longest_without": {team: cluster.longest_gap[team] for team in weights},
        "packs": cluster.packs,
        "preemptions": cluster.stops,
        "decision_ms": [1e3 * quantile(cluster.decisions, q) for q in (0.5, 0.95, 1.0)],
    }


def few(
    devices: int, *, hours: float = 24.0, seconds: float = 300.0, window: float = 12.0, tick: float = 3.0
) -> dict[str, Any]:
    """Return figures of a cluster so small that a pack is a large part of it."""
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    packs = int(hours * 3600 * devices / seconds) + 10
    loads = [
        Load("one", 1, packs, seconds, bias=3.0),
        Load("two", 10, packs, seconds / 5, bias=1 / 3),
        Load("four", 50, packs // 50 + 1, seconds),
    ]
    cluster = Cluster([Team(name, weight) for name, weight in weights.items()], devices, loads, tick=tick)
    errors, before = [], cluster.usage()
    for hour in range(int(window), int(hours) + 1, int(window)):
        cluster.run(hour * 3600.0)
        after = cluster.usage()
        errors.append(share_error(before, after, weights))
        before = after
    assert all(cluster.waiting.values())
    return {
        "devices": devices,
        "share_error": share_error(dict.fromkeys(weights, 0.0), before, weights),
        "share_error_windows": errors,
        "preemptions": cluster.stops,
        "packs": cluster.packs,
    }


def quota(hours: float = 4.0) -> dict[str, Any]:
    """Return figures of a team whose quota is less than its share."""
    teams = [Team("bound", 4.0, max_devices=5.0), Team("one", 1.0), Team("two", 2.0)]
    loads = [Load(team.name, 40, 250, 60.0) for team in teams]
    cluster = Cluster(teams, 40, loads)
    cluster.run(hours * 3600.0)
    used = cluster.usage()
    origin = dict.fromkeys(used, 0.0)
    return {
        "most_held": cluster.most["bound"],
        "held_on_average": used["bound"] / cluster.now,
        "share_error_of_the_rest": share_error(origin, used, {"one": 1.0, "two": 2.0}),
        "utilisation": 1 - cluster.idle / (40 * cluster.now),
        "preemptions": cluster.stops,
    }


def comeback(*, preemption: bool) -> dict[str, Any]:
    """Return figures of a team that comes back after an hour to packs of others of ten minutes and of one."""
    weights = {"away": 2.0, "long": 1.0, "short": 1.0}
    loads = [
        Load("away", 5, 10, 60.0),
        Load("away", 50, 100, 60.0, start=3600.0),
        Load("long", 10, 100, 600.0),
        Load("short", 100, 100, 60.0),
    ]
    cluster = Cluster([Team(n, w) for n, w in weights.items()], 40, loads, preemption=preemption)
    cluster.run(3600.0)
    cluster.longest_gap.clear()
    before = cluster.usage()
    reached = math.nan
    while cluster.now < 7200.0:
        cluster.run(cluster.now + 10.0)
        held = sum(attempt.sweep.team == "away" for attempt in cluster.running.values())
        if math.isnan(reached) and held >= 20:
            reached = cluster.now - 3600.0
    return {
        "preemption": preemption,
        "share_reached_s": reached,
        "most_held": cluster.most["away"],
        "others_got_nothing_s": {team: cluster.longest_gap[team] for team in ("long", "short")},
        "share_error": share_error(before, cluster.usage(), weights),
        "preemptions": cluster.stops,
    }


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Lay figures out, one column a row."""
    out = Table(title=title, show_header=False)
    out.add_column()
    for _ in rows:
        out.add_column(justify="right")
    for key in rows[0]:
        out.add_row(key.replace("_", " "), *(_cell(key, row[key]) for row in rows))
    return out


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(key, part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(key, part) for part in value)
    if key.startswith(("share_error", "utilisation")):
        return f"{value:.1%}"
    return (
        f"{value:.2f}" if key.endswith("_ms") else f"{value:.3g}" if isinstance(value, float) else str(value)
    )


def main() -> None:
    """Simulate, print and save."""
    found = {
        "crowd": [crowd(preemption=on) for on in (True, False)],
        "few": [few(devices) for devices in (2, 3, 8)],
        "quota": [quota()],
        "return": [comeback(preemption=on) for on in (True, False)],
    }
    console = Console()
    for title, rows in found.items():
        console.print(table(title, rows))
    console.print("Waits, CPU time of a decision: p50, p95, longest.")
    save(Path("out/bench-fairness.json"), {"machine": machine(), **found})


if __name__ == "__main__":
    main()
