"""Steps that would leave the finite numbers: what is to blame is named, and nothing else happens.

By the public classes one run at a time, and in packs, where it must stay with the run that it happens to.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import BaselineOptimizer, linalg
from ddpnopt.config import Baseline, BaselineOptions, OptimizerConfig, RunConfig
from ddpnopt.pack.engine import Trainer
from ddpnopt.torch_optimizer import LayerOptimizer
from tests.ddpnopt import problems, training
from tests.ddpnopt.problems import PARTNERS
from tests.ddpnopt.training import (
    CLASSES,
    FEATURES,
    FORMS,
    IMAGE,
    PRECONDITIONERS,
    Batch,
    Snapshot,
    assert_same_bits,
    batches,
    cnn,
    fcn,
    tensors,
    weights,
)

SINGLE = torch.float32
NAN, INF = float("nan"), float("inf")

every_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
every_form = pytest.mark.parametrize("form", FORMS)


def train(optimizer: LayerOptimizer, data: list[Batch]) -> None:
    for inputs, targets in data:
        optimizer.step(inputs, targets)
        assert optimizer.status is None


def assert_refused(
    optimizer: LayerOptimizer, model: nn.Module, batch: Batch
) -> tuple[str, int | None, float]:
    """Take a step that must not be taken; return its status."""
    before = Snapshot(model, optimizer)
    loss = optimizer.step(*batch)
    assert not loss.is_inference()
    before.assert_unchanged()
    assert optimizer.status is not None
    return optimizer.status.quantity, optimizer.status.layer, optimizer.status.value


def momentum_of(preconditioner: str) -> dict[str, Any]:
    return {} if preconditioner == "adam" else {"momentum": 0.5}


# --- batches that are not finite ---


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize(("kind", "number"), [("fcn", NAN), ("fcn", INF), ("fcn", -INF), ("cnn", NAN)])
@every_preconditioner
def test_inputs_that_are_not_finite(kind, number, preconditioner, warm):
    """The next batches train as if nothing had been."""
    make, shape = (partial(fcn, activation=nn.ReLU), (FEATURES,)) if kind == "fcn" else (cnn, IMAGE)
    data = batches(3, shape)
    bad = data[0][0].clone()
    bad[(3, *(0,) * len(shape))] = number
    models = [make(), make()]
    options = momentum_of(preconditioner) | {"track_updates": True}
    ours, theirs = (training.ddpnopt(model, preconditioner, **options) for model in models)
    if warm:
        train(ours, data[:1])
        train(theirs, data[:1])
    quantity, layer, value = assert_refused(ours, models[0], (bad, data[0][1]))
    assert (quantity, layer) == ("inputs of the batch", None)
    assert value == pytest.approx(number, nan_ok=True)
    assert ours.update_norms == (0.0,) * 3
    train(ours, data[1:])
    train(theirs, data[1:])
    assert_same_bits(weights(models[0]), weights(models[1]))
    assert all(norm > 0 for norm in ours.update_norms)


@pytest.mark.parametrize(
    ("preconditioner", "warm"),
    [(name, warm) for name in PRECONDITIONERS for warm in (False, True)],
)
def test_an_infinity_that_saturates_is_seen_in_the_update(preconditioner, warm):
    """tanh(inf) is 1 and the loss is finite, but 0 · inf in the gradient is not."""
    model = fcn()
    optimizer = training.ddpnopt(model, preconditioner)
    data = batches(2)
    if warm:
        train(optimizer, data[:1])
    bad = data[0][0].clone()
    bad[0, 0] = INF
    quantity, layer, _ = assert_refused(optimizer, model, (bad, data[0][1]))
    assert layer == 0, quantity
    assert quantity.endswith(" of layer 0")
    train(optimizer, data)


@every_preconditioner
@pytest.mark.parametrize("number", [NAN, INF])
def test_values_that_are_not_finite(preconditioner, number):
    model = fcn()
    optimizer = training.ddpnopt(model, preconditioner, loss="mse")
    inputs, labels = batches(1)[0]
    values = torch.randn(len(labels), CLASSES, dtype=torch.float64)
    train(optimizer, [(inputs, values)])
    bad = values.clone()
    bad[2, 1] = number
    quantity, layer, value = assert_refused(optimizer, model, (inputs, bad))
    assert (quantity, layer) == ("batch_loss", None)
    assert value == number or value != value
    train(optimizer, [(inputs, values)])


def test_a_layer_that_overflows_is_named():
    model = fcn(activation=nn.ReLU)
    optimizer = training.ddpnopt(model)
    with torch.no_grad():
        model[2].weight *= 1e200
        model[4].weight *= 1e200
    assert assert_refused(optimizer, model, batches(1)[0])[:2] == ("activation after layer 2", 2)
    with torch.no_grad():
        model[2].bias[0] = NAN
    assert assert_refused(optimizer, model, batches(1)[0])[:2] == ("activation after layer 1", 1)


# --- factors that cannot be inverted ---


def without_a_feature(batch: Batch) -> Batch:
    inputs = batch[0].clone()
    inputs[:, 1] = 0
    return inputs, batch[1]


def dead_unit(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[0], model[2].bias[0] = 0, -1


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_singular_factor_of_kfac_is_named(layer, warm):
    """A feature that is always zero, or a unit that never fires, and no damping."""
    model = fcn(activation=nn.Tanh if layer == 0 else nn.ReLU)
    good, batch = batches(2, size=64)
    numbers = {"damping": 0.0, "factor_decay": 0.0, "inverse_every": 1}
    optimizer = training.ddpnopt(model, "kfac", lr=1e-4, loss="mse", **numbers)
    if warm:
        train(optimizer, [good])
    if layer == 0:
        batch = without_a_feature(batch)
    else:
        dead_unit(model)
    quantity, place, value = assert_refused(optimizer, model, batch)
    assert (quantity, place) == (f"M of layer {layer}", layer)
    assert value != value
    if layer == 0:
        train(optimizer, [good])


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_second_moments_that_overflow_are_named(preconditioner, warm):
    model = fcn(SINGLE)
    optimizer = training.ddpnopt(model, preconditioner, inverse_every=1)
    (inputs, targets), good = batches(2, dtype=SINGLE)
    if warm:
        train(optimizer, [good])
    quantity, layer, _ = assert_refused(optimizer, model, (inputs * 1e25, targets))
    assert (quantity, layer) == ("M of layer 0", 0)
    train(optimizer, [good])


@pytest.mark.parametrize("preconditioner", ["rmsprop", "adam", "kfac", "ekfac"])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_second_moment_that_overflows_is_not_kept(preconditioner, feedback):
    """It would never be finite again: M⁻¹ zero in RMSprop and Adam, every later step refused in KFAC."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    optimizer = training.ddpnopt(model, preconditioner, feedback=feedback)
    (inputs, targets), good = batches(2, dtype=SINGLE)
    train(optimizer, [good])
    optimizer.step(inputs * 1e25, targets)
    state = dict(tensors(optimizer.state_dict()["layers"]))
    assert all(bool(torch.isfinite(s).all()) for s in state.values() if isinstance(s, Tensor))
    before = weights(model)
    train(optimizer, [good])
    assert all(bool((p != q).all()) for p, q in zip(weights(model), before, strict=True))


