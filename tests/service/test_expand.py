"""The expansion of specs into runs and packs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import PACK_RUNS, expand, plan
from service.sweeps.spec import SweepSpec
from tests.conftest import EXAMPLES, SMALL_SPEC

rates = st.lists(st.floats(1e-6, 10), min_size=1, max_size=12, unique=True)
grid = st.fixed_dictionaries({"baseline": st.just("sgd"), "learning_rate": rates, "vxx_reg": rates})


@st.composite
def specs(draw: st.DrawFn) -> SweepSpec:
    seeds = draw(st.integers(1, 30) | st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
    return parse_spec(SMALL_SPEC | {"seeds": seeds, "grids": draw(st.lists(grid, min_size=1, max_size=3))})


@given(specs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_run_is_planned_once_and_packs_are_even(spec: SweepSpec) -> None:
    planned = [run for pack in plan(spec).packs for run in pack]
    wanted = Counter(
        (position, rate, vxx_reg, seed)
        for position, grid in enumerate(spec.grids)
        for rate in grid.learning_rate
        for vxx_reg in (None, *grid.vxx_reg)
        for seed in spec.seed_list()
    )
    assert Counter((r.grid, r.learning_rate, r.vxx_reg, r.seed) for r in planned) == wanted
    assert len(planned) == spec.runs_total()
    assert max(map(len, plan(spec).packs)) <= PACK_RUNS
    assert plan(spec) == plan(spec)


@given(specs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pairs_stay_together(spec: SweepSpec) -> None:
    for pack in plan(spec).packs:
        baselines = {(r.grid, r.learning_rate, r.seed) for r in pack if r.method == "baseline"}
        partners = {(r.grid, r.learning_rate, r.seed) for r in pack if r.method == "ddpnopt"}
        assert partners <= baselines


def test_a_baseline_is_shared_by_its_row(small_spec: dict[str, Any]) -> None:
    bundles = list(expand(parse_spec(small_spec)))
    assert len(bundles) == 2 * 3
    for bundle in bundles:
        assert [run.vxx_reg for run in bundle] == [None, 1e-4, 1e-3]
        assert [run.method for run in bundle] == ["baseline", "ddpnopt", "ddpnopt"]
        assert len({(run.learning_rate, run.seed) for run in bundle}) == 1


def test_fig_4a_is_one_pack_a_row() -> None:
    spec = parse_spec(parse_yaml((EXAMPLES / "digits-fig4a-sgd.yaml").read_bytes()))
    packs = plan(spec).packs
    assert [len(pack) for pack in packs] == [50, 50, 50, 50]
    assert [{run.learning_rate for run in pack} for pack in packs] == [{0.4}, {0.6}, {0.7}, {0.8}]


def test_a_row_wider_than_a_pack_is_cut(small_spec: dict[str, Any]) -> None:
    small_spec["grids"][0]["vxx_reg"] = [k * 1e-6 for k in range(1, 200)]
    packs = plan(parse_spec(small_spec)).packs
    assert sum(map(len, packs)) == 2 * 3 * 200
    assert max(map(len, packs)) <= PACK_RUNS


def test_large_nets_get_small_packs(small_spec: dict[str, Any]) -> None:
    small_spec["model"]["hidden"] = [512, 512]
    small_spec["training"]["batch_size"] = 64
    packs = plan(parse_spec(small_spec)).packs
    assert 1 <= max(map(len, packs)) < 18
