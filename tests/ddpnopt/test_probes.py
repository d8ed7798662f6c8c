"""What runs record besides their metrics: the same numbers as the library's own tools give, in any pack."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from ddpnopt import BaselineOptimizer, DDPNOpt, allocations, probes
from ddpnopt.config import FeedbackConfig, OptimizerConfig, Probe, RunConfig
from ddpnopt.datasets.load import Dataset
from ddpnopt.errors import ConfigError
from ddpnopt.introspection import UpdateNorms, leading_feedback_image, policy_spectrum
from ddpnopt.lanes import rules
from ddpnopt.models import sequential
from ddpnopt.pack import cost
from ddpnopt.pack.checkpoint import Checkpoints
from ddpnopt.pack.engine import Trainer, train
from ddpnopt.results import Finished, RunResult, Stopped
from ddpnopt.torch_optimizer import LayerOptimizer
from tests.ddpnopt.problems import baseline, bits, results, run, toy

ALL: tuple[Probe, ...] = tuple(probe for probe in get_args(Probe) if probe != "cost")
"""Those whose records are the same each time."""
STEPS, EVERY = 10, 4
DATA = toy()
IMAGES = toy(samples=60, features=36, shape=(1, 6, 6))
CNN: dict[str, Any] = {"hidden": (5,), "kind": "cnn", "channels": (2, 2), "batch_size": 8}
OPTIMIZERS = {
    "sgd": OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-3, FeedbackConfig()),
    "gauss-newton": OptimizerConfig("sgd", "ddpnopt", 0.1, 0.0, FeedbackConfig("gauss_newton")),
    "rmsprop": OptimizerConfig("rmsprop", "ddpnopt", 0.01, 1e-3, FeedbackConfig()),
    "adam": OptimizerConfig("adam", "ddpnopt", 0.01, 1e-3, FeedbackConfig(dynamics="second_order")),
    "ekfac": OptimizerConfig("ekfac", "ddpnopt", 0.05, 1e-3, FeedbackConfig()),
    "plain": baseline("ekfac", 0.05),
    "sgd_vgr": baseline("sgd_vgr", 0.05),
}


def probed(name: str, seed: int = 0, asked: tuple[Probe, ...] = ALL, **shape: Any) -> RunConfig:
    return replace(run(OPTIMIZERS[name], seed, **shape), probes=asked)


def library(one: RunConfig, data: Dataset) -> tuple[LayerOptimizer, UpdateNorms, list[dict[str, Any]]]:
    """Train the run by the library's public optimizer; look at the points of the curves."""
    model = sequential(one.model, data.shape, 3).double()
    trainer = Trainer([replace(one, probes=())], data, torch.device("cpu"), lanes=False)
    for module, u in zip([m for m in model if hasattr(m, "weight")], trainer.controls_of(0), strict=True):
        with torch.no_grad():
            module.weight.copy_(u[:, :-1].reshape(module.weight.shape))
            module.bias.copy_(u[:, -1])
    c = one.optimizer
    optimizer: LayerOptimizer
    if c.feedback is None:
        optimizer = BaselineOptimizer(model, c.baseline, lr=c.learning_rate, track_updates=True)
    else:
        names = {"sgd": "identity"}
        optimizer = DDPNOpt(
            model,
            preconditioner=names.get(c.baseline, c.baseline),  # type: ignore[arg-type]
            lr=c.learning_rate,
            vxx_reg=c.vxx_reg,
            terminal_hessian=c.feedback.terminal_hessian,
            dynamics=c.feedback.dynamics,
            track_updates=True,
        )
    inputs = torch.from_numpy(data.train_inputs).double().reshape(-1, *data.shape)
    targets = torch.from_numpy(data.train_targets)
    norms, seen = UpdateNorms(optimizer), []
    for step in range(one.training.steps + 1):
        if step % EVERY == 0 or step == one.training.steps:
            first = slice(probes.SPECTRUM_SAMPLES)
            looked = optimizer.inspect(inputs[first], targets[first]) if c.feedback else None
            seen.append({"step": step, "spectrum": None if looked is None else policy_spectrum(looked)})
        if step < one.training.steps:
            rows = trainer.batches.stretch(step + 1, step + 1).rows(step + 1)[0]
            optimizer.step(inputs[rows], targets[rows])
            norms.record()
    return optimizer, norms, seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norms_and_spectra_are_those_of_the_library(name):
    one = probed(name, dtype="float64")
    (result,) = results([one], DATA)
    _, norms, seen = library(one, DATA)
    record = result.records["update_norm"]
    assert record.steps.tolist() == [4, 8, 10]
    history = norms.history().numpy()
    means = [history[a:b].mean(axis=0) for a, b in ((0, 4), (4, 8), (8, 10))]
    np.testing.assert_allclose(record.values, means, rtol=1e-6)
    if one.optimizer.feedback is None:
        assert set(result.records) == {"update_norm"}
        return
    spectrum = result.records["policy_spectrum"]
    assert spectrum.steps.tolist() == [point["step"] for point in seen] == [0, 4, 8, 10]
    for values, point in zip(spectrum.values, seen, strict=True):
        np.testing.assert_allclose(values, point["spectrum"], rtol=1e-5, atol=1e-7 * float(values[0]))
    assert spectrum.values[-1][0] > 0