def test_moments_along_the_eigenvectors_that_overflow_are_not_kept():
    """The squares of activations and of gradients are finite, those of their products are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    optimizer = training.ddpnopt(model, "ekfac", loss="mse", inverse_every=1)
    inputs, values = torch.randn(8, FEATURES), torch.randn(8, CLASSES)
    train(optimizer, [(inputs, values)])
    quantity, layer, _ = assert_refused(optimizer, model, (inputs * 1e12, values * 1e12))
    assert (quantity, layer) == ("M of layer 0", 0)
    train(optimizer, [(inputs, values)])


def test_a_quu_that_is_not_positive_definite_is_named():
    """Vanilla DDP without its regulariser, on a feature that is always zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES)).double()
    optimizer = BaselineOptimizer(model, "vanilla_ddp", "mse", lr=0.5, options=BaselineOptions(quu_reg=0.0))
    good, batch = batches(2, size=32)
    train(optimizer, [good])
    quantity, layer, value = assert_refused(optimizer, model, without_a_feature(batch))
    assert (quantity, layer) == ("Q_uu of layer 0", 0)
    assert value != value
    train(optimizer, [good])


# --- steps that are too long ---


EXPLODING: dict[str, dict[str, Any]] = {
    "identity": {},
    "rmsprop": {"eps": 1e-12},
    # Where η M⁻¹ is as large as it gets; Adam's step without feedback is never longer than η.
    "kfac": {"damping": 1e-4},
    "ekfac": {"damping": 1e-6},
}
SPAN = 3e38


