"""Time that probes take, roughly: they are small beside the training of all but the shortest runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ddpnopt import probes
from ddpnopt.config import LayerShape, Method, Probe, TrainingConfig

SPECTRUM_S: Final = 0.01
"""Of one point: 4 to 13 ms on the paper's fully connected nets."""
IMAGE_S: Final = 0.004
"""Of one image of one layer: 2 to 6 ms there."""


COST_UPDATES: Final = 53
COST_S: Final = 3.0
"""A cost is taken of so many updates, of fewer if these take longer."""


def seconds(
    asked: Sequence[Probe],
    method: Method,
    training: TrainingConfig,
    layers: Sequence[LayerShape],
    update: float,
) -> float:
    """Estimate the seconds that a run's probes take on one core; update norms come with the updates.

    Args:
        asked: the probes.
        method: the run's.
        training: when they are taken.
        layers: of the net.
        update: seconds of one in a pack, which is less than of a run alone.
    """
    found = min(COST_S, COST_UPDATES * update) if "cost" in asked else 0.0
    if method == "baseline":
        return found
    if "policy_spectrum" in asked:
        found += SPECTRUM_S * sum(1 for _ in probes.points("policy_spectrum", training))
    if "policy_image" in asked:
        found += IMAGE_S * (len(layers) - 1) * layers[-1].outputs
    return found
