"""Nodes as Ray describes them, the pools that they make, and what tells a pool's nodes from all others."""

from __future__ import annotations

from typing import Any

import pytest

from workers.placement import (
    ACCELERATOR_LABEL,
    DEVICE_LABEL,
    TEAM_LABEL,
    Requirement,
    cluster_of,
    pool_of,
)
from workers.protocol import Node, Pool


def node(node_id: str, labels: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """A node as in `ray.nodes()`."""
    return {
        "NodeID": node_id,
        "Alive": True,
        "NodeName": f"10.0.0.{node_id}",
        "NodeManagerPort": 7000 + int(node_id),
        "Resources": {"CPU": 4.0, "memory": 1e9},
        "Labels": {"ray.io/node-id": node_id} | (labels or {}),
    } | changes


GPU = {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("labels", "resources", "pool"),
    [
        ({}, {"CPU": 4.0}, Pool("cpu", "cpu")),
        ({}, {}, Pool("cpu", "cpu")),
        ({}, GPU, Pool("gpu", "gpu")),
        ({DEVICE_LABEL: "epyc"}, {"CPU": 4.0}, Pool("cpu", "epyc")),
        ({ACCELERATOR_LABEL: "A100"}, GPU, Pool("gpu", "A100")),
        ({ACCELERATOR_LABEL: "A100", DEVICE_LABEL: "A100-80"}, GPU, Pool("gpu", "A100-80")),
        ({ACCELERATOR_LABEL: "A100"}, {"CPU": 4.0, "GPU": 0.0}, Pool("cpu", "cpu")),
        ({TEAM_LABEL: "red"}, {"CPU": 4.0}, Pool("cpu", "cpu", "red")),
        ({TEAM_LABEL: "", DEVICE_LABEL: ""}, {"CPU": 4.0}, Pool("cpu", "cpu")),
    ],
)
def test_a_nodes_pool(labels, resources, pool):
    assert pool_of(labels, resources) == pool


def test_nodes_that_are_alive():
    found = cluster_of(
        [
            node("2", Resources=GPU),
            node("1"),
            node("3", Alive=False),
            node("4", Resources={"memory": 1e9}),
        ]
    )
    assert found.nodes == (
        Node("1", "10.0.0.1", Pool(), 4.0),
        Node("2", "10.0.0.2", Pool("gpu", "gpu"), 2.0),
        Node("4", "10.0.0.4", Pool(), 0.0),
    )
    assert found.devices(None) == 6
    assert found.devices(Pool()) == 4
    assert found.devices(Pool("gpu", "B200")) == 0
    assert found.name("2") == "10.0.0.2"
    assert found.name("f" * 56) == "f" * 12


def test_nodes_of_one_address_are_told_apart():
    found = cluster_of([node("1", NodeName="a"), node("2", NodeName="a"), node("3", NodeName="b")])
    assert [one.name for one in found.nodes] == ["a:7001", "a:7002", "b"]


NODES = [
    node("1"),
    node("2", {TEAM_LABEL: "red"}),
    node("3", {DEVICE_LABEL: "epyc"}),
    node("4", {ACCELERATOR_LABEL: "A100"}, Resources=GPU),
    node("5", {DEVICE_LABEL: "H100", TEAM_LABEL: "red"}, Resources=GPU),
    node("6", Resources=GPU),
]


@pytest.mark.parametrize(
    ("pool", "requirement"),
    [
        (Pool(), Requirement({}, (DEVICE_LABEL, TEAM_LABEL), ("4", "5", "6"))),
        (Pool(team="red"), Requirement({TEAM_LABEL: "red"}, (DEVICE_LABEL,), ("4", "5", "6"))),
        (Pool("cpu", "epyc"), Requirement({DEVICE_LABEL: "epyc"}, (TEAM_LABEL,), ("4", "5", "6"))),
        (Pool("gpu", "A100"), Requirement({ACCELERATOR_LABEL: "A100"}, (DEVICE_LABEL, TEAM_LABEL))),
        (Pool("gpu", "H100", "red"), Requirement({DEVICE_LABEL: "H100", TEAM_LABEL: "red"})),
        (Pool("gpu", "gpu"), Requirement({}, (DEVICE_LABEL, ACCELERATOR_LABEL, TEAM_LABEL))),
        (Pool("gpu", "B200"), Requirement({DEVICE_LABEL: "B200"}, (TEAM_LABEL,))),
    ],
    ids=str,
)
def test_what_a_pools_nodes_have_in_common(pool, requirement):
    assert cluster_of(NODES).requirement(pool) == requirement


@pytest.mark.parametrize(
    "pool", sorted({pool_of(one["Labels"], one["Resources"]) for one in NODES}, key=Pool.key), ids=str
)
def test_a_requirement_is_met_by_the_nodes_of_its_pool_and_by_no_other(pool):
    found = cluster_of(NODES)
    needed = found.requirement(pool)
    meeting = {
        one.id
        for one in found.nodes
        if needed.labels.items() <= found.labels[one.id].items()
        and not set(needed.unlabelled) & set(found.labels[one.id])
        and one.id not in needed.not_on
        and (pool.kind == "cpu" or one.pool.kind == "gpu")  # by the GPU that a worker asks for
    }
    assert meeting == {one.id for one in found.nodes if one.pool == pool}


def test_a_label_that_says_what_goes_without_saying():
    found = cluster_of([node("1", {DEVICE_LABEL: "cpu"})])
    assert found.requirement(Pool()).labels == {DEVICE_LABEL: "cpu"}