def cases() -> list[tuple[str, str]]:
    return [
        (name, form) for name in PRECONDITIONERS for form in FORMS if (name, form) != ("adam", "open_loop")
    ]


@pytest.mark.parametrize(
    ("preconditioner", "form"),
    [(n, f) for n in PRECONDITIONERS for f in FORMS if (n, f) != ("adam", "open_loop")],
)
def test_a_step_that_explodes_is_not_taken(preconditioner, form):
    """And those after it, at a rate that is none too large, are as if it had never been tried."""
    data = batches(4, dtype=SINGLE)
    models = [fcn(SINGLE, activation=nn.ReLU) for _ in range(2)]
    options = (
        momentum_of(preconditioner) | EXPLODING.get(preconditioner, {}) | FORMS[form] | {"vxx_reg": 1e-3}
    )
    ours, theirs = (training.ddpnopt(model, preconditioner, **options, lr=1e-3) for model in models)
    train(ours, data[:2])
    train(theirs, data[:2])
    (group,) = ours.param_groups
    group["lr"] = SPAN
    inputs, targets = data[2]
    assert_refused(ours, models[0], (inputs * (1e3 if preconditioner == "identity" else 1), targets))
    group["lr"] = 1e-3
    train(ours, data[2:])
    train(theirs, data[2:])
    assert_same_bits(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize(("preconditioner", "form"), cases())
def test_what_exploded_is_named(preconditioner, form):
    model = fcn(SINGLE, activation=nn.ReLU)
    options = EXPLODING.get(preconditioner, {}) | FORMS[form]
    optimizer = training.ddpnopt(model, preconditioner, lr=SPAN, **options)
    inputs, targets = batches(1, dtype=SINGLE)[0]
    quantity, layer, value = assert_refused(
        optimizer, model, (inputs * (1e3 if preconditioner == "identity" else 1), targets)
    )
    assert layer in (0, 1, 2)
    assert re.fullmatch(rf"(V_x|V_xx|M|Q_u \+ Q_ux δx|u) of layer {layer}", quantity)
    assert not abs(value) < INF


@pytest.mark.parametrize("preconditioner", ["rmsprop", "adam"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("warm", [False, True], ids=["at first", "later"])
def test_a_division_by_zero_is_named(preconditioner, feedback, warm):
    """eps = 0, and a feature whose gradient is always zero."""
    model = fcn()
    forgets = {"rho": 0.0} if preconditioner == "rmsprop" else {"betas": (0.5, 0.0)}
    optimizer = training.ddpnopt(model, preconditioner, eps=0.0, feedback=feedback, **forgets)
    good, batch = batches(2)
    if warm:
        train(optimizer, [good])
    quantity, layer, value = assert_refused(optimizer, model, without_a_feature(batch))
    assert (quantity, layer, value) == ("M of layer 0", 0, INF)
    train(optimizer, [good])


@pytest.mark.parametrize("name", [name for name in get_args(Baseline) if name not in ("adam", "emsa")])
def test_a_baselines_step_that_explodes_is_not_taken(name):
    model = fcn(SINGLE, activation=nn.ReLU)
    inputs, targets = batches(1, dtype=SINGLE)[0]
    options = BaselineOptions(**EXPLODING.get(name, {}))
    optimizer = BaselineOptimizer(model, name, lr=1e-3, options=options)
    train(optimizer, [(inputs, targets)])
    (group,) = optimizer.param_groups
    group["lr"] = SPAN
    scale = 1 if name in EXPLODING else 1e3
    quantity, layer, _ = assert_refused(optimizer, model, (inputs * scale, targets))
    assert quantity.endswith(f" of layer {layer}")
    group["lr"] = 1e-3
    train(optimizer, [(inputs, targets)])


def test_a_rate_beyond_the_numbers_is_a_step_too_long():
    model = fcn(SINGLE)
    optimizer = training.ddpnopt(model, lr=0.1)
    optimizer.param_groups[0]["lr"] = 1e39
    assert_refused(optimizer, model, batches(1, dtype=SINGLE)[0])


def test_the_status_is_that_of_the_last_step():
    model = fcn(activation=nn.ReLU)
    optimizer = training.ddpnopt(model, track_updates=True)
    good, other = batches(2)
    bad = (torch.full_like(good[0], NAN), good[1])
    for _ in range(2):
        assert_refused(optimizer, model, bad)
        train(optimizer, [good, other])


# --- batched linear algebra ---


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("place", [0, 2])
def test_eigenvectors_of_one_matrix_do_not_fail_for_all(place, number):
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT
    expected = linalg.eigenvectors(matrices)
    matrices[place, 1, 2] = number
    found = linalg.eigenvectors(matrices)
    assert bool(found[place].isnan().all())
    others = [i for i in range(4) if i != place]
    assert torch.equal(found[others], expected[others])
    torch.testing.assert_close(found[others].mT @ found[others], torch.eye(5).double().expand(3, -1, -1))


def test_eigenvectors_that_are_not_found_are_those_of_one_matrix_alone(monkeypatch):
    """As LAPACK now and then does: to iterate without end on numbers that are finite."""
    eigh = torch.linalg.eigh

    def fails_on_zeros(matrix: Tensor) -> Any:
        if bool((matrix.flatten(-2) == 0).all(-1).any()):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    roots = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = roots @ roots.mT
    expected = linalg.eigenvectors(matrices)
    matrices[1] = 0
    monkeypatch.setattr(torch.linalg, "eigh", fails_on_zeros)
    found = linalg.eigenvectors(matrices)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bad", ["singular", "indefinite", "nan"])
def test_an_inverse_root_of_one_matrix_does_not_fail_for_all(bad):
    roots = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = roots @ roots.mT
    expected = linalg.inverse_root(matrices)
    matrices[1] = {
        "singular": torch.zeros(4, 4),
        "indefinite": -torch.eye(4),
        "nan": torch.full((4, 4), NAN),
    }[bad]
    found = linalg.inverse_root(matrices)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_singular_system_does_not_fail_for_all():
    systems = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = linalg.solve(systems, right)
    systems[1, 2] = torch.ones(4, 4)
    found = linalg.solve(systems, right)
    assert not bool(torch.isfinite(found[1, 2]).all())
    found[1, 2] = expected[1, 2]
    assert torch.equal(found, expected)


# --- in a pack ---

DATA = problems.toy()
EVERY = PARTNERS | {
    f"{name}-baseline": OptimizerConfig(name, "baseline", 0.02)
    for name in get_args(Baseline)
    if name != "emsa"
}


def three(optimizer: OptimizerConfig, **changes: Any) -> list[RunConfig]:
    small = replace(optimizer, learning_rate=0.01)
    setting = {"activation": "relu", "dtype": "float32", "hidden": (6,), "eval_every": 5} | changes
    return [problems.run(small, seed, **setting) for seed in range(3)]


def poison(trainer: Trainer, index: int) -> None:
    """Give a run activations whose squares overflow; its loss stays finite, that of constant outputs."""
    first, second, *rest = trainer.controls_of(index)
    trainer.set_controls_of(index, [first * 1e25, torch.zeros_like(second), *rest])


def controls_after(trainer: Trainer, indices: list[int]) -> list[Tensor]:
    return [torch.stack(layer) for layer in zip(*map(trainer.controls_of, indices), strict=True)]


def overflowing() -> list[Any]:
    """Every optimizer, what overflows first in it, and in which update; E-MSA's L-BFGS stays where it is."""
    found = []
    for name, optimizer in EVERY.items():
        V_x, M = "V_x of layer 0", "M of layer 1"
        quantities, step = [V_x], 3
        if optimizer.baseline in ("rmsprop", "adam"):
            quantities = [M] if optimizer.method == "baseline" else [V_x, M]
        elif optimizer.baseline in ("kfac", "ekfac"):
            quantities = [M]
        elif optimizer.method == "baseline":
            quantities = ["Q_uu of layer 1"] if optimizer.baseline == "vanilla_ddp" else ["batch_loss"]
            step = 3 if optimizer.baseline == "vanilla_ddp" else 4
        found.append(pytest.param(optimizer, quantities, step, id=name))
    return found


@pytest.mark.parametrize(("optimizer", "quantities", "step"), overflowing())
def test_a_member_that_overflows_is_alone_in_that(optimizer, quantities, step):
    """The others' bits are those that they would have without it."""
    runs = three(optimizer)
    alone = Trainer([runs[0], runs[2]], DATA, torch.device("cpu"))
    for _ in problems.updates(alone, 5):
        pass
    trainer = Trainer(runs, DATA, torch.device("cpu"))
    for done in problems.updates(trainer, 5):
        if done == 2:
            poison(trainer, 1)
    assert_same_bits(controls_after(trainer, [0, 2]), controls_after(alone, [0, 1]))
    assert trainer.active == 2
    (divergence,) = trainer.diverged.values()
    assert divergence.quantity in quantities
    assert divergence.step == step
    assert divergence.kind in ("nan", "+inf")
    trainer.take_metrics()
    diverged = trainer.results()[1]
    assert (diverged.state, diverged.steps) == ("diverged", 3)


@pytest.mark.parametrize("name", EVERY)
def test_a_member_with_a_rate_too_large_is_alone_in_that(name):
    optimizer = EVERY[name]
    runs = three(optimizer)
    runs[1] = replace(runs[1], optimizer=replace(optimizer, learning_rate=3e38))
    alone = Trainer([runs[0], runs[2]], DATA, torch.device("cpu"))
    trainer = Trainer(runs, DATA, torch.device("cpu"))
    for one in (alone, trainer):
        for _ in problems.updates(one, 4):
            pass
    assert_same_bits(controls_after(trainer, [0, 2]), controls_after(alone, [0, 1]))
    assert list(trainer.diverged) == [1]
    divergence = trainer.diverged[1]
    assert divergence.step <= 2
    assert divergence.quantity == "batch_loss" or re.search(r" of layer [01]$", divergence.quantity)


@pytest.mark.parametrize("without", ["outer_product", "nothing"])
def test_all_groups_lose_a_member_at_once(without):
    """Every optimizer in one pack, and one of each poisoned."""
    chosen = [optimizer for name, optimizer in EVERY.items() if not name.endswith(without)]
    runs = [run for optimizer in chosen for run in three(optimizer)]
    gone = list(range(1, len(runs), 3))
    stay = [i for i in range(len(runs)) if i not in gone]
    alone = Trainer([runs[i] for i in stay], DATA, torch.device("cpu"))
    for _ in problems.updates(alone, 4):
        pass
    trainer = Trainer(runs, DATA, torch.device("cpu"))
    for done in problems.updates(trainer, 4):
        if done == 1:
            for index in gone:
                poison(trainer, index)
    assert set(trainer.diverged) <= set(gone)
    assert len(trainer.diverged) >= len(gone) - 2
    assert_same_bits(controls_after(trainer, stay), controls_after(alone, list(range(len(stay)))))


def test_a_members_quu_that_is_not_positive_definite():
    """Vanilla DDP without its regulariser, and one run whose hidden units are all silent."""
    optimizer = problems.baseline("vanilla_ddp", quu_reg=0.0)
    runs = three(optimizer, activation="tanh", hidden=(2,), dtype="float64", loss="mse")
    alone = Trainer([runs[0], runs[2]], DATA, torch.device("cpu"))
    trainer = Trainer(runs, DATA, torch.device("cpu"))
    first, *rest = trainer.controls_of(1)
    trainer.set_controls_of(1, [torch.zeros_like(first), *rest])
    for one in (alone, trainer):
        for _ in problems.updates(one, 2):
            pass
    assert {i: (d.step, d.quantity) for i, d in trainer.diverged.items()} == {1: (1, "Q_uu of layer 1")}
    assert_same_bits(controls_after(trainer, [0, 2]), controls_after(alone, [0, 1]))
