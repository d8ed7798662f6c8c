"""Decisions, pure: which sweep gets the next device, and which pack should stop for another.

Ray has no fair share. Here every pool of devices is a queue of its own under start-time fair queueing (Goyal,
Vin, Cheng 1996: https://doi.org/10.1145/248156.248171), with as many servers as the pool has devices, as in
SFQ(D) (Jin, Chase, Kaur 2004). A team has a virtual time in each pool: the device-seconds that it used there
divided by its weight. A free device goes to the team whose virtual time is least, so that in the long run
teams that always wait for more get device-seconds in proportion to their weights.

It departs from the papers where these need what we do not have:

- The length of a pack is only estimated. A claim is charged for at most `CHARGE_S` seconds in advance, what a
  running pack used beyond that counts while it runs, and `correction` settles the rest when it ends. A wrong
  estimate can thus do harm for seconds, not for the length of a pack.
- A pool's virtual time is not the start tag of whatever started last, for that may be hours ago. It is taken
  from the teams that hold the pool's devices now (`_Queue.now`).

Virtual times are kept by pool since they cannot be compared across pools. With one time for all, a team that
used idle CPUs for a week would wait for a week when it asks for a GPU.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Final, NamedTuple

from workers.protocol import DeviceKind, Pool

CHARGE_S: Final = 60.0
"""Most seconds of a pack that are charged when it is claimed."""

CREDIT_S: Final = 60.0
"""Seconds of its fair share that a team may have saved up while it was away.

As much as `CHARGE_S`: a team that comes back with long packs is charged this much for starting as many as its
fair share of the devices, and may thus start so many before anyone else starts one, and no more. Less would
swallow corrections of packs that ended earlier than estimated.
"""

KEPT_S: Final = 3600.0
"""Most seconds of waiting that a team is made up for: it was not away, but others kept the devices."""

PREEMPT_AFTER_S: Final = 30.0
"""Seconds that a sweep waits before a pack is stopped for it, that a pack runs before it is stopped, and that
it must have left: several times what it costs to stop and to start again."""

SLACK: Final = 0.2
"""How far a team must be below its fair share before packs are stopped for it, if that is more than a device.

