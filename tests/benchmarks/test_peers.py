"""The peers do what they claim: the updates of ours, for the same runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from benchmarks import peers, tune
from benchmarks.peers import Net, Product
from ddpnopt import BaselineOptimizer
from ddpnopt.config import BaselineOptions, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpnopt.pack.engine import train
from ddpnopt.results import Finished
from service.sweeps.documents import parse_spec

FCN = Net("digits", ModelConfig((6, 5)))
CNN = Net("digits", ModelConfig((5,), "tanh", "cnn", channels=(3, 4)))
BATCH, UPDATES = 8, 6
WIDTHS = (64, 16, 16, 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours(
    name: str, net: Net, rate: float, options: BaselineOptions, batch: int = BATCH
) -> list[torch.Tensor]:
    """Train a net by this project's own optimizer on the peer's batches."""
    model = peers.model_of(net, 0, torch.float64)
    optimizer = BaselineOptimizer(model, name, lr=rate, options=options)
    inputs, targets = peers.samples_of(net, torch.float64)
    for rows in peers.batches_of(0, len(targets), batch, UPDATES):
        optimizer.step(inputs[rows], targets[rows])
        assert optimizer.status is None
    return list(model.parameters())


@pytest.mark.parametrize("net", [FCN, CNN], ids=["fcn", "cnn"])
@pytest.mark.parametrize(
    ("name", "rate", "tolerance"),
    [
        ("sgd", 0.3, 1e-12),
        ("rmsprop", 0.01, 1e-8),
        ("adam", 0.01, 1e-8),
        ("kfac", 0.1, 1e-9),
        ("ekfac", 0.1, 1e-9),
    ],
)
def test_a_plain_loop_makes_the_updates_of_ours(net: Net, name: str, rate: float, tolerance: float) -> None:
    loop = peers.plain_loop(name, net, BATCH, UPDATES, rate=rate, dtype=torch.float64)
    start = [p.detach().clone() for p in loop.model.parameters()]
    loop()
    wanted = ours(name, net, rate, BaselineOptions())
    for before, found, expected in zip(start, loop.model.parameters(), wanted, strict=True):
        assert not torch.equal(before, found)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("net", [FCN, CNN], ids=["fcn", "cnn"])
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_damping_and_the_interval_of_inversions_mean_the_same(net: Net, name: str) -> None:
    # Factors of full rank: what a batch leaves out has no basis of its own, and the next batch is in it.
    batch = 400
    loop = peers.plain_loop(
        name, net, batch, UPDATES, rate=0.05, dtype=torch.float64, damping=0.1, inverse_every=4
    )
    loop()
    wanted = ours(name, net, 0.05, BaselineOptions(damping=0.1, inverse_every=4), batch)
    for found, expected in zip(loop.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_plain_loop_trains_the_packs_run() -> None:
    """Over an epoch's end: the same weights at the start, and the same batches."""
    seed, batch, steps = 3, 400, 8
    training = TrainingConfig(steps, batch, steps)
    run = RunConfig(
        "digits",
        FCN.model,
        "cross_entropy",
        training,
        OptimizerConfig("sgd", "baseline", 0.5),
        seed,
        "float64",
    )
    *_, last = train([run])
    assert isinstance(last, Finished)
    loop = peers.plain_loop("sgd", FCN, batch, steps, rate=0.5, seed=seed, dtype=torch.float64)
    loop()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(loop.model(loop.inputs), loop.targets)
    assert float(loss) == pytest.approx(last.results[0].metrics["train_loss"], rel=1e-10)


@pytest.mark.parametrize("net", [FCN, CNN], ids=["fcn", "cnn"])
def test_the_ensemble_is_as_many_plain_loops(net: Net) -> None:
    rates = (0.1, 0.4, 0.8)
    ensemble = peers.functional_ensemble(len(rates), net, BATCH, UPDATES, rates=rates, dtype=torch.float64)
    ensemble()
    for run, rate in enumerate(rates):
        loop = peers.plain_loop("sgd", net, BATCH, UPDATES, rate=rate, seed=run, dtype=torch.float64)
        loop()
        for name, wanted in loop.model.named_parameters():
            torch.testing.assert_close(
                ensemble.parameters[name][run], wanted.detach(), rtol=1e-11, atol=1e-11
            )


