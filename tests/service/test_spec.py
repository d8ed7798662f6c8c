"""Bad input is refused with the field, the value and what is allowed; good input comes through whole."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml

from service.errors import InvalidInputError
from service.sweeps.documents import parse_json, parse_spec, parse_yaml
from service.sweeps.expand import plan
from service.sweeps.spec import SweepSpec
from tests.conftest import EXAMPLES, SMALL_SPEC

BAD: list[tuple[str, Any, str, str]] = [
    # where, what is put there, the field that the error names, a piece of what it says is allowed
    ("colour", "red", "colour", "one of the keys name, dataset, model"),
    ("model.wide", 3, "model.wide", "one of the keys kind, hidden, activation"),
    ("grids.0.foo", 3, "grids[0].foo", "one of the keys baseline, learning_rate"),
    ("grids.0.ddpnopt", {"x": 1}, "grids[0].ddpnopt.x", "one of the keys terminal_hessian"),
    ("grids.0.learning_rate", [], "grids[0].learning_rate", "at least 1"),
    ("grids.0.vxx_reg", [], "grids[0].vxx_reg", "at least 1"),
    ("grids.0.learning_rate", [0.1, 0.1], "grids[0].learning_rate", "0.1 is there twice"),
    ("grids.0.vxx_reg", [0, 0.0], "grids[0].vxx_reg", "each value once"),
    ("grids.0.learning_rate", [0.1, 0], "grids[0].learning_rate[1]", "greater than 0"),
    ("grids.0.learning_rate", [-0.5], "grids[0].learning_rate[0]", "greater than 0"),
    ("grids.0.vxx_reg", [-1e-9], "grids[0].vxx_reg[0]", "greater than or equal to 0"),
    ("grids.0.vxx_reg", [float("nan")], "grids[0].vxx_reg[0]", "finite"),
    ("grids.0.learning_rate", [float("inf")], "grids[0].learning_rate[0]", "finite"),
    ("grids.0.learning_rate", ["0.1"], "grids[0].learning_rate[0]", "number"),
    ("grids.0.learning_rate", [True], "grids[0].learning_rate[0]", "number"),
    ("grids.0.baseline", "adamw", "grids[0].baseline", "sgd"),
    ("grids", [], "grids", "at least 1"),
    ("dataset", "imagenet", "dataset", "one of digits, wine"),
    ("model.kind", "transformer", "model.kind", "fcn"),
    ("model.activation", "swish", "model.activation", "'tanh', 'relu', 'sigmoid' or 'identity'"),
    ("model.hidden", [10**9], "model.hidden[0]", "8192"),
    ("model.hidden", [0], "model.hidden[0]", "greater than or equal to 1"),
    ("model.hidden", [4] * 65, "model.hidden", "at most 64"),
    ("model.hidden", [8192] * 12, "model.hidden", "MiB"),
    ("training.steps", 0, "training.steps", "greater than or equal to 1"),
    ("training.steps", 1.5, "training.steps", "integer"),
    ("training.batch_size", 143, "training.batch_size", "at most 142, the training set of wine"),
    ("training.eval_every", 5, "training.eval_every", "from 1 to 4"),
    ("training", {"steps": 10**7, "batch_size": 8, "eval_every": 1}, "training.eval_every", "from 5000 to"),
    ("training.batch_size", 0, "training.batch_size", "greater than or equal to 1"),
    ("seeds", 0, "seeds", "greater than or equal to 1"),
    ("seeds", [], "seeds", "at least 1"),
    ("seeds", [3, 3], "seeds", "3 is there twice"),
    ("seeds", [-1], "seeds[0]", "greater than or equal to 0"),
    ("seeds", [2**64], "seeds[0]", "less than or equal to"),
    ("seeds", True, "seeds", "integer"),
    ("loss", "hinge", "loss", "cross_entropy"),
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