A team's devices go up and down a little as packs end; to stop packs for that would gain nothing.
"""

TOLERANCE: Final = 1e-6
"""Of a device. Ten tenths must fit on a device whatever order they are added in."""


@dataclass(frozen=True, slots=True)
class Team:
    """Whom devices are shared between.

    Attributes:
        name: its name.
        weight: more than 0; a team gets devices in proportion.
        max_devices: most that it may hold at once, of all pools together; None for no limit.
        virtual_times: in each pool that it has used.
    """

    name: str
    weight: float = 1.0
    max_devices: float | None = None
    virtual_times: Mapping[Pool, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sweep with packs that could start now.

    Attributes:
        sweep_id: the sweep.
        team: whose.
        priority: within the team; higher first.
        created_at: when it was submitted, in seconds.
        running: devices that its packs hold now.
        packs: how many could start.
        seconds: that one of them is estimated to take.
        share: of a device that each needs: 1, or a fraction of a GPU.
        kind: of device that it has to have: asked for, or that of its first pack. None if any will do.
        model: as `kind`.
        waited: seconds since it last got a device or, without any, since it was submitted.
    """

    sweep_id: str
    team: str
    priority: int
    created_at: float
    running: float
    packs: int
    seconds: float
    share: float = 1.0
    kind: DeviceKind | None = None
    model: str | None = None
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt that holds its share of a device, or waits for it in the executor.

    Attributes:
        pack_id: the pack.
        sweep_id: its sweep.
        team: whose.
        priority: of its sweep.
        share: of a device.
        pool: that the device is of.
        elapsed: seconds since it has the device.
        charged: seconds that it was charged for when it was claimed: `Claim.charged`.
        remaining: estimated seconds left; None if unknown.
        stoppable: whether it keeps its state, so that stopping it loses little.
        stopping: whether it was asked to stop already.
    """

    pack_id: int
    sweep_id: str
    team: str
    priority: int
    share: float
    pool: Pool
    elapsed: float
    charged: float
    remaining: float | None = None
    stoppable: bool = False
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision depends on.

    Attributes:
        teams: at least those that wait or run.
        waiting: sweeps; of each team at least the first ones in its order.
        running: attempts, all of them.
        devices: of every pool; a pool may have none at the moment.
        free: of these.
        virtual_times: of the pools, as the last decision left them.
        backlog: how many more packs may be claimed than there are devices free, for an autoscaler to see.
    """

    teams: Sequence[Team]
    waiting: Sequence[Waiting]
    running: Sequence[Running]
    devices: Mapping[Pool, float]
    free: Mapping[Pool, float]
    virtual_times: Mapping[Pool, float] = field(default_factory=dict)
    backlog: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """Packs of a sweep to start on a pool.

    Attributes:
        sweep_id: the sweep.
        pool: the pool.
        packs: how many.
        charged: seconds that each is charged for now, to be kept for `Running` and `correction`.
    """

    sweep_id: str
    pool: Pool
    packs: int
    charged: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        claims: in the order in which devices were given.
        preempt: packs that should stop at a checkpoint.
        virtual_times: of the pools where something runs or was claimed. To be stored with the claims; and,
            while anything runs, every `CREDIT_S` seconds or so even without claims, since they go on.
        team_times: new virtual times of the teams that were charged, by team and pool.
    """

    claims: tuple[Claim, ...]
    preempt: tuple[int, ...]
    virtual_times: Mapping[Pool, float]
    team_times: Mapping[tuple[str, Pool], float]


def correction(charged: float, actual: float, share: float, weight: float) -> float:
    """Return what to add to a team's virtual time in a pool when an attempt there ends.

    Args:
        charged: seconds that the attempt was charged for when it was claimed.
        actual: seconds that it had the device.
        share: of the device.
        weight: of the team.
    """
    return share * (actual - charged) / weight


def fair_shares(
    capacity: float, weights: Mapping[str, float], demands: Mapping[str, float]
) -> dict[str, float]:
    """Return the weighted max-min fair share of each team, by water-filling.

    Nobody gets more than it demands. Whoever gets less has the same share per weight as all others who do,
    and at least as much per weight as anyone.

    Args:
        capacity: to be shared.
        weights: of the teams, each more than 0.
        demands: of the teams.
    """
    shares = {}
    left, weight = capacity, sum(weights[team] for team in sorted(demands))
    for team in sorted(demands, key=lambda team: (demands[team] / weights[team], team)):
        shares[team] = max(0.0, min(demands[team], left * weights[team] / weight)) if weight > 0 else 0.0
        left -= shares[team]
        weight -= weights[team]
    return shares


def schedule(snapshot: Snapshot) -> Decision:
    """Give devices to sweeps, and name the packs that should make room for others.

    Depends on nothing but its argument, and not on the order of anything in it.
    """
    state = _State(snapshot)
    state.fill()
    state.queue_up(snapshot.backlog)
    preempt = state.preempt()
    return Decision(
        claims=tuple(Claim(*key, packs, charged) for key, (packs, charged) in state.claims.items()),
        preempt=preempt,
        virtual_times={pool: queue.now() for pool, queue in state.queues.items() if queue.held},
        team_times={
            (team, pool): queue.settled(team)
            for pool, queue in state.queues.items()
            for team in sorted(queue.charged)
        },
    )


class _Class(NamedTuple):
    """What decides where a sweep fits."""

    kind: DeviceKind | None
    model: str | None
    share: float

    def matches(self, pool: Pool) -> bool:
        return self.kind in (None, pool.kind) and self.model in (None, pool.model)


class _Sweep:
    """A waiting sweep while devices are given out: `held` grows, `left` shrinks."""

    __slots__ = ("held", "left", "waiting")

    def __init__(self, waiting: Waiting) -> None:
        self.waiting, self.held, self.left = waiting, waiting.running, waiting.packs

    def key(self) -> tuple[int, float, float, str]:
        """Order within a team: by priority; then the one with the fewest devices, so that small ones end."""
        return (-self.waiting.priority, self.held, self.waiting.created_at, self.waiting.sweep_id)

    def got_nothing(self) -> bool:
        return self.left == self.waiting.packs


_Entry = tuple[tuple[int, float, float, str], _Sweep]


class _Member:
    """A team while devices are given out."""

    __slots__ = ("classes", "held", "stopping", "team", "waited")

    def __init__(self, team: Team) -> None:
        self.team = team
        self.held = self.stopping = 0.0
        self.classes: dict[_Class, list[_Entry]] = {}
        self.waited: dict[_Class, float] = {}

    def add(self, kind: _Class, sweep: _Sweep) -> None:
        heapq.heappush(self.classes.setdefault(kind, []), (sweep.key(), sweep))

    def has_room(self, share: float, *, soon: bool = False) -> bool:
        """Tell whether the quota lets it hold more; with `soon`, when what is stopping has stopped."""
        if self.team.max_devices is None:
            return True
        held = self.held - self.stopping if soon else self.held
        return held + share <= self.team.max_devices + TOLERANCE

    def first(self, kinds: Iterator[_Class]) -> _Class | None:
        """Return the class whose first sweep comes first; None if there is none."""
        return min(kinds, key=lambda kind: self.classes[kind][0][0], default=None)

    def fitting(self, pool: Pool) -> Iterator[_Class]:
        """Yield the classes with sweeps waiting that may use the pool."""
        if pool.team in (None, self.team.name):
            for kind, entries in self.classes.items():
                if entries and kind.matches(pool):
                    yield kind


class _Queue:
    """A pool: the teams' virtual times in it, and what they hold of it.

    Attributes:
        times: the teams' virtual times, with what running packs used beyond what they were charged for.
        beyond: how much of it that is.
        latest: what the pack that each team started last used, or was charged for.
        charged: the teams that were charged in this decision.
    """

    __slots__ = (
        "beyond",
        "charged",
        "devices",
        "free",
        "held",
        "latest",
        "pool",
        "stored",
        "times",
        "weights",
    )

    def __init__(self, pool: Pool, snapshot: Snapshot, weights: Mapping[str, float]) -> None:
        self.pool, self.weights = pool, weights
        self.devices, self.free = snapshot.devices.get(pool, 0.0), snapshot.free.get(pool, 0.0)
        self.stored = snapshot.virtual_times.get(pool, 0.0)
        self.times = {team.name: team.virtual_times.get(pool, 0.0) for team in snapshot.teams}
        self.held: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.beyond: dict[str, float] = {}
        self.charged: set[str] = set()

    def hold(self, team: str, share: float, charged: float, elapsed: float = 0.0) -> None:
        """Note that a team holds a share of a device here."""
        self.held[team] = self.held.get(team, 0.0) + share
        rate = share / self.weights[team]
        beyond = rate * max(0.0, elapsed - charged)
        self.times[team] += beyond
        self.beyond[team] = self.beyond.get(team, 0.0) + beyond
        used = rate * max(elapsed, charged)
        self.latest[team] = min(self.latest.get(team, used), used)

    def now(self) -> float:
        """Return the pool's virtual time: that of its `typical` team before the pack that it started last.

        As in the papers it is a start tag, not a finish tag: no team that waited all the time is behind it.
        """
        team = self.typical()
        return self.stored if team is None else self.times[team] - self.latest[team]

    def pace(self) -> float:
        """Return what the pool's virtual time can have grown by a second: one team may have had it all."""
        team = self.typical()
        return 0.0 if team is None else self.devices / self.weights[team]

    def typical(self) -> str | None:
        """Return who is in the middle, by virtual time and devices held, of those who hold devices.

        Neither a team that came back a moment ago nor one that its quota holds back can be that for long.
        """
        holders = sorted(self.held, key=lambda team: (self.times[team] - self.latest[team], team))
        half = sum(self.held[team] for team in holders) / 2
        up_to = accumulate(self.held[team] for team in holders)
        return next((team for team, sum_ in zip(holders, up_to, strict=True) if sum_ >= half), None)

    def key(self, team: str, floor: float) -> tuple[float, float, float, str]:
        """Order of the teams: by start tag; those who saved up too much among themselves as they were."""
        time = self.times[team]
        return (max(time, floor), time, -self.weights[team], team)

    def charge(self, team: str, floor: float, share: float, seconds: float) -> None:
        self.times[team] = max(self.times[team], floor) + share * seconds / self.weights[team]
        self.charged.add(team)

    def settled(self, team: str) -> float:
        """Return a team's virtual time to be stored: a running pack's use counts from its own record."""
        return self.times[team] - self.beyond.get(team, 0.0)


