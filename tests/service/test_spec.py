"""Bad input is refused with the field, the value and what is allowed; good input comes through whole."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

import pytest
import yaml

from ddpnopt import config
from ddpnopt.errors import ConfigError
from service.errors import InvalidInputError
from service.sweeps.documents import parse_json, parse_spec, parse_yaml
from service.sweeps.expand import plan
from service.sweeps.spec import SweepSpec
from tests.conftest import EXAMPLES, SMALL_SPEC, STORED_BEFORE

CNN = {"kind": "cnn", "channels": [4, 4], "hidden": [], "activation": "relu"}


def grid(baseline: str, **options: Any) -> dict[str, Any]:
    return {"baseline": baseline, "options": options, "learning_rate": [0.1], "vxx_reg": [1e-4]}


def lone(baseline: str, **options: Any) -> dict[str, Any]:
    return {"baseline": baseline, "options": options, "learning_rate": [0.1]}


BAD: list[tuple[str, Any, str, str]] = [
    # where, what is put there, the field that the error names, a piece of what it says is allowed
    ("colour", "red", "colour", "one of the keys name, dataset, model"),
    ("model.wide", 3, "model.wide", "one of the keys kind, hidden, activation"),
    ("grids.0.foo", 3, "grids[0].foo", "one of the keys baseline, options, learning_rate"),
    ("grids.0.ddpnopt", {"x": 1}, "grids[0].ddpnopt.x", "one of the keys terminal_hessian"),
    ("grids.0.learning_rate", [], "grids[0].learning_rate", "at least 1"),
    ("grids.0.learning_rate", [0.1, 0.1], "grids[0].learning_rate", "0.1 is there twice"),
    ("grids.0.vxx_reg", [0, 0.0], "grids[0].vxx_reg", "each value once"),
    ("grids.0.learning_rate", [0.1, 0], "grids[0].learning_rate[1]", "greater than 0"),
    ("grids.0.learning_rate", [-0.5], "grids[0].learning_rate[0]", "greater than 0"),
    ("grids.0.vxx_reg", [-1e-9], "grids[0].vxx_reg[0]", "greater than or equal to 0"),
    ("grids.0.vxx_reg", [float("nan")], "grids[0].vxx_reg[0]", "finite"),
    ("grids.0.learning_rate", [float("inf")], "grids[0].learning_rate[0]", "finite"),
    ("grids.0.learning_rate", ["0.1"], "grids[0].learning_rate[0]", "number"),
    ("grids.0.learning_rate", [True], "grids[0].learning_rate[0]", "number"),
    ("grids.0.baseline", "adamw", "grids[0].baseline", "one of sgd, rmsprop, adam, kfac, ekfac, the base"),
    ("grids.0.baseline", "adamw", "grids[0].baseline", "or of sgd_vgr, emsa, vanilla_ddp, which have none"),
    ("grids.0.baseline", "emsa", "grids[0].vxx_reg", "nothing: emsa has no DDPNOpt partner"),
    ("grids.0", {"baseline": "sgd", "learning_rate": [0.1]}, "grids[0].vxx_reg", "it is required"),
    ("grids.0", lone("emsa") | {"vxx_reg": 3}, "grids[0].vxx_reg", "nothing: emsa has no DDPNOpt partner"),
    ("grids.0", lone("sgd_vgr") | {"vxx_reg": None}, "grids[0].vxx_reg", "nothing: sgd_vgr has no DDPNOpt"),
    (
        "grids.0",
        lone("vanilla_ddp") | {"ddpnopt": {"safeguard": "psd"}},
        "grids[0].ddpnopt",
        "nothing: vanilla_ddp has no DDPNOpt partner",
    ),
    ("grids.0", lone("emsa") | {"ddpnopt": {"x": 1}}, "grids[0].ddpnopt.x", "one of the keys terminal_hess"),
    ("grids.0", lone("emsa") | {"learning_rate": []}, "grids[0].learning_rate", "at least 1"),
    ("grids.0", lone("sgd_vgr", damping=1), "grids[0].options.damping", "of sgd_vgr: momentum, weight_decay"),
    ("grids.0", lone("sgd_vgr", vgr=-1), "grids[0].options.vgr", "greater than or equal to 0"),
    ("grids.0", lone("emsa", momentum=0.5), "grids[0].options.momentum", "of emsa: weight_decay, augmentat"),
    ("grids.0", lone("emsa", lbfgs_steps=0), "grids[0].options.lbfgs_steps", "greater than or equal to 1"),
    (
        "grids.0",
        lone("emsa", lbfgs_steps=10**5),
        "grids[0].options.lbfgs_steps",
        "less than or equal to 10000",
    ),
    ("grids.0", lone("vanilla_ddp", vgr=1), "grids[0].options.vgr", "of vanilla_ddp: weight_decay, quu_reg"),
    (
        "grids.0",
        lone("vanilla_ddp", memory_limit=0),
        "grids[0].options.memory_limit",
        "greater than or equal",
    ),
    (
        "grids.0",
        lone("vanilla_ddp", memory_limit=1000),
        "grids[0].options.memory_limit",
        "at least 155624: one run's dense matrices take 0.000145 GiB, over the limit of 9.31e-07 GiB, for "
        "layer 0's 56 controls and batches of 16; make the layers narrower or the batch smaller",
    ),
    ("grids.0.baseline", 3, "grids[0].baseline", "one of sgd, rmsprop"),
    ("grids.0", {"learning_rate": [0.1], "vxx_reg": [0]}, "grids[0].baseline", "it is required"),
    ("grids.0", 3, "grids[0]", "a mapping"),
    ("grids.0.sgd", 3, "grids[0].sgd", "one of the keys baseline, options, learning_rate"),
    (
        "grids.0.options",
        {"foo": 1},
        "grids[0].options.foo",
        "one of the options of sgd: momentum, weight_decay",
    ),
    ("grids.0.options", {"rho": 0.9}, "grids[0].options.rho", "one of the options of sgd: momentum, weight"),
    ("grids.0.options", {"momentum": 1}, "grids[0].options.momentum", "less than 1"),
    ("grids.0.options", {"momentum": "0.9"}, "grids[0].options.momentum", "number"),
    ("grids.0.options", {"weight_decay": -1}, "grids[0].options.weight_decay", "greater than or equal to 0"),
    ("grids.0.options", {"weight_decay": float("nan")}, "grids[0].options.weight_decay", "finite"),
    ("grids.0.options", [], "grids[0].options", "a mapping"),
    (
        "grids.0",
        grid("rmsprop", second_moment="x"),
        "grids[0].options.second_moment",
        "'batch' or 'per_sample'",
    ),
    ("grids.0", grid("adam", momentum=0.5), "grids[0].options.momentum", "of adam: weight_decay, betas, eps"),
    ("grids.0", grid("adam", betas=[0.9]), "grids[0].options.betas", "at least 2"),
    ("grids.0", grid("adam", betas=[0.9, 1.5]), "grids[0].options.betas[1]", "less than 1"),
    (
        "grids.0",
        grid("ekfac", inverse_every=0),
        "grids[0].options.inverse_every",
        "greater than or equal to 1",
    ),
    ("grids.0", grid("kfac", rho=0.5), "grids[0].options.rho", "of kfac: momentum, weight_decay, damping"),
    ("grids", [], "grids", "at least 1"),
    ("dataset", "imagenet", "dataset", "one of cifar10, clusters12, clusters15, clusters5, clusters8, "),
    ("model.kind", "transformer", "model.kind", "'fcn' or 'cnn'"),
    ("model.kind", "cnn", "model.channels", "at least one convolution"),
    ("model.channels", [3], "model.channels", "nothing for an fcn"),
    ("model", CNN, "model.kind", "fcn: samples of shape (13,) are no images"),
    ("model", CNN | {"channels": [0]}, "model.channels[0]", "greater than or equal to 1"),
    ("model.activation", "swish", "model.activation", "'tanh', 'relu', 'sigmoid', 'gelu', 'leaky_relu' or"),
    ("model.output", "softmax", "model.output", "'tanh', 'relu', 'sigmoid', 'gelu', 'leaky_relu' or"),
    ("model.hidden", [10**9], "model.hidden[0]", "8192"),
    ("model.hidden", [0], "model.hidden[0]", "greater than or equal to 1"),
    ("model.hidden", [4] * 65, "model.hidden", "at most 64"),
    ("model.hidden", [8192] * 12, "model.hidden", "MiB"),
    ("training.steps", 0, "training.steps", "greater than or equal to 1"),
    ("training.steps", 1.5, "training.steps", "integer"),
    ("training.batch_size", 143, "training.batch_size", "at most 142, the training set of wine"),
    ("training.eval_every", 5, "training.eval_every", "from 1 to 4"),
    ("training.test_every", 3, "training.test_every", "a multiple of eval_every, 2, or all 4 steps"),
    ("training.train_metrics", "last", "training.train_metrics", "'full' or 'running'"),
    ("training", {"steps": 10**7, "batch_size": 8, "eval_every": 1}, "training.eval_every", "from 5000 to"),
    ("training.batch_size", 0, "training.batch_size", "greater than or equal to 1"),
    ("seeds", 0, "seeds", "greater than or equal to 1"),
    ("seeds", [], "seeds", "at least 1"),
    ("seeds", [3, 3], "seeds", "3 is there twice"),
    ("seeds", [-1], "seeds[0]", "greater than or equal to 0"),
    ("seeds", [2**64], "seeds[0]", "less than or equal to"),
    ("seeds", True, "seeds", "integer"),
    ("loss", "hinge", "loss", "'cross_entropy', 'mse' or 'mmc'"),
    ("dtype", "float16", "dtype", "'float32' or 'float64'"),
    ("name", "", "name", "at least 1 character"),
    ("name", "a\x00b", "name", "printable"),
    ("name", "\ud800", "name", "string"),
    ("grids.0.ddpnopt", {"convention": "sum"}, "grids[0].ddpnopt.convention", "'batch_mean' or 'per_sample'"),
    (
        "grids.0.ddpnopt",
        {"factorized": True, "terminal_hessian": "exact"},
        "grids[0].ddpnopt.factorized",
        "gauss_newton",
    ),
    (
        "grids.0.ddpnopt",
        {"factorized": True, "dynamics": "second_order"},
        "grids[0].ddpnopt.factorized",
        "false with second-order dynamics",
    ),
    ("grids.0.ddpnopt", {"dynamics": 2}, "grids[0].ddpnopt.dynamics", "'first_order' or 'second_order'"),
    ("grids.0.learning_rate", [k + 1 for k in range(31_623)], "grids[0].learning_rate", "at most 1000"),
]


def put(document: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *path, last = (int(step) if step.isdigit() else step for step in where.split("."))
    place: Any = document
    for step in path:
        place = place[step]
    place[last] = value
    return document


@pytest.mark.parametrize(("where", "value", "field", "allowed"), BAD)
def test_bad_input_is_named(where: str, value: Any, field: str, allowed: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan(parse_spec(put(SMALL_SPEC, where, value)))
    named = {error.field: error for error in caught.value.errors}
    assert field in named
    assert allowed in named[field].allowed
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["name", "dataset", "model", "training", "seeds", "grids"])
def test_a_missing_field_is_named(field: str, small_spec: dict[str, Any]) -> None:
    del small_spec[field]
    with pytest.raises(InvalidInputError, match=f"{field}: got nothing; allowed: it is required"):
        parse_spec(small_spec)


def test_a_billion_cells_are_refused_by_arithmetic(small_spec: dict[str, Any]) -> None:
    axis = [k + 1.0 for k in range(1000)]
    small_spec["grids"][0] |= {"learning_rate": axis, "vxx_reg": axis}
    small_spec["seeds"] = 1000
    with pytest.raises(InvalidInputError, match='grids: got "1001000000 runs"; allowed: at most 1000000'):
        parse_spec(small_spec)


def test_all_errors_are_told_at_once(small_spec: dict[str, Any]) -> None:
    small_spec |= {"dataset": "x", "seeds": 0, "extra": 1}
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(small_spec)
    assert {error.field for error in caught.value.errors} == {"dataset", "seeds", "extra"}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("- 1\n- 2", "document", "[1, 2]"),
        ("just words", "document", "just words"),
        ("", "document", "null"),
        ("a: [1, 2", "line 1", "expected ',' or ']'"),
        ("name: !!python/object/apply:os.system [ls]", "line 1", "the tag"),
        ("name: !mine x", "line 1", "the tag"),
        ("a: &x 1\nb: *x", "line 2", "an alias"),
        ("name: a\nname: b", "line 1", "the key 'name' twice"),
        ("? [1, 2]\n: 3", "line 1", "unhashable"),
        ("\x01", "document", "special characters"),
        ("[" * 5000, "document", ""),
    ],
)
def test_bad_yaml(text: str, field: str, value: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_yaml(text.encode())
    (error,) = caught.value.errors
    assert error.field == field
    assert value in error.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"[1]", "[1]"),
        (b"{", "Expecting"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"\xff\xfe\x00", ""),
        (b"[" * 100_000, ""),
        (b'{"a": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_bad_json(text: bytes, value: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_json(text)
    assert value in caught.value.errors[0].value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_named_in_json_too(small_spec: dict[str, Any], number: str) -> None:
    text = json.dumps(small_spec).replace("[0.1, 0.5]", f"[0.1, {number}]")
    with pytest.raises(InvalidInputError, match=r"grids\[0\].learning_rate\[1\].*finite number"):
        parse_spec(parse_json(text.encode()))


def test_many_errors_are_told_briefly(small_spec: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(small_spec | {f"{'x' * 200}{k}": k for k in range(5000)})
    assert len(caught.value.errors) == 21
    assert caught.value.errors[-1].value == "4980 more errors"
    assert len(str(caught.value)) < 10_000


def test_yaml_and_json_say_the_same(small_spec: dict[str, Any]) -> None:
    from_json = parse_spec(parse_json(json.dumps(small_spec).encode()))
    from_yaml = parse_spec(parse_yaml(yaml.safe_dump(small_spec).encode()))
    assert from_json == from_yaml


def test_yaml_numbers_in_every_usual_notation() -> None:
    document = parse_yaml(b"a: [5e-5, 5.0e-5, 1.e-3, .5, 1E3, +2e0, -3, 2026-11-23, 1:30, 010]")
    assert document["a"] == [5e-5, 5e-5, 1e-3, 0.5, 1000.0, 2.0, -3, "2026-11-23", "1:30", "010"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_good(path: Any) -> None:
    assert plan(parse_spec(parse_yaml(path.read_bytes()))).runs_total > 0


def test_what_is_stored_reads_back_as_the_same_spec(small_spec: dict[str, Any]) -> None:
    spec = parse_spec(small_spec)
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert SweepSpec.model_validate(stored) == spec
    again = spec.run_config(0, "ddpnopt", 0.1, 1e-4, 2)
    assert SweepSpec.model_validate(stored).run_config(0, "ddpnopt", 0.1, 1e-4, 2) == again


def on_digits(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(SMALL_SPEC) | {"dataset": "digits", "model": CNN} | changes


def test_a_net_that_pools_its_images_away_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(on_digits(model=CNN | {"channels": [2] * 8}))
    (error,) = caught.value.errors
    assert error.field == "model.channels"
    assert error.allowed == "at most 7 convolutions for images of 8 × 8"


def test_all_errors_of_a_grids_options_are_told_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(SMALL_SPEC | {"grids": [grid("ekfac", rho=0.9, damping=-1, inverse_every=0)]})
    assert {error.field for error in caught.value.errors} == {
        f"grids[0].options.{name}" for name in ("rho", "damping", "inverse_every")
    }


@pytest.mark.parametrize("baseline", get_args(config.Baseline))
def test_a_baselines_options_are_those_of_the_numerics(baseline: str) -> None:
    document = lone(baseline) | {"vxx_reg": []}
    options = parse_spec(SMALL_SPEC | {"grids": [document]}).grids[0].options
    assert tuple(type(options).model_fields) == config.OPTIONS_OF[baseline]
    assert options.resolved() == config.BaselineOptions()


@pytest.mark.parametrize("baseline", get_args(config.PairedBaseline))
def test_a_baseline_may_be_trained_alone(baseline: str) -> None:
    spec = parse_spec(SMALL_SPEC | {"grids": [lone(baseline) | {"vxx_reg": []}, grid(baseline)]})
    alone, paired = spec.grids
    assert (alone.has_cells, alone.methods()) == (False, ("baseline",))
    assert (paired.has_cells, paired.methods()) == (True, ("baseline", "ddpnopt"))
    assert spec.runs_total() == 3 + 6
    assert spec.run_config(0, "baseline", 0.1, None, 1) == spec.run_config(1, "baseline", 0.1, None, 1)


@pytest.mark.parametrize(
    ("baseline", "options"),
    [
        ("sgd_vgr", {"momentum": 0.9, "weight_decay": 0.1, "vgr": 0.5}),
        ("emsa", {"weight_decay": 0.1, "augmentation": 2.0, "lbfgs_steps": 7}),
        ("vanilla_ddp", {"weight_decay": 0.1, "quu_reg": 0.5, "memory_limit": 10**9}),
    ],
)
def test_a_baseline_without_a_partner_is_a_grid(baseline: str, options: dict[str, Any]) -> None:
    spec = parse_spec(SMALL_SPEC | {"grids": [lone(baseline, **options)]})
    (found,) = spec.grids
    assert (found.vxx_reg, found.has_cells, spec.runs_total()) == ([], False, 3)
    assert found.setting() == ", ".join(f"{name} {value}" for name, value in options.items())
    run = spec.run_config(0, "baseline", 0.1, None, 2)
    assert run.optimizer == config.OptimizerConfig(
        found.baseline, "baseline", 0.1, options=config.BaselineOptions(**options)
    )
    assert config.RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert SweepSpec.model_validate(stored) == spec


def test_defaults_of_the_partner_may_be_written_where_there_is_none() -> None:
    written = {"vxx_reg": [], "ddpnopt": {"safeguard": "clamp"}}
    spec = parse_spec(SMALL_SPEC | {"grids": [lone("emsa") | written]})
    assert spec == parse_spec(SMALL_SPEC | {"grids": [lone("emsa")]})


def test_every_baseline_has_a_partner_or_none() -> None:
    paired, alone = get_args(config.PairedBaseline), get_args(config.LoneBaseline)
    assert (*paired, *alone) == get_args(config.Baseline)


def test_vanilla_ddp_is_refused_for_a_cnn() -> None:
    grids = [grid("sgd"), lone("sgd_vgr"), lone("emsa"), lone("vanilla_ddp")]
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(on_digits(grids=grids))
    (error,) = caught.value.errors
    assert (error.field, error.value) == ("grids[3].baseline", '"vanilla_ddp"')
    assert error.allowed.startswith("any other for a cnn")
    assert parse_spec(on_digits(grids=grids[:3])).runs_total() == 6 + 3 + 3


def test_what_the_numerics_refuse_is_a_field_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the numerics stricter than the spec's own bounds, the error would still name its field."""

    def refuse(self: config.BaselineOptions) -> None:
        raise ConfigError("betas[1]", self.betas[1], "something else")

    monkeypatch.setattr(config.BaselineOptions, "__post_init__", refuse)
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(SMALL_SPEC | {"grids": [grid("adam")]})
    assert [str(error) for error in caught.value.errors] == [
        "grids[0].options.betas[1]: got 0.999; allowed: something else"
    ]


