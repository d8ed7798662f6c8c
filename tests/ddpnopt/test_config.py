"""Configurations: refused with field, value and what is allowed; frozen; the same after a round trip."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpnopt.config import (
    MAX_DEPTH,
    MAX_SEED,
    MAX_STEPS,
    MAX_WIDTH,
    OPTIONS_OF,
    PRECONDITIONER_OF,
    Baseline,
    BaselineOptions,
    FeedbackConfig,
    LayerShape,
    ModelConfig,
    OptimizerConfig,
    PairedBaseline,
    RunConfig,
    TrainingConfig,
)
from ddpnopt.errors import ConfigError, DDPNOptError
from tests.ddpnopt.problems import baseline, ddpnopt, run, sgd

MODEL = ModelConfig((3,))
CNN = ModelConfig((3,), kind="cnn", channels=(4,) * 4)
TRAINING = TrainingConfig(10, 8, 5)
RUN = run(ddpnopt())

REFUSED = [
    # make, field, value as it is shown, words of what is allowed
    (lambda: ModelConfig((3,), kind="rnn"), "model.kind", "'rnn'", "fcn, cnn"),
    (lambda: ModelConfig((3,), kind="cnn"), "model.channels", "()", "at least one convolution"),
    (lambda: ModelConfig((3,), channels=(2,)), "model.channels", "(2,)", "nothing for an fcn"),
    (lambda: CNN.layers((64,), 10), "model.kind", "'cnn'", "no images"),
    (lambda: CNN.layers((1, 3, 3), 10), "model.channels", "(4, 4, 4, 4)", "at most 3 convolutions"),
    (lambda: ModelConfig((3,), "swish"), "model.activation", "'swish'", "tanh, relu, sigmoid, gelu"),
    (lambda: ModelConfig((3,), output="swish"), "model.output", "'swish'", "tanh, relu, sigmoid, gelu"),
    (lambda: BaselineOptions(momentum=1.0), "momentum", "1.0", "below 1"),
    (lambda: BaselineOptions(betas=(0.9, 1)), "betas[1]", "1", "below 1"),
    (lambda: BaselineOptions(betas=0.9), "betas", "0.9", "two numbers"),
    (lambda: BaselineOptions(damping=-1.0), "damping", "-1.0", "at least 0"),
    (lambda: BaselineOptions(second_moment="mean"), "second_moment", "'mean'", "batch, per_sample"),
    (lambda: BaselineOptions(inverse_every=0), "inverse_every", "0", "from 1"),
    (lambda: baseline("sgd", damping=0.1), "damping", "0.1", "nothing: sgd has momentum, weight_decay"),
    (lambda: baseline("adam", momentum=0.9), "momentum", "0.9", "nothing: adam has"),
    (lambda: replace(ddpnopt(), baseline="emsa"), "baseline", "'emsa'", "one of sgd, rmsprop, adam, kfac"),
    (lambda: FeedbackConfig(dynamics="third"), "ddpnopt.dynamics", "'third'", "first_order, second_order"),
    (lambda: FeedbackConfig(None, True, dynamics="second_order"), "ddpnopt.factorized", "True", "full rank"),
    (lambda: ModelConfig([3]), "model.hidden", "[3]", "tuple"),
    (lambda: ModelConfig((3,) * (MAX_DEPTH + 1)), "model.hidden", "65", "at most 64"),
    (lambda: ModelConfig((3, 0)), "model.hidden[1]", "0", "from 1 to 8192"),
    (lambda: ModelConfig((MAX_WIDTH + 1,)), "model.hidden[0]", "8193", "from 1 to 8192"),
    (lambda: ModelConfig((3.0,)), "model.hidden[0]", "3.0", "whole number"),
    (lambda: ModelConfig((True,)), "model.hidden[0]", "True", "whole number"),
    (lambda: replace(TRAINING, steps=0), "training.steps", "0", "from 1 to 10000000"),
    (lambda: replace(TRAINING, steps=MAX_STEPS + 1), "training.steps", "10000001", "from 1 to 10000000"),
    (lambda: replace(TRAINING, batch_size=0), "training.batch_size", "0", "from 1"),
    (lambda: replace(TRAINING, batch_size="8"), "training.batch_size", "'8'", "whole number"),
    (lambda: replace(TRAINING, eval_every=0), "training.eval_every", "0", "from 1"),
    (lambda: TrainingConfig(10, 8, 4, 0), "training.test_every", "0", "from 1"),
    (
        lambda: TrainingConfig(10, 8, 4, 6),
        "training.test_every",
        "6",
        "a multiple of eval_every, 4, or all 10",
    ),
    (lambda: TrainingConfig(10, 8, 4, None, "last"), "training.train_metrics", "'last'", "full, running"),
    (lambda: FeedbackConfig("newton"), "ddpnopt.terminal_hessian", "'newton'", "exact, gauss_newton"),
    (lambda: FeedbackConfig(convention="sum"), "ddpnopt.convention", "'sum'", "batch_mean, per_sample"),
    (lambda: FeedbackConfig(safeguard="none"), "ddpnopt.safeguard", "'none'", "clamp, psd"),
    (lambda: FeedbackConfig(curvature_scale=-1.0), "ddpnopt.curvature_scale", "-1.0", "at least 0"),
    (lambda: FeedbackConfig(curvature_scale=math.inf), "ddpnopt.curvature_scale", "inf", "finite"),
    (lambda: FeedbackConfig("exact", factorized=True), "ddpnopt.factorized", "True", "rank one"),
    (lambda: OptimizerConfig("lion", "baseline", 0.1), "baseline", "'lion'", "one of sgd"),
    (lambda: OptimizerConfig("sgd", "newton", 0.1), "method", "'newton'", "baseline, ddpnopt"),
    (lambda: sgd(0.0), "learning_rate", "0.0", "above 0"),
    (lambda: sgd(-0.1), "learning_rate", "-0.1", "above 0"),
    (lambda: sgd(math.nan), "learning_rate", "nan", "finite"),
    (lambda: sgd("0.1"), "learning_rate", "'0.1'", "finite number"),
    (lambda: sgd(True), "learning_rate", "True", "finite number"),
    (lambda: OptimizerConfig("sgd", "baseline", 0.1, 1e-3), "vxx_reg", "0.001", "nothing"),
    (lambda: OptimizerConfig("sgd", "baseline", 0.1, None, FeedbackConfig()), "vxx_reg", "None", "nothing"),
    (lambda: OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-3), "feedback", "None", "options"),
    (lambda: ddpnopt(vxx_reg=-1e-3), "vxx_reg", "-0.001", "at least 0"),
    (lambda: ddpnopt(vxx_reg=None), "vxx_reg", "None", "finite number"),
    (lambda: replace(RUN, loss="hinge"), "loss", "'hinge'", "cross_entropy"),
    (lambda: replace(RUN, dtype="float16"), "dtype", "'float16'", "float32, float64"),
    (lambda: replace(RUN, seed=-1), "seed", "-1", "from 0"),
    (lambda: replace(RUN, seed=MAX_SEED + 1), "seed", str(MAX_SEED + 1), "from 0"),
    (lambda: replace(RUN, seed=1.0), "seed", "1.0", "whole number"),
]


@pytest.mark.parametrize(("make", "field", "value", "allowed"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_is_refused_is_named_with_its_value_and_what_is_allowed(make, field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
    assert repr(caught.value.value) == value
    assert allowed in caught.value.allowed
    assert str(caught.value) == f"{field}: got {value}; allowed: {caught.value.allowed}"


def test_the_limits_themselves_are_allowed():
    assert len(ModelConfig((MAX_WIDTH,) * MAX_DEPTH).layers((5,), 3)) == MAX_DEPTH + 1
    assert ModelConfig(()).layers((5,), 3) == (LayerShape(3, 5, 1, 5),)
    assert TrainingConfig(MAX_STEPS, 1, MAX_STEPS).steps == MAX_STEPS
    assert replace(RUN, seed=MAX_SEED).seed == MAX_SEED
    assert ddpnopt(vxx_reg=0.0, curvature_scale=0.0).vxx_reg == 0.0
    assert sgd(1).learning_rate == 1  # whole numbers are numbers


def test_a_config_error_keeps_its_fields_across_processes():
    error = ConfigError("model.hidden[1]", 0, "a whole number from 1 to 8192")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ConfigError
    assert (again.field, again.value, again.allowed) == (error.field, error.value, error.allowed)
    assert str(again) == str(error)
    assert isinstance(error, ValueError)
    assert isinstance(error, DDPNOptError)


@pytest.mark.parametrize(
    "config",
    [RUN, RUN.model, RUN.training, RUN.optimizer, RUN.optimizer.feedback],
    ids=lambda c: type(c).__name__,
)
def test_frozen_hashable_and_without_room_for_more(config):
    assert is_dataclass(config)
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, None)
    assert not hasattr(config, "__dict__")
    assert hash(config) == hash(replace(config))
    assert config == replace(config)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("given_", "hessian", "factorized"),
    [
        ((None, None), "exact", False),
        ((None, False), "exact", False),
        ((None, True), "gauss_newton", True),
        (("exact", None), "exact", False),
        (("exact", False), "exact", False),
        (("gauss_newton", None), "gauss_newton", True),
        (("gauss_newton", False), "gauss_newton", False),
        (("gauss_newton", True), "gauss_newton", True),
    ],
)
def test_defaults_that_hang_on_each_other(given_, hessian, factorized):
    rest = {"convention": "per_sample", "curvature_scale": 0.5, "safeguard": "psd", "feedback": False}
    resolved = FeedbackConfig(*given_, **rest).resolved()
    assert resolved == FeedbackConfig(hessian, factorized, **rest)
    assert resolved.resolved() == resolved


finite = st.floats(0, 1e6, allow_nan=False)
feedbacks = st.builds(
    FeedbackConfig,
    st.just("gauss_newton"),
    st.sampled_from((None, False, True)),
    st.sampled_from(("batch_mean", "per_sample")),
    finite,
    st.sampled_from(("clamp", "psd")),
    st.booleans(),
) | st.just(FeedbackConfig())
fraction = st.floats(0, 1, exclude_max=True)
optimizers = (
    st.builds(OptimizerConfig, st.just("sgd"), st.just("ddpnopt"), finite.filter(bool), finite, feedbacks)
    | st.builds(sgd, finite.filter(bool))
    | st.builds(baseline, st.just("adam"), betas=st.tuples(fraction, fraction), eps=finite)
    | st.builds(baseline, st.just("ekfac"), damping=finite, factor_decay=fraction)
)
runs = st.builds(
    RunConfig,
    dataset=st.sampled_from(("wine", "digits")),
    model=st.builds(
        ModelConfig,
        st.lists(st.integers(1, MAX_WIDTH), max_size=5).map(tuple),
        st.sampled_from(("tanh", "relu", "sigmoid", "identity")),
    )
    | st.just(CNN),
    loss=st.just("cross_entropy"),
    training=st.builds(
        TrainingConfig, st.integers(1, MAX_STEPS), st.integers(1, 1_000_000), st.integers(1, MAX_STEPS)
    ),
    optimizer=optimizers,
    seed=st.integers(0, MAX_SEED),
    dtype=st.sampled_from(("float32", "float64")),
)


@given(runs)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_run_is_the_same_after_a_trip_through_json(one):
    again = RunConfig.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again == one
    assert hash(again) == hash(one)


def test_a_run_written_before_there_were_options_reads_as_it_was_meant():
    data = json.loads(json.dumps(run(sgd()).to_dict()))
    del data["optimizer"]["options"], data["model"]["channels"], data["model"]["output"]
    assert RunConfig.from_dict(data) == run(sgd())


def test_a_convolution_takes_the_gauss_newton_form():
    assert FeedbackConfig().resolved(convolutional=True) == FeedbackConfig("gauss_newton", True)
    second = FeedbackConfig(dynamics="second_order")
    assert second.resolved(convolutional=True) == replace(
        second, terminal_hessian="gauss_newton", factorized=False
    )
    exact = FeedbackConfig("exact")
    assert exact.resolved(convolutional=True) == FeedbackConfig("exact", factorized=False)


def test_every_baseline_says_which_options_it_takes():
    assert set(OPTIONS_OF) == set(get_args(Baseline))
    assert set(PRECONDITIONER_OF) == set(get_args(PairedBaseline))
    known = {field.name for field in fields(BaselineOptions)}
    assert {name for names in OPTIONS_OF.values() for name in names} == known


@pytest.mark.parametrize("place", [(), ("model",), ("training",), ("optimizer",), ("optimizer", "feedback")])
def test_unknown_keys_are_refused(place):
    data = json.loads(json.dumps(RUN.to_dict()))
    part = data
    for key in place:
        part = part[key]
    part["momentun"] = 0.9
    with pytest.raises(TypeError, match="momentun"):
        RunConfig.from_dict(data)


def test_from_dict_checks_values():
    data = RUN.to_dict()
    data["optimizer"]["learning_rate"] = -1.0
    with pytest.raises(ConfigError, match="learning_rate"):
        RunConfig.from_dict(data)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (replace(RUN, seed=5), True),
        (replace(RUN, optimizer=sgd()), True),
        (replace(RUN, optimizer=ddpnopt(0.3, 0.1, safeguard="psd")), True),
        (replace(RUN, dataset="wine"), False),
        (replace(RUN, dtype="float32"), False),
        (replace(RUN, model=MODEL), False),
        (replace(RUN, training=TRAINING), False),
    ],
)
def test_what_runs_of_a_pack_share(other, shared):
    assert (RUN.pack_key() == other.pack_key()) is shared


@pytest.mark.parametrize(
    ("test_every", "train_metrics", "train", "test"),
    [
        (None, "full", [0, 4, 8, 10], [0, 4, 8, 10]),
        (8, "full", [0, 4, 8, 10], [0, 8, 10]),
        (10, "full", [0, 4, 8, 10], [0, 10]),  # all of the steps, though no multiple
        (4, "running", [4, 8, 10], [0, 4, 8, 10]),
    ],
)
def test_what_is_measured_when(test_every, train_metrics, train, test):
    training = TrainingConfig(10, 8, 4, test_every, train_metrics)
    points = list(training.points())
    assert [step for step in points if training.takes_train_metrics(step)] == train
    assert [step for step in points if training.takes_test_metrics(step)] == test