class _State:
    """A decision while it is made."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.weights = {team.name: team.weight for team in snapshot.teams}
        self.members = {team.name: _Member(team) for team in sorted(snapshot.teams, key=attrgetter("name"))}
        self.running = sorted(snapshot.running, key=attrgetter("pack_id"))
        pools = {*snapshot.devices, *(pack.pool for pack in self.running)}
        # A team's own pool comes first, which leaves the shared ones for others.
        self.queues = {pool: _Queue(pool, snapshot, self.weights) for pool in sorted(pools, key=_name)}
        self.claims: dict[tuple[str, Pool], tuple[int, float]] = {}
        self.starving = any(sweep.waited >= PREEMPT_AFTER_S for sweep in snapshot.waiting)
        for pack in self.running:
            self._count(pack)
        for waiting in sorted(snapshot.waiting, key=attrgetter("sweep_id")):
            if waiting.packs > 0:
                kind = _Class(waiting.kind, waiting.model, waiting.share)
                member = self.members[waiting.team]
                member.add(kind, _Sweep(waiting))
                member.waited[kind] = max(member.waited.get(kind, 0.0), waiting.waited)
        self.floors = {
            (pool, team): floor
            for pool, queue in self.queues.items()
            for team, floor in self._floors(queue).items()
        }

    def _count(self, pack: Running) -> None:
        member, queue = self.members[pack.team], self.queues[pack.pool]
        member.held += pack.share
        member.stopping += pack.share if pack.stopping else 0.0
        queue.hold(pack.team, pack.share, pack.charged, pack.elapsed)

    def _floors(self, queue: _Queue) -> dict[str, float]:
        """Return the teams' least start tags in a pool: what a team saved up below that is lost.

        That is the pool's virtual time when it began to wait, less its credit.
        """
        waiting = self._waiting_for(queue.pool)
        weight = sum(self.weights[team] for team in sorted({*queue.held, *waiting}))
        now, pace, floors = queue.now(), queue.pace(), {}
        for team in waiting:
            member = self.members[team]
            waited = max(member.waited[kind] for kind in member.fitting(queue.pool))
            floors[team] = now - min(waited, KEPT_S) * pace - CREDIT_S * queue.devices / weight
        return floors

    def _waiting_for(self, pool: Pool) -> list[str]:
        return [name for name, member in self.members.items() if next(member.fitting(pool), None)]

    def fill(self) -> None:
        """Give out what is free: a team's own devices first, then those of the pool with the most free."""
        pools = [
            (*_place(pool, queue.free), pool) for pool, queue in self.queues.items() if queue.free > TOLERANCE
        ]
        heapq.heapify(pools)
        lines = {pool: self.line(pool) for *_, pool in pools}
        while pools:
            pool = heapq.heappop(pools)[-1]
            queue = self.queues[pool]
            taken = self._claim_next(pool, lines[pool], queue.free, homes=None)
            if taken and queue.free - taken > TOLERANCE:
                heapq.heappush(pools, (*_place(pool, queue.free - taken), pool))
            queue.free -= taken

    def queue_up(self, backlog: int) -> None:
        """Claim packs beyond the free devices, by turns on each pool, for an autoscaler to see."""
        if backlog <= 0:
            return
        homes = self._homes()
        pools = [(0, -queue.devices, _name(pool), pool) for pool, queue in self.queues.items()]
        heapq.heapify(pools)
        lines = {pool: self.line(pool) for *_, pool in pools}
        while pools and backlog > 0:
            turns, devices, name, pool = heapq.heappop(pools)
            if self._claim_next(pool, lines[pool], float("inf"), homes):
                backlog -= 1
                heapq.heappush(pools, (turns + 1, devices, name, pool))

    def line(self, pool: Pool) -> list[tuple[float, float, float, str]]:
        """Return a heap of the teams that wait for a pool."""
        queue = self.queues[pool]
        line = [queue.key(team, self.floors[pool, team]) for team in self._waiting_for(pool)]
        heapq.heapify(line)
        return line

    def _homes(self) -> dict[tuple[str, _Class], Pool]:
        """Return for each team and class the pool with the most devices, where it waits if all are full."""
        homes: dict[tuple[str, _Class], Pool] = {}
        by_size = sorted(self.queues.values(), key=lambda queue: (-queue.devices, _name(queue.pool)))
        for queue in by_size:
            for name, member in self.members.items():
                for kind in member.fitting(queue.pool):
                    homes.setdefault((name, kind), queue.pool)
        return homes

    def _claim_next(
        self,
        pool: Pool,
        line: list[tuple[float, float, float, str]],
        free: float,
        homes: Mapping[tuple[str, _Class], Pool] | None,
    ) -> float:
        """Claim one pack of the first team in line that has one that fits; return its share, or 0.

        A team that has none is out of the line: what is free and what its quota leaves it only shrink.
        """
        while line:
            name = line[0][-1]
            member = self.members[name]
            best = member.first(
                kind
                for kind in member.fitting(pool)
                if kind.share <= free + TOLERANCE
                and member.has_room(kind.share)
                and (homes is None or homes.get((name, kind), pool) == pool)
            )
            if best is None:
                heapq.heappop(line)
                continue
            self._take(member, best, pool)
            heapq.heapreplace(line, self.queues[pool].key(name, self.floors[pool, name]))
            return best.share
        return 0.0

    def _take(self, member: _Member, kind: _Class, pool: Pool) -> None:
        _, sweep = heapq.heappop(member.classes[kind])
        sweep.left -= 1
        sweep.held += kind.share
        if sweep.left:
            # Both runs of a pair must see the same kind of device: its first pack binds a sweep.
            member.add(_Class(pool.kind, pool.model, kind.share), sweep)
        member.held += kind.share
        charged = min(sweep.waiting.seconds, CHARGE_S)
        queue = self.queues[pool]
        queue.charge(member.team.name, self.floors[pool, member.team.name], kind.share, charged)
        queue.hold(member.team.name, kind.share, charged)
        key = (sweep.waiting.sweep_id, pool)
        self.claims[key] = (self.claims.get(key, (0, charged))[0] + 1, charged)

    def preempt(self) -> tuple[int, ...]:
        """Return packs to stop: at most one for each team that is kept from its fair share."""
        victims = [pack for pack in self.running if _can_stop(pack)]
        if not self.starving or not victims:
            return ()
        served: set[str] = set()
        stops = []
        for pool in self.queues:
            if mine := [pack for pack in victims if pack.pool == pool]:
                stops += _Relief(self, pool, mine, served).stops()
        return tuple(stops)

    def shares(self, queue: _Queue) -> dict[str, float]:
        """Return every team's fair share of a pool's devices."""
        demands = {}
        for name, member in self.members.items():
            held = queue.held.get(name, 0.0)
            wanted = sum(
                kind.share * sweep.left
                for kind in member.fitting(queue.pool)
                for _, sweep in member.classes[kind]
            )
            quota = member.team.max_devices
            room = wanted if quota is None else max(0.0, min(wanted, quota - member.held))
            if held + room > 0:
                demands[name] = held + room
        return fair_shares(queue.devices, self.weights, demands)


