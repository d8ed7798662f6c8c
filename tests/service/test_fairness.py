"""Who gets the next device: each rule by example, then what holds for all."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fairness import comeback, crowd, few, quota
from service.dispatch.fairness import (
    CHARGE_S,
    CREDIT_S,
    PREEMPT_AFTER_S,
    TOLERANCE,
    Decision,
    Running,
    Snapshot,
    Team,
    Waiting,
    correction,
    fair_shares,
    schedule,
)
from workers.protocol import Pool

CPU, H100, A100 = Pool(), Pool("gpu", "H100"), Pool("gpu", "A100")
OWN = Pool("gpu", "H100", "a")


def sweep(sweep_id: str, team: str = "a", **changes: Any) -> Waiting:
    fields: dict[str, Any] = {"priority": 0, "created_at": 0.0, "running": 0.0, "packs": 100, "seconds": 10.0}
    return Waiting(sweep_id, team, **(fields | changes))


def pack(pack_id: int, team: str, **changes: Any) -> Running:
    fields: dict[str, Any] = {
        "sweep_id": f"of {team}",
        "priority": 0,
        "share": 1.0,
        "pool": CPU,
        "elapsed": 100.0,
        "charged": CHARGE_S,
        "remaining": 1000.0,
        "stoppable": True,
    }
    return Running(pack_id, team=team, **(fields | changes))


def decide(
    waiting: Sequence[Waiting],
    free: Mapping[Pool, float],
    teams: Sequence[Team] = (Team("a"), Team("b"), Team("c")),
    running: Sequence[Running] = (),
    **changes: Any,
) -> Decision:
    held: dict[Pool, float] = defaultdict(float)
    for attempt in running:
        held[attempt.pool] += attempt.share
    devices = {pool: free.get(pool, 0.0) + held[pool] for pool in {*free, *held}}
    fields = {"teams": teams, "waiting": waiting, "running": running, "devices": devices, "free": free}
    return schedule(Snapshot(**(fields | changes)))


def packs(decision: Decision) -> dict[tuple[str, Pool], int]:
    return {(claim.sweep_id, claim.pool): claim.packs for claim in decision.claims}


def test_devices_go_by_weight() -> None:
    teams = [Team("a", 1.0), Team("b", 2.0), Team("c", 4.0)]
    decision = decide([sweep(f"of {t.name}", t.name) for t in teams], {CPU: 70.0}, teams)
    assert packs(decision) == {("of c", CPU): 40, ("of b", CPU): 20, ("of a", CPU): 10}
    assert decision.team_times == {(t.name, CPU): pytest.approx(100.0) for t in teams}


def test_whoever_had_less_comes_first() -> None:
    teams = [Team("a", virtual_times={CPU: 50.0}), Team("b", virtual_times={CPU: 40.0})]
    waiting = [sweep("of a", "a"), sweep("of b", "b")]
    assert packs(decide(waiting, {CPU: 1.0}, teams)) == {("of b", CPU): 1}
    # Times in other pools do not matter.
    elsewhere = [Team("a", virtual_times={H100: 50.0}), Team("b", virtual_times={CPU: 40.0})]
    assert packs(decide(waiting, {CPU: 1.0}, elsewhere)) == {("of a", CPU): 1}


def test_a_long_pack_is_charged_while_it_runs() -> None:
    waiting = [sweep("of a", "a", seconds=9000.0), sweep("of b", "b")]
    first = decide(waiting, {CPU: 1.0})
    assert [claim.charged for claim in first.claims] == [CHARGE_S]
    teams = [Team("a", virtual_times={CPU: CHARGE_S}), Team("b", virtual_times={CPU: CHARGE_S + 100})]
    running = [pack(1, "a", elapsed=50.0, charged=CHARGE_S)]
    assert packs(decide(waiting, {CPU: 1.0}, teams, running)) == {("of a", CPU): 1}
    late = decide(waiting, {CPU: 1.0}, teams, [replace(running[0], elapsed=CHARGE_S + 101)])
    assert packs(late) == {("of b", CPU): 1}
    # What is stored is without it, since it is counted from the running pack again the next time.
    again = decide(waiting[:1], {CPU: 1.0}, teams, [replace(running[0], elapsed=CHARGE_S + 101)])
    assert again.team_times == {("a", CPU): pytest.approx(2 * CHARGE_S)}


def test_a_correction_leaves_what_was_used() -> None:
    assert 60 * 0.5 / 4 + correction(charged=60, actual=20, share=0.5, weight=4) == 20 * 0.5 / 4
    assert 60 * 0.5 / 4 + correction(charged=60, actual=900, share=0.5, weight=4) == 900 * 0.5 / 4


def test_a_team_that_was_away_saved_up_little() -> None:
    teams = [Team("a"), Team("b", virtual_times={CPU: 1e6})]
    running = [pack(k, "b", elapsed=10.0) for k in range(80)]
    waiting = [sweep("of a", "a", seconds=CREDIT_S), sweep("of b", "b", seconds=CREDIT_S)]
    found = packs(decide(waiting, {CPU: 100.0}, teams, running))
    # To start with, as many as its fair share of 180 devices; after that they take turns.
    assert 90 <= found["of a", CPU] <= 96
    assert found["of b", CPU] == 100 - found["of a", CPU]
    alone = decide(waiting[:1], {CPU: 1.0}, teams, running)
    assert alone.team_times["a", CPU] > 1e6 - CREDIT_S * 100


def test_a_team_that_others_kept_waiting_keeps_what_it_saved() -> None:
    teams = [Team("a", virtual_times={CPU: 0.0}), Team("b", virtual_times={CPU: 1000.0})]
    running = [pack(k, "b", elapsed=1000.0) for k in range(10)]
    waiting = [sweep("of a", "a", waited=1000.0)]
    assert decide(waiting, {CPU: 1.0}, teams, running).team_times == {("a", CPU): pytest.approx(10.0)}


def test_an_idle_pool_remembers_its_time() -> None:
    teams = [Team("a"), Team("b", virtual_times={CPU: 1e6})]
    decision = decide([sweep("of a")], {CPU: 1.0}, teams, virtual_times={CPU: 1e6})
    assert decision.team_times["a", CPU] == pytest.approx(1e6 - CREDIT_S + 10)
    assert decision.virtual_times[CPU] == pytest.approx(1e6 - CREDIT_S)


def test_quota_counts_what_is_stopping() -> None:
    teams = [Team("a", max_devices=4.0), Team("b", 0.01)]
    running = [pack(1, "a"), pack(2, "a", stopping=True)]
    found = packs(decide([sweep("of a"), sweep("of b", "b")], {CPU: 10.0}, teams, running))
    assert found == {("of a", CPU): 2, ("of b", CPU): 8}


def test_within_a_team_priority_then_few_devices_then_age() -> None:
    waiting = [
        sweep("urgent", priority=1, packs=1, created_at=9.0),
        sweep("large", running=5.0, created_at=1.0),
        sweep("old", created_at=2.0),
        sweep("new", created_at=3.0),
    ]
    order = [next(iter(packs(decide(waiting[k:], {CPU: 1.0})))) for k in range(4)]
    assert [name for name, _ in order] == ["urgent", "old", "old", "new"]
    assert packs(decide(waiting, {CPU: 6.0})) == {("urgent", CPU): 1, ("old", CPU): 3, ("new", CPU): 2}


@pytest.mark.parametrize(
    ("asked", "pool"),
    [
        ({}, CPU),
        ({"kind": "gpu"}, H100),
        ({"kind": "gpu", "model": "A100"}, A100),
        ({"kind": "gpu", "model": "V100"}, None),
        ({"model": "A100"}, A100),
    ],
)
def test_a_sweep_goes_where_it_fits_and_most_is_free(asked: dict[str, Any], pool: Pool | None) -> None:
    found = packs(decide([sweep("s", packs=1, **asked)], {A100: 1.0, H100: 3.0, CPU: 4.0}))
    assert found == ({("s", pool): 1} if pool else {})


def test_a_teams_own_pool_comes_first_and_is_closed_to_others() -> None:
    waiting = [sweep("of a", packs=3), sweep("of b", "b", packs=3)]
    assert packs(decide(waiting, {OWN: 2.0, H100: 9.0})) == {
        ("of a", OWN): 2,
        ("of a", H100): 1,
        ("of b", H100): 3,
    }
    assert packs(decide(waiting[1:], {OWN: 2.0})) == {}


def test_the_first_claim_binds_a_sweep() -> None:
    assert packs(decide([sweep("s")], {H100: 3.0, CPU: 2.0})) == {("s", H100): 3}
    assert packs(decide([sweep("s", kind="gpu")], {H100: 3.0, A100: 2.0})) == {("s", H100): 3}


def test_ten_tenths_fit_on_a_device() -> None:
    assert packs(decide([sweep("s", share=0.1)], {H100: 1.0})) == {("s", H100): 10}
    assert packs(decide([sweep("s", share=0.7)], {H100: 2.0})) == {("s", H100): 2}
    assert packs(decide([sweep("s", share=1 / 3)], {H100: 1 - 1 / 3})) == {("s", H100): 2}


def test_what_fits_nowhere_blocks_nobody() -> None:
    waiting = [sweep("gpu", kind="gpu", priority=9), sweep("cpu", kind="cpu"), sweep("of b", "b")]
    assert sum(packs(decide(waiting, {CPU: 4.0, H100: 0.0})).values()) == 4


def test_backlog_waits_in_turn_where_most_devices_are() -> None:
    waiting = [sweep("any"), sweep("gpu", "b", kind="gpu"), sweep("none", "c", model="V100")]
    decision = decide(waiting, {}, devices={CPU: 4.0, H100: 1.0, A100: 2.0}, backlog=6)
    assert packs(decision) == {("any", CPU): 3, ("gpu", A100): 3}
    assert packs(decide(waiting[:1], {CPU: 2.0}, backlog=3)) == {("any", CPU): 5}
    assert packs(decide(waiting[:1], {}, devices={CPU: 0.0}, backlog=1)) == {("any", CPU): 1}


HOG = [pack(k, "b", remaining=100.0 + k) for k in range(4)]
KEPT_WAITING = sweep("of a", "a", waited=PREEMPT_AFTER_S)


@pytest.mark.parametrize(
    ("waiting", "running", "stops"),
    [
        (KEPT_WAITING, HOG, (3,)),
        (replace(KEPT_WAITING, waited=PREEMPT_AFTER_S - 1), HOG, ()),
        (KEPT_WAITING, [replace(p, stoppable=False) for p in HOG], ()),
        (KEPT_WAITING, [replace(p, elapsed=PREEMPT_AFTER_S - 1) for p in HOG], ()),
        (KEPT_WAITING, [replace(p, remaining=PREEMPT_AFTER_S - 1) for p in HOG], ()),
        (KEPT_WAITING, [replace(p, remaining=None) for p in HOG], (0,)),
        (KEPT_WAITING, [*HOG[:3], replace(HOG[3], priority=1)], (2,)),
        # One is on its way already.
        (KEPT_WAITING, [*HOG[:3], replace(HOG[3], stopping=True)], ()),
        # Fair are two of four, and 1.33 for each of three.
        (KEPT_WAITING, [*HOG[:2], pack(8, "a"), pack(9, "a")], ()),
        (KEPT_WAITING, [*HOG[:2], pack(8, "c"), pack(9, "c")], ()),
        (KEPT_WAITING, [*HOG[:3], pack(8, "c")], (2,)),
        # Not of its kind.
        (replace(KEPT_WAITING, kind="gpu"), HOG, ()),
    ],
)
def test_a_pack_stops_for_a_team_below_its_share(
    waiting: Waiting, running: list[Running], stops: tuple[int, ...]
) -> None:
    others = [sweep("of b", "b"), sweep("of c", "c")]
    teams = [Team("a"), Team("b", virtual_times={CPU: 500.0}), Team("c", virtual_times={CPU: 500.0})]
    present = {attempt.team for attempt in running}
    found = decide([waiting, *(s for s in others if s.team in present)], {}, teams, running)
    assert (found.claims, found.preempt) == ((), stops)


def test_no_pack_stops_for_a_team_at_its_quota_or_behind_in_line() -> None:
    teams = [Team("a", max_devices=0.5), Team("b", virtual_times={CPU: 500.0})]
    assert decide([KEPT_WAITING], {}, teams, HOG).preempt == ()
    # The device would go back to b, which had less.
    teams = [Team("a", virtual_times={CPU: 5000.0}), Team("b")]
    assert decide([KEPT_WAITING], {}, teams, HOG).preempt == ()
    # It would go to c, which has its share, but had less.
    teams = [Team("a", virtual_times={CPU: 490.0}), Team("b", virtual_times={CPU: 500.0}), Team("c")]
    running = [*HOG, pack(8, "c", elapsed=1.0), pack(9, "c", elapsed=1.0)]
    assert decide([KEPT_WAITING, sweep("of c", "c")], {}, teams, running).preempt == ()


def test_a_pack_stops_for_a_higher_priority_of_its_own_team() -> None:
    running = [pack(1, "a"), pack(2, "a", priority=3), pack(3, "a", remaining=2000.0)]
    urgent = replace(KEPT_WAITING, priority=3)
    assert decide([urgent], {}, [Team("a", max_devices=3.0)], running).preempt == (3,)
    assert decide([KEPT_WAITING], {}, [Team("a")], running).preempt == ()


def test_stopping_comes_to_an_end() -> None:
    """Play it out: whatever stops becomes free at once and waits again, and nothing ever finishes."""
    teams = {"a": Team("a"), "b": Team("b", 2.0), "c": Team("c")}
    running = [pack(k, "c", sweep_id="of c") for k in range(20)]
    number, stops = 100, 0
    times: dict[tuple[str, Pool], float] = {("c", CPU): 20 * CHARGE_S}
    for turn in range(600):
        waiting = [sweep(f"of {name}", name, seconds=9000.0, waited=40.0) for name in teams]
        now = [replace(t, virtual_times={CPU: times.get((t.name, CPU), 0.0)}) for t in teams.values()]
        decision = decide(waiting, {CPU: 20.0 - len(running)}, now, running)
        times.update(decision.team_times)
        for claim in decision.claims:
            for _ in range(claim.packs):
                number += 1
                name = claim.sweep_id.removeprefix("of ")
                running.append(pack(number, name, elapsed=0.0, charged=claim.charged))
        for stopped in [p for p in running if p.pack_id in decision.preempt]:
            weight = teams[stopped.team].weight
            times[stopped.team, CPU] += correction(stopped.charged, stopped.elapsed, 1.0, weight)
        stops += len(decision.preempt)
        assert turn < 300 or not decision.preempt
        running = [replace(p, elapsed=p.elapsed + 5.0) for p in running if p.pack_id not in decision.preempt]
    assert stops <= 20
    held = Counter(p.team for p in running)
    assert held["b"] in (9, 10, 11)
    assert held["a"] in (4, 5)


amounts = st.floats(0.0, 100.0)
team_names = st.sampled_from("abcdef")


@given(amounts, st.dictionaries(team_names, st.tuples(st.floats(0.1, 10.0), amounts)))
def test_fair_shares_are_max_min(capacity: float, teams: dict[str, tuple[float, float]]) -> None:
    weights = {name: weight for name, (weight, _) in teams.items()}
    demands = {name: demand for name, (_, demand) in teams.items()}
    shares = fair_shares(capacity, weights, demands)
    assert shares.keys() == demands.keys()
    assert sum(shares.values()) == pytest.approx(min(capacity, sum(demands.values())), abs=1e-6)
    assert all(0 <= shares[name] <= demands[name] for name in teams)
    short = [shares[name] / weights[name] for name in teams if shares[name] < demands[name] - 1e-6]
    assert short == pytest.approx([max(short, default=0.0)] * len(short), abs=1e-6)
    most = max((shares[name] / weights[name] for name in teams), default=0.0)
    assert all(level >= most - 1e-6 for level in short)


POOLS = (CPU, H100, A100, OWN, Pool("cpu", "cpu", "b"))
shares_of_a_device = st.sampled_from([1.0, 0.5, 0.25, 0.1, 1 / 3])


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    pools = draw(st.lists(st.sampled_from(POOLS), unique=True))
    times = st.dictionaries(st.sampled_from(POOLS), st.floats(0.0, 1e4))
    teams = [
        Team(name, draw(st.sampled_from([0.5, 1.0, 4.0])), draw(st.none() | st.floats(0.0, 6.0)), draw(times))
        for name in "abc"
    ]
    waiting = [
        Waiting(
            f"s{k}",
            draw(st.sampled_from("abc")),
            draw(st.integers(0, 2)),
            draw(st.floats(0.0, 3.0)),
            draw(st.sampled_from([0.0, 1.0, 5.0])),
            draw(st.integers(0, 6)),
            draw(st.sampled_from([0.1, 10.0, 1e4])),
            draw(shares_of_a_device),
            draw(st.sampled_from([None, "cpu", "gpu"])),
            draw(st.sampled_from([None, None, "cpu", "H100"])),
            draw(st.sampled_from([0.0, 40.0, 1e5])),
        )
        for k in range(draw(st.integers(0, 8)))
    ]
    running = [
        Running(
            k,
            f"s{k % 4}",
            draw(st.sampled_from("abc")),
            draw(st.integers(0, 2)),
            draw(shares_of_a_device),
            draw(st.sampled_from(pools)),
            draw(st.sampled_from([0.0, 40.0, 1e4])),
            draw(st.sampled_from([1.0, CHARGE_S])),
            draw(st.sampled_from([None, 1.0, 1e3])),
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for k in range(draw(st.integers(0, 8)) if pools else 0)
    ]
    free = {pool: draw(st.sampled_from([0.0, 0.3, 1.0, 4.5, 7.0])) for pool in pools}
    devices = {pool: free[pool] + sum(p.share for p in running if p.pool == pool) for pool in pools}
    return Snapshot(teams, waiting, running, devices, free, draw(times), draw(st.sampled_from([0, 0, 3])))


def may_use(waiting: Waiting, pool: Pool) -> bool:
    return (
        pool.team in (None, waiting.team)
        and waiting.kind in (None, pool.kind)
        and waiting.model in (None, pool.model)
    )


def held_after(snapshot: Snapshot, decision: Decision) -> dict[str, float]:
    sweeps = {waiting.sweep_id: waiting for waiting in snapshot.waiting}
    held: dict[str, float] = defaultdict(float)
    for running in snapshot.running:
        held[running.team] += running.share
    for claim in decision.claims:
        claimed = sweeps[claim.sweep_id]
        held[claimed.team] += claim.packs * claimed.share
    return held


@given(snapshots())
def test_claims_keep_to_the_rules(snapshot: Snapshot) -> None:
    decision = schedule(snapshot)
    sweeps = {waiting.sweep_id: waiting for waiting in snapshot.waiting}
    kinds: dict[str, set[tuple[str, str]]] = {}
    used: dict[Pool, float] = defaultdict(float)
    for claim in decision.claims:
        claimed = sweeps[claim.sweep_id]
        assert may_use(claimed, claim.pool)
        assert claim.charged == min(claimed.seconds, CHARGE_S)
        kinds.setdefault(claim.sweep_id, set()).add((claim.pool.kind, claim.pool.model))
        used[claim.pool] += claim.packs * claimed.share
    assert all(len(found) == 1 for found in kinds.values())
    for name, waiting in sweeps.items():
        assert sum(claim.packs for claim in decision.claims if claim.sweep_id == name) <= waiting.packs
    for pool in snapshot.devices:
        assert used[pool] <= snapshot.free[pool] + snapshot.backlog + 1e-4
    before: dict[str, float] = defaultdict(float)
    for running in snapshot.running:
        before[running.team] += running.share
    for team in snapshot.teams:
        held = held_after(snapshot, decision)[team.name]
        assert team.max_devices is None or held <= max(before[team.name], team.max_devices + 1e-4)


@given(snapshots())
def test_no_device_is_free_that_a_waiting_sweep_may_use(snapshot: Snapshot) -> None:
    snapshot = replace(snapshot, backlog=0)
    decision = schedule(snapshot)
    held, free = held_after(snapshot, decision), dict(snapshot.free)
    teams = {team.name: team for team in snapshot.teams}
    sweeps = {waiting.sweep_id: waiting for waiting in snapshot.waiting}
    left = {name: waiting.packs for name, waiting in sweeps.items()}
    for claim in decision.claims:
        bound = sweeps[claim.sweep_id]
        free[claim.pool] -= claim.packs * bound.share
        left[claim.sweep_id] -= claim.packs
        sweeps[claim.sweep_id] = replace(bound, kind=claim.pool.kind, model=claim.pool.model)
    for name, waiting in sweeps.items():
        quota_left = teams[waiting.team].max_devices
        if left[name] and (quota_left is None or held[waiting.team] + waiting.share <= quota_left):
            assert not [p for p in free if may_use(waiting, p) and free[p] >= waiting.share + TOLERANCE]


@given(snapshots())
def test_only_packs_that_can_stop_are_stopped(snapshot: Snapshot) -> None:
    preempt = schedule(snapshot).preempt
    running = {attempt.pack_id: attempt for attempt in snapshot.running}
    assert len(set(preempt)) == len(preempt) <= len(snapshot.teams)
    for pack_id in preempt:
        attempt = running[pack_id]
        assert attempt.stoppable
        assert not attempt.stopping
        assert attempt.elapsed >= PREEMPT_AFTER_S


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(snapshot: Snapshot, rng: random.Random) -> None:
    def shuffled(items: Any) -> list[Any]:
        return rng.sample(list(items), len(items))

    mixed = replace(
        snapshot,
        teams=shuffled(snapshot.teams),
        waiting=shuffled(snapshot.waiting),
        running=shuffled(snapshot.running),
        devices=dict(shuffled(snapshot.devices.items())),
        free=dict(shuffled(snapshot.free.items())),
    )
    assert schedule(mixed) == schedule(snapshot) == schedule(snapshot)


@pytest.mark.parametrize("preemption", [True, False])
def test_teams_get_their_shares_beside_a_hog(preemption: bool) -> None:
    found = crowd(preemption=preemption, scale=0.03, hours=4.0, tick=5.0)
    assert found["share_error"] <= 0.05
    assert found["utilisation"] > 0.99
    assert found["preemptions"] <= found["packs"] * (0.06 if preemption else 0)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_teams_get_their_shares_of_few_devices(devices: int) -> None:
    assert few(devices, hours=24.0, seconds=300.0, window=24.0, tick=15.0)["share_error"] <= 0.05


def test_a_quota_holds_and_the_others_share_the_rest() -> None:
    found = quota(hours=1.0)
    assert found["most_held"] == 5
    assert found["share_error_of_the_rest"] <= 0.05


def test_a_team_that_comes_back_does_not_take_everything() -> None:
    found = comeback(preemption=True)
    assert found["share_error"] <= 0.05
    assert found["most_held"] < 40