def test_a_spec_of_everything_reaches_the_runs() -> None:
    wide = {"terminal_hessian": "gauss_newton", "factorized": False, "dynamics": "second_order"}
    adam = grid("adam", betas=[0.8, 0.9], weight_decay=1e-4)
    document = on_digits(
        model=CNN | {"hidden": [5], "activation": "gelu", "output": "sigmoid"},
        loss="mmc",
        grids=[grid("rmsprop", rho=0.9, second_moment="per_sample"), adam | {"ddpnopt": wide}],
    )
    spec = parse_spec(parse_yaml(yaml.safe_dump(document).encode()))
    baseline, partner = (
        spec.run_config(0, "baseline", 0.1, None, 0),
        spec.run_config(1, "ddpnopt", 0.1, 1e-4, 7),
    )
    assert baseline.model == config.ModelConfig((5,), "gelu", "cnn", (4, 4), "sigmoid")
    assert baseline.loss == "mmc"
    assert baseline.optimizer.options == config.BaselineOptions(rho=0.9, second_moment="per_sample")
    assert baseline.optimizer.feedback is None
    assert partner.optimizer.options == config.BaselineOptions(betas=(0.8, 0.9), weight_decay=1e-4)
    assert partner.optimizer.feedback == config.FeedbackConfig("gauss_newton", False, dynamics="second_order")
    assert baseline.pack_key() == partner.pack_key()
    stored = SweepSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert stored == spec
    for run in (baseline, partner):
        assert config.RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_what_an_older_version_stored_reads_as_the_same_spec(small_spec: dict[str, Any]) -> None:
    stored = SweepSpec.model_validate(STORED_BEFORE)
    assert stored == parse_spec(small_spec | {"name": "stored before"})
    run = stored.run_config(0, "ddpnopt", 0.1, 1e-4, 2)
    assert run.optimizer == config.OptimizerConfig("sgd", "ddpnopt", 0.1, 1e-4, config.FeedbackConfig())
    before = run.to_dict()
    del before["optimizer"]["options"], before["optimizer"]["feedback"]["dynamics"]
    before["model"] = {"hidden": [4], "activation": "tanh"}
    assert config.RunConfig.from_dict(json.loads(json.dumps(before))) == run


