"""What trains on a GPU trains as on a CPU, but for rounding.

Needs torch, pytest and scikit-learn alone, so that it can be run where the service is not installed:

    python -m pytest -o addopts= tests/ddpnopt/test_gpu.py
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpnopt import BaselineOptimizer
from ddpnopt.config import Baseline, OptimizerConfig, RunConfig
from ddpnopt.layers import modules
from ddpnopt.layers.modules import register_generic
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.pack.engine import Trainer
from tests.ddpnopt import problems, training
from tests.ddpnopt.problems import FEEDBACKS, PARTNERS, assert_close
from tests.ddpnopt.training import FORMS, MODELS, PRECONDITIONERS, Batch, batches, cnn, fcn, tensors, weights

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
CPU = torch.device("cpu")
RELATIVE = 1e-9

every_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
every_form = pytest.mark.parametrize("form", FORMS)
every_model = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No TF32 where float32 is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: torch.device, data: list[Batch]) -> list[Batch]:
    return [(inputs.to(device), targets.to(device)) for inputs, targets in data]


def assert_same(here: nn.Module, there: nn.Module, relative: float = RELATIVE) -> None:
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert q.device.type == GPU.type
        assert_close(q.detach().cpu(), p.detach(), relative, name, relative)


@pytest.mark.parametrize("safeguard", ["clamp", "psd"])
@every_form
@every_preconditioner
@every_model
def test_it_trains_as_on_the_cpu(kind, preconditioner, form, safeguard):
    make, shape = MODELS[kind]
    options = {
        "vxx_reg": 0.01,
        "weight_decay": 0.02,
        "safeguard": safeguard,
        "track_updates": True,
        **FORMS[form],
    }
    if preconditioner != "adam":
        options["momentum"] = 0.5
    here, there = make(), make().to(GPU)
    ours, theirs = (training.ddpnopt(model, preconditioner, **options) for model in (here, there))
    # More samples than any layer has inputs: else EKFAC's eigenvectors of zero are any library's own choice.
    data = batches(4, shape, size=24)
    for one, other in zip(data, on(GPU, data), strict=True):
        loss, there_too = ours.step(*one), theirs.step(*other)
        assert there_too.device.type == GPU.type
        torch.testing.assert_close(there_too.cpu(), loss, rtol=RELATIVE, atol=RELATIVE)
        np.testing.assert_allclose(theirs.update_norms, ours.update_norms, rtol=1e-8)
    assert (ours.status, theirs.status) == (None, None)
    assert_same(here, there)


@every_form
@every_model
def test_it_trains_in_float32(kind, form):
    make, shape = MODELS[kind]
    here, there = make(torch.float32), make(torch.float32).to(GPU)
    data = batches(4, shape, dtype=torch.float32)
    for model, device in ((here, CPU), (there, GPU)):
        optimizer = training.ddpnopt(model, **FORMS[form])
        for batch in on(device, data):
            optimizer.step(*batch)
    assert_same(here, there, 1e-4)


@pytest.mark.parametrize("loss", ["mse", "mmc"])
def test_the_other_losses(loss):
    here, there = fcn(), fcn().to(GPU)
    data = batches(3)
    if loss == "mse":
        data = [(x, torch.stack((x.sum(1), x[:, 0], x[:, 1]), dim=1)) for x, _ in data]
    for model, device in ((here, CPU), (there, GPU)):
        optimizer = training.ddpnopt(model, loss=loss, lr=0.05)
        for batch in on(device, data):
            optimizer.step(*batch)
    assert_same(here, there)


@pytest.mark.parametrize("name", get_args(Baseline))
def test_baselines_train_as_on_the_cpu(name):
    here, there = fcn(), fcn().to(GPU)
    data = batches(3)
    for model, device in ((here, CPU), (there, GPU)):
        optimizer = BaselineOptimizer(model, name, lr=0.02)
        for batch in on(device, data):
            optimizer.step(*batch)
        assert optimizer.status is None
    assert_same(here, there, 1e-8)


def test_generic_layers_train_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr(modules, "GENERIC", set(modules.GENERIC))
    for kind in (nn.LayerNorm, nn.Softplus):
        register_generic(kind)
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    there = copy.deepcopy(here).to(GPU)
    data = batches(3)
    for model, device in ((here, CPU), (there, GPU)):
        optimizer = training.ddpnopt(model, "adam", terminal_hessian="gauss_newton", vxx_reg=0.1)
        for batch in on(device, data):
            optimizer.step(*batch)
    assert_same(here, there)


def test_dropout_draws_on_the_gpu():
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3)).double().to(GPU)
    optimizer = training.ddpnopt(model, lr=1e-12)
    (batch,) = on(GPU, batches(1))
    assert len({float(optimizer.step(*batch)) for _ in range(3)}) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@every_preconditioner
@every_model
def test_a_state_goes_from_one_device_to_the_other(kind, preconditioner, momentum):
    if momentum and preconditioner == "adam":
        pytest.skip("adam has a first moment of its own")
    make, shape = MODELS[kind]
    options = {"momentum": momentum}
    data = batches(6, shape)
    stay = make()
    expected = training.ddpnopt(stay, preconditioner, **options)
    for batch in data:
        expected.step(*batch)
    model, optimizer = make(), None
    for start, device in ((0, CPU), (2, GPU), (4, CPU)):
        state = None if optimizer is None else saved(optimizer.state_dict())
        model = copy.deepcopy(model).to(device)
        optimizer = training.ddpnopt(model, preconditioner, **options)
        if state is not None:
            optimizer.load_state_dict(state)
            places = {
                v.device.type for _, v in tensors(optimizer.state_dict()["layers"]) if isinstance(v, Tensor)
            }
            assert places <= {device.type}
        for batch in on(device, data[start : start + 2]):
            optimizer.step(*batch)
    for p, q in zip(weights(model), weights(stay), strict=True):
        assert_close(p, q, 1e-8, "weights", 1e-9)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_model_may_move_between_steps():
    stay, model = fcn(), fcn()
    expected, optimizer = training.ddpnopt(stay), training.ddpnopt(model)
    for (batch,), device in zip(([b] for b in batches(3)), (CPU, GPU, CPU), strict=True):
        expected.step(*batch)
        model.to(device)
        optimizer.step(*on(device, [batch])[0])
    for p, q in zip(weights(model), weights(stay), strict=True):
        assert_close(p, q, RELATIVE, "weights")


def test_a_batch_on_another_device_is_refused():
    model = cnn().to(GPU)
    optimizer = training.ddpnopt(model)
    before = weights(model)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step(*batches(1, training.IMAGE)[0])
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def test_a_batch_that_is_not_finite_is_refused():
    model = fcn(activation=nn.ReLU).to(GPU)
    optimizer = training.ddpnopt(model, "ekfac")
    good, other = on(GPU, batches(2))
    optimizer.step(*good)
    before = training.Snapshot(model, optimizer)
    bad = good[0].clone()
    bad[0, 0] = torch.nan
    optimizer.step(bad, good[1])
    assert optimizer.status is not None
    assert optimizer.status.quantity == "inputs of the batch"
    before.assert_unchanged()
    optimizer.step(*other)
    assert optimizer.status is None


def test_an_inspection_is_that_of_the_cpu():
    here, there = fcn(), fcn().to(GPU)
    (batch,) = batches(1)
    seen = [training.ddpnopt(m, "kfac").inspect(*on(d, [batch])[0]) for m, d in ((here, CPU), (there, GPU))]
    for one, other in zip(*(inspection.layers for inspection in seen), strict=True):
        assert_close(other.k.cpu(), one.k, 1e-8, "k", 1e-10)
        if one.t > 0:
            assert_close(other.K.dense().cpu(), one.K.dense(), 1e-8, "K", 1e-10)
            assert_close(other.V_xx.dense().cpu(), one.V_xx.dense(), 1e-8, "V_xx", 1e-10)


# --- packs ---

FLAT = problems.toy()
IMAGES = problems.toy(samples=60, features=36, shape=(1, 6, 6))
PACK = (
    [replace(optimizer, learning_rate=0.02) for optimizer in PARTNERS.values()]
    + [OptimizerConfig("sgd", "ddpnopt", 0.05, 1e-3, feedback) for feedback in FEEDBACKS.values()]
    + [OptimizerConfig(name, "baseline", 0.02) for name in get_args(Baseline)]
)


@every_model
def test_a_pack_trains_as_on_the_cpu(kind):
    chosen = [o for o in PACK if kind == "fcn" or o.baseline not in ("vanilla_ddp", "emsa")]
    setting = {} if kind == "fcn" else {"kind": "cnn", "channels": (3, 2), "hidden": (5,), "batch_size": 4}
    runs = [problems.run(optimizer, seed, **setting) for optimizer in chosen for seed in (0, 1)]
    data = FLAT if kind == "fcn" else IMAGES
    trainers = [Trainer(runs, data, device, lanes=False) for device in (CPU, GPU)]
    for trainer in trainers:
        for _ in problems.updates(trainer, 3):
            pass
        assert not trainer.diverged
    here, there = trainers
    for place, run in enumerate(runs):
        for u, v in zip(there.controls_of(place), here.controls_of(place), strict=True):
            assert u.device.type == GPU.type
            assert_close(u.cpu(), v, 1e-7, str(run.optimizer), 1e-9)


def test_a_pack_learns():
    runs = [
        problems.run(optimizer, seed, steps=60, eval_every=60, dtype="float32")
        for optimizer in PACK
        for seed in (0, 1)
        if optimizer.feedback is None or optimizer.feedback.convention == "batch_mean"
    ]
    *_, finished = problems.train(runs, FLAT, "cuda")
    for run, result in zip(runs, finished.results, strict=True):
        assert result.state == "completed", (run.optimizer, result.divergence)
        first, last = result.curves["train_loss"].tolist()
        assert last < 0.95 * first, run.optimizer


def test_a_member_that_diverges_leaves_the_others_alone():
    wild = problems.run(problems.sgd(1e30), 1, activation="relu", dtype="float32")
    mild = [replace(wild, optimizer=optimizer) for optimizer in (problems.sgd(), problems.ddpnopt())]
    *_, finished = problems.train([mild[0], wild, mild[1]], FLAT, "cuda")
    assert [result.state for result in finished.results] == ["completed", "diverged", "completed"]


FIG4A = {"dataset": "toy", "hidden": (10,) * 4, "dtype": "float32", "batch_size": 16, "steps": 10}
MANY = [
    problems.run(optimizer, seed, **FIG4A)
    for seed in range(20)
    for optimizer in (
        problems.sgd(0.4),
        problems.ddpnopt(0.4, 1e-4),
        problems.ddpnopt(0.4, 1e-4, terminal_hessian="gauss_newton"),
        problems.baseline("adam", 0.01),
    )
]


def trained(runs: list[RunConfig], steps: int = 10) -> list[list[Tensor]]:
    trainer = Trainer(runs, FLAT, GPU)
    trainer.advance(steps)
    assert not trainer.diverged
    return [trainer.controls_of(place) for place in range(len(runs))]


def test_a_pack_is_bit_identical_to_itself_on_one_kind_of_gpu():
    """The stored plan gives the same packs again, and so the same bits."""
    for first, again in zip(trained(MANY), trained(MANY), strict=True):
        assert all(torch.equal(u, v) for u, v in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [1, 7, 40])
def test_in_another_pack_a_run_stays_near_over_its_first_steps(size):
    whole = trained(MANY)
    for start in range(0, len(MANY), size):
        for own, other in zip(trained(MANY[start : start + size]), whole[start : start + size], strict=True):
            for u, v in zip(own, other, strict=True):
                assert_close(u.cpu(), v.cpu(), 1e-5, "controls", 1e-7)


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    whole = trained(MANY)
    checkpoints = Checkpoints(tmp_path)
    first = Trainer(MANY, FLAT, GPU)
    first.advance(5)
    first.save(checkpoints)
    again = Trainer(MANY, FLAT, GPU)
    assert again.resume(checkpoints)
    again.advance(10)
    for place, expected in enumerate(whole):
        assert all(torch.equal(u, v) for u, v in zip(again.controls_of(place), expected, strict=True))