@pytest.mark.parametrize("shape", ["fcn", "cnn"])
def test_the_images_are_those_of_the_library(shape):
    data = IMAGES if shape == "cnn" else DATA
    one = probed("gauss-newton", dtype="float64", **(CNN if shape == "cnn" else {}))
    (result,) = results([one], data)
    optimizer, _, _ = library(one, data)
    record = result.records["policy_image"]
    assert record.steps.tolist() == [STEPS]
    layers = one.model.layers(data.shape, 3)
    assert record.values.shape == (1, *probes.shape("policy_image", layers, data.shape))
    inputs = torch.from_numpy(data.test_inputs).double().reshape(-1, *data.shape)
    for label in range(3):
        row = int(np.flatnonzero(data.test_targets == label)[probes.IMAGE_RANK])
        target = torch.tensor(label)
        np.testing.assert_allclose(record.values[0, 0, label], inputs[row], rtol=1e-6)
        for t in range(1, len(layers)):
            image = leading_feedback_image(optimizer, inputs[row], target, t)
            np.testing.assert_allclose(record.values[0, t, label], image, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", ["fcn", "cnn"])
def test_in_a_pack_and_alone_every_bit_is_the_same(shape):
    data, kind = (IMAGES, CNN) if shape == "cnn" else (DATA, {})
    runs = [probed(name, seed, **kind) for name in OPTIMIZERS for seed in (0, 1)]
    if shape == "cnn":  # the full forms' KᵀK is large there
        runs = [one for one in runs if one.optimizer.baseline in ("sgd", "sgd_vgr")]
    for one, together in zip(runs, results(runs, data), strict=True):
        assert bits(results([one], data)[0]) == bits(together)


@pytest.mark.parametrize("stop", [1, 3, 4, 9, 10])
def test_an_interruption_changes_nothing(stop, tmp_path):
    runs = [probed(name) for name in OPTIMIZERS]
    expected = [bits(result) for result in results(runs, DATA)]
    trainer = Trainer(runs, DATA, torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path)
    for point in (0, 4, 8, 10):
        if point > stop:
            break
        trainer.advance(point)
        if point < stop:
            trainer.take_metrics()
    trainer.advance(stop)
    trainer.save(checkpoints)
    *_, end = train(runs, DATA, checkpoints=checkpoints)
    assert isinstance(end, Finished)
    assert [bits(result) for result in end.results] == expected


def test_stopped_at_every_stretch(tmp_path):
    runs = [probed(name) for name in OPTIMIZERS]
    expected = [bits(result) for result in results(runs, DATA)]
    for _ in range(50):
        asked = iter([False, True])
        *_, end = train(runs, DATA, checkpoints=Checkpoints(tmp_path), stopping=lambda a=asked: next(a, True))
        if isinstance(end, Finished):
            break
        assert isinstance(end, Stopped)
        if end.step == STEPS:
            *_, end = train(runs, DATA, checkpoints=Checkpoints(tmp_path))
            break
    assert isinstance(end, Finished)
    assert [bits(result) for result in end.results] == expected


def test_who_diverges_keeps_what_was_recorded_before():
    wild = probed("sgd", dtype="float32")
    wild = replace(wild, optimizer=replace(wild.optimizer, learning_rate=1e39))  # infinite as a float32
    calm = probed("sgd", seed=1, dtype="float32")
    lost, kept = results([wild, calm], DATA)
    assert lost.state == "diverged"
    assert set(lost.records) == {"policy_spectrum"}  # of step 0, before the first update
    assert lost.records["policy_spectrum"].steps.tolist() == [0]
    assert bits(kept) == bits(results([calm], DATA)[0])


def test_an_image_that_cannot_be_had_is_nan_and_said(caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("K", "a large one", "a smaller one")

    monkeypatch.setattr("ddpnopt.ddp.operators.FeedbackGain.right_singular_vectors", refuse)
    (result,) = results([probed("sgd", asked=("policy_image",))], DATA)
    assert np.isnan(result.records["policy_image"].values).all()
    assert "no policy_image: K" in caplog.text


def test_runs_with_probes_are_other_runs_and_train_as_tensors():
    plain, asked = run(OPTIMIZERS["sgd"], 0), probed("sgd", asked=("update_norm",))
    layers = plain.model.layers(DATA.shape, 3)
    assert rules.trains(plain, layers)
    assert not rules.trains(asked, layers)
    assert plain.pack_key() != asked.pack_key()
    assert "probes" not in plain.to_dict()
    assert RunConfig.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    with pytest.raises(ConfigError):
        results([plain, asked], DATA)


@pytest.mark.parametrize(
    "wrong", [("update_norm", "update_norm"), ("spectrum",), ["update_norm"], "update_norm"]
)
def test_what_is_no_probe_is_refused(wrong):
    with pytest.raises(ConfigError, match="probes"):
        replace(run(OPTIMIZERS["sgd"], 0), probes=wrong)


def test_the_numbers_are_counted():
    one = probed("sgd")
    layers = one.model.layers(DATA.shape, 3)
    (result,) = results([one], DATA)
    recorded = sum(record.values.size for record in result.records.values())
    assert probes.numbers(ALL, one.training, layers, DATA.shape) == recorded
    for probe, record in result.records.items():
        assert list(probes.points(probe, one.training)) == record.steps.tolist()
        assert record.values.shape[1:] == probes.shape(probe, layers, DATA.shape)
    assert isinstance(result, RunResult)


# --- cost ---


@pytest.mark.parametrize("name", ["sgd", "adam", "plain", "sgd_vgr"])
def test_a_cost_is_taken_of_every_run_at_the_end_and_changes_none(name):
    one, two = (probed(name, seed, ("cost", "update_norm")) for seed in (0, 1))
    found = results([one, two], DATA)
    without = results([replace(run, probes=("update_norm",)) for run in (one, two)], DATA)
    for result, plain in zip(found, without, strict=True):
        cost = result.records["cost"]
        assert bits(replace(result, records={"update_norm": result.records["update_norm"]})) == bits(plain)
        assert cost.steps.tolist() == [STEPS]
        ((seconds, peak),) = cost.values
        assert 0 < seconds < 60
        weights = sum(u.outputs * u.inputs for u in one.model.layers(DATA.shape, 3))
        assert 4 * weights < peak < 2**27


def test_a_cost_counts_the_bytes_of_a_batch(monkeypatch):
    """Four times the batch: four times what a step holds of its samples, beside that of its weights."""
    monkeypatch.setattr(cost, "MOST", 1)
    small, large = (
        results([probed("gauss-newton", asked=("cost",), batch_size=size)], DATA)[0].records["cost"].values[0]
        for size in (8, 32)
    )
    assert large[1] > 2 * small[1]


def test_what_is_allocated_and_freed_counts_at_its_peak():
    def work() -> None:
        first = torch.ones(2**18)
        del first
        second = torch.ones(2**19)
        third = torch.ones(2**16)
        del second, third

    assert allocations.peak(work) == 4 * (2**19 + 2**16)


def test_a_net_that_diverges_has_no_seconds(monkeypatch):
    monkeypatch.setattr(cost, "FIRST", 1)
    parts: list[Any] = []

    class Gone:
        index: tuple[int, ...] = ()

        def advance(self, stretch: Any, train_set: Any) -> None:
            parts.append(stretch)

    trainer = Trainer([probed("sgd")], DATA, torch.device("cpu"))
    found = cost.measure(Gone, trainer.batches, trainer.train_set)  # type: ignore[arg-type]
    assert len(parts) == 2
    assert torch.isnan(found[0])
