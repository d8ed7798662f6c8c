"""What probes record, from the spec to the answer, on both databases."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from ddpnopt.config import Probe
from ddpnopt.pack.engine import train as train_pack
from ddpnopt.results import Finished
from service.app import create_app
from service.client import Client
from service.config import Settings
from service.errors import InvalidInputError
from service.results import records
from service.sweeps.documents import parse_spec
from service.sweeps.expand import expand, plan
from tests.conftest import SMALL_SPEC
from tests.service.helpers import submit
from tests.service.test_cli import URL, InProcess
from tests.service.test_reuse import train

PROBED: dict[str, Any] = copy.deepcopy(SMALL_SPEC) | {"probes": list(get_args(Probe))}


@pytest.fixture
def api(engine: Engine) -> Iterator[TestClient]:
    app = create_app(Settings(database_url=engine.url.render_as_string(hide_password=False)))
    with TestClient(app, base_url=URL) as client:
        yield client


def expected(probe: str) -> list[np.ndarray]:
    """What the engine records for the sweep's runs, in order, with nothing for those without."""
    spec = parse_spec(PROBED)
    planned = [run for pack in plan(spec).packs for run in pack]
    runs = [spec.run_config(r.grid, r.method, r.learning_rate, r.vxx_reg, r.seed) for r in planned]
    (end,) = [event for event in train_pack(runs) if isinstance(event, Finished)]
    found = [result.records.get(probe) for result in end.results]
    return [record.values for record in found if record is not None]


@pytest.mark.parametrize(
    ("probe", "steps", "runs"),
    [("update_norm", [2, 4], 18), ("policy_spectrum", [0, 2, 4], 12), ("policy_image", [4], 12)],
)
def test_what_was_recorded_comes_back(
    api: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, probe: str, steps: list[int], runs: int
) -> None:
    first = submit(engine, PROBED)
    train(engine)
    second = submit(engine, PROBED)  # takes all of it from the first
    train(engine)
    with Client(URL, InProcess(api)) as client:
        found = list(client.records(first, probe))
        again = list(client.records(second, probe))
        monkeypatch.setattr(records, "MOST_NUMBERS", 2 * found[0]["values"].size)  # two runs a page
        pages = list(client.records(first, probe, baseline="sgd", grid=0))
    wanted = expected(probe)
    assert len(found) == len(wanted) == runs
    for record, values in zip(found, wanted, strict=True):
        assert record["steps"] == steps
        np.testing.assert_array_equal(record["values"], values)
    for others in (again, pages):
        assert [record["seed"] for record in others] == [record["seed"] for record in found]
        for record, other in zip(found, others, strict=True):
            np.testing.assert_array_equal(record["values"], other["values"])
    assert {record["method"] for record in found} == {"ddpnopt"} | ({"baseline"} if runs == 18 else set())


def test_a_number_that_is_not_finite_is_null() -> None:
    points = np.array([1.0, np.nan, np.inf, -2.5], dtype="<f4").tobytes()
    assert records._read(points, 2, (0, 5, 10)) == ((0, 5), [[1.0, None], [None, -2.5]])


def test_what_was_not_asked_for_is_refused(api: TestClient, engine: Engine) -> None:
    sweep_id = submit(engine, SMALL_SPEC | {"probes": ["update_norm"]})
    for probe in ("policy_image", "train_loss"):
        answer = api.get(f"/api/v1/sweeps/{sweep_id}/records", params={"probe": probe})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["allowed"] == "one of the sweep's: update_norm"
    empty = api.get(f"/api/v1/sweeps/{sweep_id}/records", params={"probe": "update_norm"}).json()
    assert (empty["shape"], empty["records"], empty["next"]) == ([2], [], None)
    bare = submit(engine, SMALL_SPEC)
    answer = api.get(f"/api/v1/sweeps/{bare}/records", params={"probe": "update_norm"})
    assert "its spec asks for none of update_norm, policy_spectrum" in answer.json()["errors"][0]["allowed"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probes": ["norms"]}, "probes[0]"),
        ({"probes": ["update_norm", "update_norm"]}, "each value once"),
        (
            {
                "probes": ["policy_spectrum"],
                "model": {"kind": "fcn", "hidden": [1000]},
                "training": {"steps": 1000, "batch_size": 16, "eval_every": 1},
            },
            "1001000 numbers in a run",
        ),
    ],
)
def test_impossible_probes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        parse_spec(SMALL_SPEC | changes)
    assert said in str(refused.value)


def test_probes_take_time_in_the_estimate() -> None:
    plain, asked = (plan(parse_spec(document)) for document in (SMALL_SPEC, PROBED))
    assert asked.seconds > plain.seconds
    assert list(expand(parse_spec(PROBED))) == list(expand(parse_spec(SMALL_SPEC)))
