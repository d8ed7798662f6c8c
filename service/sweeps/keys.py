"""Keys of configurations: two runs have the same key if and only if they have the same configuration."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ddpnopt import config
from service.sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from service.sweeps.expand import PlannedRun

KEY_BYTES = 16


def keys_of(spec: SweepSpec) -> Callable[[PlannedRun], bytes]:
    """Return a function from a run of a sweep to its key.

    What a grid's runs share is written out and hashed once: a sweep may have a million of them.
    """
    shared = {
        (position, method): hashlib.sha256(_document(_common(spec, position, method)))
        for position, grid in enumerate(spec.grids)
        for method in grid.methods()
    }

    def key_of(run: PlannedRun) -> bytes:
        digest = shared[run.grid, run.method].copy()
        digest.update(struct.pack("<ddQ", run.learning_rate, run.vxx_reg or 0.0, run.seed))
        return digest.digest()[:KEY_BYTES]

    return key_of


def _common(spec: SweepSpec, position: int, method: config.Method) -> dict[str, Any]:
    """Return all of a run's configuration but its learning rate, ε and seed, defaults filled in."""
    vxx_reg = None if method == "baseline" else 0.0
    run = spec.run_config(position, method, 1.0, vxx_reg, 0)
    feedback = run.optimizer.feedback
    if feedback is not None:
        resolved = feedback.resolved(convolutional=run.model.convolutional)
        run = replace(run, optimizer=replace(run.optimizer, feedback=resolved))
    document = run.to_dict()
    for name in ("learning_rate", "vxx_reg"):
        del document["optimizer"][name]
    del document["seed"]
    return document


def _document(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