def test_a_grid_names_what_it_sets() -> None:
    document = grid("adam", betas=[0.8, 0.9], eps=1e-6) | {"ddpnopt": {"feedback": False, "safeguard": "psd"}}
    spec = parse_spec(SMALL_SPEC | {"grids": [document, grid("adam", betas=[0.9, 0.999])]})
    assert spec.grids[0].setting() == "betas 0.8 0.9, eps 1e-06, safeguard psd, feedback false"
    assert spec.grids[1].setting() == ""
    alone = parse_spec(SMALL_SPEC | {"grids": [document | {"vxx_reg": []}]})
    assert alone.grids[0].setting() == "betas 0.8 0.9, eps 1e-06"


def test_the_schema_tells_each_baseline_its_options() -> None:
    schema = SweepSpec.model_json_schema()
    variants = schema["properties"]["grids"]["items"]
    assert set(variants["discriminator"]["mapping"]) == set(get_args(config.Baseline))
    for baseline, place in variants["discriminator"]["mapping"].items():
        grid = schema["$defs"][place.rpartition("/")[2]]
        reference = grid["properties"]["options"]["$ref"]
        options = schema["$defs"][reference.rpartition("/")[2]]
        assert tuple(options["properties"]) == config.OPTIONS_OF[baseline]
        assert options["additionalProperties"] is False
        paired = baseline in get_args(config.PairedBaseline)
        assert ("vxx_reg" in grid["required"]) == paired
        assert grid["properties"]["vxx_reg"]["maxItems"] == (1000 if paired else 0)
