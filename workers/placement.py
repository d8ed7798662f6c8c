"""Which nodes make up a pool, and how Ray is told to use these alone. Knows Ray's words, not Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from workers.protocol import DeviceKind, Node, Pool

DEVICE_LABEL: Final = "ddpsweep.io/device"
"""Of a node: names the model of its devices."""
TEAM_LABEL: Final = "ddpsweep.io/team"
"""Of a node: the only team that may use it."""
ACCELERATOR_LABEL: Final = "ray.io/accelerator-type"
"""Set by Ray on nodes whose GPUs it knows; for those without a `DEVICE_LABEL`."""
NODE_LABEL: Final = "ray.io/node-id"
"""Set by Ray on every node."""

FEEDING_CPUS: Final = 0.01
"""Of the CPUs of a GPU's node, taken by each pack there: CPUs are not what limits such a node."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a node must be like.

    Attributes:
        labels: that it must have, with these values.
        unlabelled: labels that it must not have at all.
        not_on: ids of nodes that it must not be.
    """

    labels: dict[str, str]
    unlabelled: tuple[str, ...] = ()
    not_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that are there now.

    Attributes:
        nodes: them.
        labels: of each, by its id.
    """

    nodes: tuple[Node, ...]
    labels: Mapping[str, Mapping[str, str]]

    def devices(self, pool: Pool | None) -> float:
        """Count a pool's devices; those of all nodes for None."""
        return sum(node.devices for node in self.nodes if pool is None or node.pool == pool)

    def name(self, node_id: str) -> str:
        """Return a node's name; the beginning of its id if it is not known (yet)."""
        return next((node.name for node in self.nodes if node.id == node_id), node_id[:12])

    def requirement(self, pool: Pool) -> Requirement:
        """Return what the nodes of a pool have in common, and no node of another pool has."""
        labels, unlabelled = self._of_model(pool)
        if pool.team is None:
            unlabelled.append(TEAM_LABEL)
        else:
            labels[TEAM_LABEL] = pool.team
        # A node with GPUs has CPUs too; no label of Ray's tells that these are not on offer.
        others = [node.id for node in self.nodes if pool.kind == "cpu" and node.pool.kind == "gpu"]
        return Requirement(labels, tuple(unlabelled), tuple(others))

    def _of_model(self, pool: Pool) -> tuple[dict[str, str], list[str]]:
        own = [self.labels[node.id] for node in self.nodes if node.pool == pool]
        if any(DEVICE_LABEL in labels for labels in own):
            return {DEVICE_LABEL: pool.model}, []
        if any(ACCELERATOR_LABEL in labels for labels in own) and pool.kind == "gpu":
            return {ACCELERATOR_LABEL: pool.model}, [DEVICE_LABEL]
        if pool.model != pool.kind:  # none is there now: whoever starts one labels it
            return {DEVICE_LABEL: pool.model}, []
        return {}, [DEVICE_LABEL, ACCELERATOR_LABEL] if pool.kind == "gpu" else [DEVICE_LABEL]


def cluster_of(described: Sequence[Mapping[str, Any]]) -> Cluster:
    """Return what `ray.nodes()` describes, without the nodes that are dead."""
    alive = [node for node in described if node["Alive"]]
    names = Counter(node["NodeName"] for node in alive)
    nodes = [
        Node(
            id=node["NodeID"],
            name=_name(node, alone=names[node["NodeName"]] == 1),
            pool=pool_of(node["Labels"], node["Resources"]),
            devices=node["Resources"].get("GPU", 0.0) or node["Resources"].get("CPU", 0.0),
        )
        for node in alive
    ]
    nodes.sort(key=lambda node: (node.name, node.id))
    return Cluster(tuple(nodes), {node["NodeID"]: node["Labels"] for node in alive})


def _name(node: Mapping[str, Any], *, alone: bool) -> str:
    """Return a node's address, or the name that it was given; with its port where several share it."""
    name: str = node["NodeName"]
    return name if alone else f"{name}:{node['NodeManagerPort']}"


def pool_of(labels: Mapping[str, str], resources: Mapping[str, float]) -> Pool:
    """Return the pool of a node with these labels and resources."""
    kind: DeviceKind = "gpu" if resources.get("GPU", 0) > 0 else "cpu"
    known = labels.get(ACCELERATOR_LABEL) if kind == "gpu" else None
    return Pool(kind, labels.get(DEVICE_LABEL) or known or kind, labels.get(TEAM_LABEL) or None)
