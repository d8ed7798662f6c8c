"""The expansion of specs into runs and packs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import Settings
from service.errors import InvalidInputError
from service.sweeps.device import Device
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import GPU_PACK_RUNS, LANE_PACK_RUNS, PACK_RUNS, expand, plan
from service.sweeps.keys import keys_of
from service.sweeps.spec import SweepSpec
from tests.conftest import EXAMPLES, SMALL_SPEC
from workers.protocol import DeviceKind

IMAGES = {"kind": "cnn", "channels": [32, 32, 32, 32], "hidden": [32], "activation": "relu"}
rates = st.lists(st.floats(1e-6, 10), min_size=1, max_size=12, unique=True)
baselines = st.sampled_from(["sgd", "rmsprop", "adam", "kfac", "ekfac"])
paired = st.fixed_dictionaries(
    {"baseline": baselines, "learning_rate": rates, "vxx_reg": st.just([]) | rates}
)
alone = st.fixed_dictionaries(
    {"baseline": st.sampled_from(["sgd_vgr", "emsa", "vanilla_ddp"]), "learning_rate": rates}
)
grid = paired | alone


@st.composite
def specs(draw: st.DrawFn) -> SweepSpec:
    seeds = draw(st.integers(1, 30) | st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
    return parse_spec(SMALL_SPEC | {"seeds": seeds, "grids": draw(st.lists(grid, min_size=1, max_size=3))})


devices = st.builds(Device, st.sampled_from(["cpu", "gpu"]), st.integers(1, 64), st.just(64 * 2**30))


@given(specs(), devices)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_run_is_planned_once_and_no_pack_is_too_large(spec: SweepSpec, device: Device) -> None:
    planned = [run for pack in plan(spec, device).packs for run in pack]
    wanted = Counter(
        (position, rate, vxx_reg, seed)
        for position, grid in enumerate(spec.grids)
        for rate in grid.learning_rate
        for vxx_reg in (None, *grid.vxx_reg)
        for seed in spec.seed_list()
    )
    assert Counter((r.grid, r.learning_rate, r.vxx_reg, r.seed) for r in planned) == wanted
    assert len(planned) == spec.runs_total()
    for pack in plan(spec, device).packs:
        fast = {spec.grids[run.grid].baseline for run in pack} <= {"sgd", "rmsprop", "adam"}
        most = LANE_PACK_RUNS if fast else PACK_RUNS
        assert len(pack) <= (GPU_PACK_RUNS if device.kind == "gpu" else most)
    assert plan(spec, device) == plan(spec, device)


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


@pytest.mark.parametrize(
    ("device", "sizes"),
    [
        (Device(cores=1), [200]),
        (Device(cores=2), [100, 100]),
        (Device(cores=3), [70, 65, 65]),
        (Device(cores=16, memory=64 * 2**30), [35, 35, 30, 35, 35, 30]),  # 16 would not fill their lanes
        (Device("gpu", 1, 80 * 2**30), [200]),
    ],
)
def test_fig_4a_fills_the_device(device: Device, sizes: list[int]) -> None:
    spec = parse_spec(parse_yaml((EXAMPLES / "digits-fig4a-sgd.yaml").read_bytes()))
    assert [len(pack) for pack in plan(spec, device).packs] == sizes
    assert plan(spec, device).at_once == (8 if device.kind == "gpu" else device.cores)


@pytest.mark.parametrize(
    ("gibibytes", "share", "sizes"),
    [(80, 0.125, [200]), (0.1, 0.25, [200]), (0.05, 0.5, [200]), (0.03, 1.0, [200]), (0.02, 1.0, [100, 100])],
)
def test_a_pack_takes_the_part_of_a_gpu_that_it_needs(
    gibibytes: float, share: float, sizes: list[int]
) -> None:
    spec = parse_spec(parse_yaml((EXAMPLES / "digits-fig4a-sgd.yaml").read_bytes()))
    found = plan(spec, Device("gpu", 1, int(gibibytes * 2**30)))
    assert (found.share, [len(pack) for pack in found.packs]) == (share, sizes)
    assert found.at_once == 1 / share


def test_a_packs_time_is_that_of_its_runs(small_spec: dict[str, Any]) -> None:
    small_spec |= {"seeds": 300}
    found = plan(parse_spec(small_spec))
    assert len(found.pack_seconds) == len(found.packs) > 1
    per_run = [seconds / len(pack) for seconds, pack in zip(found.pack_seconds, found.packs, strict=True)]
    assert max(per_run) < 1.1 * min(per_run)


def test_many_packs_are_a_whole_number_of_rounds(small_spec: dict[str, Any]) -> None:
    small_spec |= {"seeds": 300}
    packs = plan(parse_spec(small_spec), Device(cores=4)).packs
    assert len(packs) == 8
    assert max(map(len, packs)) - min(map(len, packs)) <= 15


def test_little_memory_makes_small_packs(small_spec: dict[str, Any]) -> None:
    small_spec |= {"seeds": 100}
    whole = parse_spec(small_spec)
    sizes = [
        max(map(len, plan(whole, Device(cores=1, memory=m)).packs)) for m in (2**18, 2**18 + 2**17, 2**30)
    ]
    assert 1 < sizes[0] < sizes[1] < sizes[2]


def test_a_row_wider_than_a_pack_is_cut(small_spec: dict[str, Any]) -> None:
    small_spec["grids"][0]["vxx_reg"] = [k * 1e-6 for k in range(1, 200)]
    packs = plan(parse_spec(small_spec)).packs
    assert sum(map(len, packs)) == 2 * 3 * 200
    assert max(map(len, packs)) <= LANE_PACK_RUNS


def test_large_nets_get_small_packs(small_spec: dict[str, Any]) -> None:
    small_spec["model"]["hidden"] = [512, 512]
    small_spec["training"]["batch_size"] = 64
    packs = plan(parse_spec(small_spec)).packs
    assert 1 <= max(map(len, packs)) < 18


def test_the_whole_of_fig_4a() -> None:
    spec = parse_spec(parse_yaml((EXAMPLES / "digits-fig4a-all.yaml").read_bytes()))
    packs = plan(spec).packs
    assert [grid.baseline for grid in spec.grids] == ["sgd", "rmsprop", "ekfac"]
    assert [len(grid.learning_rate) * len(grid.vxx_reg) for grid in spec.grids] == [16, 16, 16]
    assert [len(pack) for pack in packs] == [200, 200, 100, 100]
    assert {run.grid for run in packs[0]} == {0}
    assert {run.grid for pack in packs[2:] for run in pack} == {2}
    configs = [
        spec.run_config(r.grid, r.method, r.learning_rate, r.vxx_reg, r.seed) for p in packs for r in p
    ]
    assert len({run.pack_key() for run in configs}) == 1
    rho = {run.optimizer.options.rho for run in configs if run.optimizer.baseline == "rmsprop"}
    assert rho == {0.98}


def images(batch_size: int, feedback: dict[str, Any], **changes: Any) -> SweepSpec:
    grids = [SMALL_SPEC["grids"][0], SMALL_SPEC["grids"][0] | {"ddpnopt": feedback}]
    training = {"steps": 100, "batch_size": batch_size}
    return parse_spec(
        SMALL_SPEC | {"dataset": "mnist", "model": IMAGES, "training": training, "grids": grids} | changes
    )


def test_convolutions_get_small_packs() -> None:
    sizes = set(map(len, plan(images(128, {})).packs))
    assert max(sizes) in range(2, 6)
    assert max(map(len, plan(images(8, {})).packs)) > max(sizes)


@pytest.mark.parametrize(
    ("feedback", "field", "given", "allowed"),
    [
        (
            {"terminal_hessian": "exact"},
            "terminal_hessian",
            "exact",
            "gauss_newton, which needs no matrix V_xx",
        ),
        (
            {"factorized": False},
            "factorized",
            "false",
            "true, which needs no matrix V_xx per sample: a run may",
        ),
        (
            {"dynamics": "second_order"},
            "dynamics",
            "second_order",
            "first_order with terminal_hessian: gauss",
        ),
    ],
)
def test_a_full_v_xx_that_cannot_fit_names_the_option(
    feedback: dict[str, Any], field: str, given: str, allowed: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan(images(128, feedback))
    (error,) = caught.value.errors
    assert (error.field, error.value) == (f"grids[1].ddpnopt.{field}", given)
    assert error.allowed.startswith(allowed)
    assert "MiB" in error.allowed


def test_a_wide_net_is_told_to_take_the_outer_product(small_spec: dict[str, Any]) -> None:
    small_spec |= {"dataset": "digits", "model": {"kind": "fcn", "hidden": [2048, 2048]}}
    small_spec["training"]["batch_size"] = 256
    with pytest.raises(InvalidInputError) as caught:
        plan(parse_spec(small_spec))
    (error,) = caught.value.errors
    assert (error.field, error.value) == ("grids[0].ddpnopt.terminal_hessian", "exact, the default")
    small_spec["grids"][0]["ddpnopt"] = {"terminal_hessian": "gauss_newton"}
    assert plan(parse_spec(small_spec)).runs_total == 18


def test_a_net_that_cannot_fit_at_all_is_named() -> None:
    for feedback in ({}, {"dynamics": "second_order"}):
        with pytest.raises(
            InvalidInputError, match=r"^model\.channels: got channels \[32, 32, 32, 32\], hidden"
        ):
            plan(images(4096, feedback))


def test_a_small_image_holds_a_full_v_xx() -> None:
    model = IMAGES | {"channels": [4, 4], "hidden": []}
    for feedback in ({"terminal_hessian": "exact"}, {"dynamics": "second_order"}):
        assert plan(images(16, feedback, dataset="digits", model=model)).runs_total == 36


def test_what_takes_longer_is_said_to_take_longer(small_spec: dict[str, Any]) -> None:
    def seconds(**changes: Any) -> float:
        small_spec["grids"][0] |= changes
        return plan(parse_spec(small_spec)).seconds

    small_spec |= {"dataset": "digits", "training": {"steps": 1500, "batch_size": 16}}
    plain = seconds()
    assert seconds(baseline="ekfac") > 1.5 * plain
    averaged = {"factor_decay": 0.5}
    assert seconds(options=averaged) > 1.5 * seconds(options={})
    assert seconds(options=averaged | {"inverse_every": 50}) < seconds(options=averaged)
    small_spec["training"]["eval_every"] = 1
    assert seconds(baseline="sgd", options={}) > 2 * plain


def alone_or_paired(vxx_reg: list[float], **changes: Any) -> SweepSpec:
    return parse_spec(SMALL_SPEC | {"grids": [SMALL_SPEC["grids"][0] | {"vxx_reg": vxx_reg}]} | changes)


def test_a_grid_without_columns_trains_the_baseline_alone() -> None:
    alone, paired = alone_or_paired([]), alone_or_paired([1e-4, 1e-3])
    (pack,) = plan(alone).packs
    assert [(run.method, run.vxx_reg) for run in pack] == [("baseline", None)] * 6
    assert plan(alone).seconds < plan(paired).seconds / 3
    baselines = [run for run in plan(paired).packs[0] if run.method == "baseline"]
    assert list(pack) == baselines
    # They are the same runs, whose results each takes from the other.
    assert list(map(keys_of(alone), pack)) == list(map(keys_of(paired), baselines))


def test_a_baseline_alone_is_planned_for_what_it_takes_itself() -> None:
    """No matrix V_xx per sample counts where none is held."""
    model = {"kind": "fcn", "hidden": [2048, 2048]}
    changes = {"dataset": "digits", "model": model, "training": {"steps": 4, "batch_size": 256}}
    with pytest.raises(InvalidInputError, match="terminal_hessian"):
        plan(alone_or_paired([1e-4], **changes))
    assert plan(alone_or_paired([], **changes)).runs_total == 6


def lone(baseline: str, **options: Any) -> dict[str, Any]:
    return {"baseline": baseline, "learning_rate": [0.1, 0.5], "options": options}


def test_baselines_without_a_partner_share_no_pack_with_others() -> None:
    plain = SMALL_SPEC["grids"][0] | {"baseline": "ekfac"}
    grids = [
        plain,
        lone("emsa"),
        plain,
        plain,
        lone("vanilla_ddp"),
        lone("sgd_vgr"),
        lone("sgd_vgr", vgr=0.5),
    ]
    packs = plan(parse_spec(SMALL_SPEC | {"grids": grids}), Device(cores=1)).packs
    assert [{run.grid for run in pack} for pack in packs] == [{0}, {1}, {2, 3}, {4}, {5}, {6}]


@pytest.mark.parametrize(("baseline", "packs"), [("sgd_vgr", 1), ("emsa", 4), ("vanilla_ddp", 4)])
def test_runs_that_gain_nothing_by_packs_fill_the_slots(baseline: str, packs: int) -> None:
    spec = parse_spec(SMALL_SPEC | {"grids": [lone(baseline)]})
    assert len(plan(spec, Device(cores=4, memory=64 * 2**30)).packs) == packs


def test_what_takes_longer_alone_is_said_to_take_longer() -> None:
    def seconds(baseline: str, **options: Any) -> float:
        return plan(parse_spec(SMALL_SPEC | {"grids": [lone(baseline, **options)]})).seconds

    plain = plan(alone_or_paired([])).seconds
    assert plain < seconds("sgd_vgr") < seconds("vanilla_ddp")
    assert 10 * seconds("sgd_vgr") < seconds("emsa")
    assert 3 * seconds("emsa") < seconds("emsa", lbfgs_steps=20) < 5 * seconds("emsa")


def digits(batch_size: int, *grids: dict[str, Any], **changes: Any) -> SweepSpec:
    training = {"steps": 4, "batch_size": batch_size}
    model = {"kind": "fcn", "hidden": [10, 10]}
    document = {"dataset": "digits", "model": model, "training": training, "seeds": 100, "grids": list(grids)}
    return parse_spec(SMALL_SPEC | document | changes)


def test_matrices_make_small_packs() -> None:
    """The matrices of a run take four megabytes, and a pack may take a hundred."""
    sizes = {
        limit: max(
            len(pack)
            for pack in plan(
                digits(40, lone("vanilla_ddp", memory_limit=limit)), Device(cores=1, memory=2**27)
            ).packs
        )
        for limit in (8 * 10**6, 2**31)
    }
    assert sizes[2**31] in range(20, 30)
    # One at a time: a pack's runs share the matrices.
    assert sizes[8 * 10**6] > 2 * sizes[2**31]


def test_matrices_over_the_limit_are_refused() -> None:
    assert plan(digits(128, lone("vanilla_ddp"))).runs_total == 200
    with pytest.raises(InvalidInputError) as caught:
        plan(digits(1024, lone("emsa"), lone("vanilla_ddp")))
    (error,) = caught.value.errors
    assert (error.field, error.value) == ("grids[1].options.memory_limit", str(2 * 2**30))
    assert "GiB, for layer 0's 650 controls and batches of 1024" in error.allowed


def test_matrices_that_the_device_cannot_hold_are_refused() -> None:
    big = lone("vanilla_ddp", memory_limit=2**40)
    with pytest.raises(InvalidInputError, match=r"^model.hidden: got hidden \[10, 10\] with batch_size 1024"):
        plan(digits(1024, big))
    assert plan(digits(1024, big), Device(cores=1, memory=2**36)).runs_total == 200


def test_keys_tell_baselines_without_a_partner_apart() -> None:
    grids = [lone("emsa"), lone("emsa", lbfgs_steps=6), lone("sgd_vgr"), lone("vanilla_ddp")]
    spec = parse_spec(SMALL_SPEC | {"grids": grids})
    runs = [run for bundle in expand(spec) for run in bundle]
    assert len(set(map(keys_of(spec), runs))) == len(runs) == 4 * 2 * 3


@pytest.mark.parametrize(
    ("settings", "kind", "planned"),
    [
        ({}, None, "cpu"),
        ({}, "gpu", "gpu"),
        ({"gpus": 1}, None, "gpu"),
        ({"gpus": 1}, "cpu", "cpu"),
        # They are this machine's, which trains nothing for a cluster elsewhere.
        ({"gpus": 1, "ray_address": "head:6379"}, None, "cpu"),
    ],
)
def test_packs_are_planned_for_the_gpus_that_a_private_ray_has(
    settings: dict[str, Any], kind: DeviceKind | None, planned: str
) -> None:
    assert Settings(**settings).device_for(kind).kind == planned