class _Relief:
    """The part of a decision that stops packs of one pool.

    What stops becomes free, and goes to the first team in line. So a pack is stopped for that team only, and
    only if its own team does not stand before it then: else it would stop in vain, again and again.
    """

    def __init__(self, state: _State, pool: Pool, victims: list[Running], served: set[str]) -> None:
        self.state, self.pool, self.victims, self.served = state, pool, victims, served
        self.queue = state.queues[pool]
        self.shares = state.shares(self.queue)
        self.soon = self.queue.free + sum(
            pack.share for pack in state.running if pack.stopping and pack.pool == pool
        )
        self.staying = dict(self.queue.held)
        for pack in state.running:
            if pack.stopping and pack.pool == pool:
                self.staying[pack.team] -= pack.share

    def stops(self) -> list[int]:
        """Go through the teams in line until one can neither be helped nor passed over."""
        stops = []
        for *_, name in sorted(self.state.line(self.pool)):
            member = self.state.members[name]
            kind = member.first(member.fitting(self.pool))
            if kind is None:
                continue
            room = member.has_room(kind.share, soon=True)
            if room and kind.share <= self.soon + TOLERANCE:
                self._give(name, kind.share)
                continue
            victim = None if name in self.served else self._victim(member, kind, room=room)
            if victim is not None:
                self.victims.remove(victim)
                self.staying[victim.team] -= victim.share
                self.soon += victim.share
                self._give(name, kind.share)
                stops.append(victim.pack_id)
            elif room:
                break
        return stops

    def _give(self, name: str, share: float) -> None:
        self.soon -= share
        self.staying[name] = self.staying.get(name, 0.0) + share
        self.served.add(name)

    def _victim(self, member: _Member, kind: _Class, *, room: bool) -> Running | None:
        name, head = member.team.name, member.classes[kind][0][1].waiting
        if not self._starves(member):
            return None
        lacking = self.shares.get(name, 0.0) - self.staying.get(name, 0.0)
        below = lacking + TOLERANCE >= max(kind.share, SLACK * self.shares.get(name, 0.0))
        if room and below:
            tag = self.queue.key(name, self.state.floors[self.pool, name])[0]
            others = [pack for pack in self.victims if self._spares(pack, name, kind.share, tag)]
            if others:
                return min(others, key=lambda pack: (-self._excess(pack.team), pack.team, *_least_loss(pack)))
        # A swap within the team takes nothing from anyone.
        own = [
            pack
            for pack in self.victims
            if pack.team == name and pack.priority < head.priority and pack.share + TOLERANCE >= kind.share
        ]
        return min(own, key=_least_loss, default=None)

    def _starves(self, member: _Member) -> bool:
        return any(
            sweep.got_nothing() and sweep.waiting.waited >= PREEMPT_AFTER_S
            for kind in member.fitting(self.pool)
            for _, sweep in member.classes[kind]
        )

    def _excess(self, team: str) -> float:
        return self.staying[team] - self.shares[team]

    def _spares(self, pack: Running, name: str, share: float, tag: float) -> bool:
        """Tell whether a pack of another team can make room, and its team stands behind in line then."""
        back = pack.share * max(0.0, pack.charged - pack.elapsed) / self.queue.weights[pack.team]
        return (
            pack.team != name
            and pack.share + TOLERANCE >= share
            and self._excess(pack.team) >= pack.share - TOLERANCE
            and self.queue.times[pack.team] - back > tag
        )


def _least_loss(pack: Running) -> tuple[int, float, int]:
    """Order of the packs to stop: of low priority, with much left to do; those that do not know it last."""
    return (pack.priority, -(pack.remaining or 0.0), pack.pack_id)


def _can_stop(pack: Running) -> bool:
    long = pack.remaining is None or pack.remaining >= PREEMPT_AFTER_S
    return pack.stoppable and not pack.stopping and pack.elapsed >= PREEMPT_AFTER_S and long


def _name(pool: Pool) -> tuple[bool, str, str, str]:
    """Order of the pools that does not depend on how they came: a team's own before the shared ones."""
    return (pool.team is None, pool.team or "", pool.kind, pool.model)


def _place(pool: Pool, free: float) -> tuple[bool, float, tuple[bool, str, str, str]]:
    return (pool.team is None, -free, _name(pool))