def test_a_second_call_goes_on_training() -> None:
    sides: list[tuple[Callable[[], None], Callable[[], torch.Tensor]]] = []
    loop = peers.plain_loop("adam", FCN, BATCH, 2)
    sides.append((loop, lambda: next(loop.model.parameters())))
    ensemble = peers.functional_ensemble(2, FCN, BATCH, 2)
    sides.append((ensemble, lambda: ensemble.parameters["0.weight"]))
    for call, weights in sides:
        call()
        once = weights().detach().clone()
        call()
        assert not torch.equal(once, weights())


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(3, 2, bias=False),
        torch.nn.Conv2d(2, 2, 3, groups=2),
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)),
    ],
)
def test_ekfac_refuses_what_it_would_leave_out(module: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="Linear and Conv2d"):
        peers.EKFAC(module, lr=0.1)


def test_the_nets_are_the_papers() -> None:
    assert {
        name: "-".join(map(str, peers.NETS[name].widths())) for name in peers.NETS if "CNN" not in name
    } == {
        "64-16-16-16-16-10": "64-16-16-16-16-10",
        "64-10-10-10-10-10": "64-10-10-10-10-10",
    }


def test_a_step_of_sgd_needs_three_products_a_layer_less_one() -> None:
    products = peers.sgd_products(WIDTHS, BATCH)
    assert products[:3] == [Product(BATCH, n, m) for n, m in pairwise(WIDTHS)]
    assert products[3:5] == [Product(10, BATCH, 16), Product(BATCH, 10, 16)]
    assert products[-1] == Product(16, BATCH, 64)
    forward = 2 * BATCH * (64 * 16 + 16 * 16 + 16 * 10)
    assert peers.flops(products) == 3 * forward - 2 * BATCH * 64 * 16


def test_a_step_of_ddpnopt_needs_a_second_row_and_a_second_pass() -> None:
    products = peers.ddpnopt_products(WIDTHS, BATCH)
    first, inner, last = (2 * BATCH * n * m for n, m in pairwise(WIDTHS))
    forward, gradients = first + inner + last, first + inner + last
    pulled_back, feedback, again = 2 * (inner + last), inner + last, first + inner
    assert peers.flops(products) == forward + gradients + pulled_back + feedback + again
    assert Product(2 * BATCH, 10, 16) in products


def test_the_rate_is_of_all_products_together() -> None:
    rate = peers.batched_matmul_rate(peers.sgd_products(WIDTHS, BATCH), 2, repeats=1)
    assert rate > 0


def test_the_panel_comes_to_200_runs_on_both_sides() -> None:
    panel = parse_spec(tune.spec(1000, 10))
    assert panel.runs_total() == tune.RUNS == 200
    assert panel.seed_list() == tuple(range(10, 20))
    assert panel.training.resolved() == TrainingConfig(1000, 8, 1000)
    assert panel.model.resolved() == tune.NET.model
    assert parse_spec(tune.spec(1000, 0, curves=True)).training.resolved().eval_every == 50
    runs = tune.trials(1000, tune.RUNS)
    assert len(runs) == 200
    distinct = {(run["learning_rate"], run["seed"]) for run in runs[:40]}
    assert distinct == {(rate, seed) for rate in tune.RATES for seed in range(10)}
    assert all(runs[i] == runs[i % 40] for i in range(200))


def test_what_was_not_run_is_added_at_the_pace_after_the_first_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CORES", 2)
    # Ten seconds until two have ended at once, then one every two seconds.
    ended = [110.0, 110.0, 112.0, 114.0, 116.0, 118.0]
    assert tune.scaled(19.0, ended, 106) == (219.0, 2.0)
    assert tune.scaled(19.0, ended, 6) == (19.0, 2.0)
