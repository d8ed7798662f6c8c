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


def seconds(
    asked: Sequence[Probe], method: Method, training: TrainingConfig, layers: Sequence[LayerShape]
) -> float:
    """Estimate the seconds that a run's probes take on one core; update norms come with the updates."""
    if method == "baseline":
        return 0.0
    found = 0.0
    if "policy_spectrum" in asked:
        found += SPECTRUM_S * sum(1 for _ in probes.points("policy_spectrum", training))
    if "policy_image" in asked:
        found += IMAGE_S * (len(layers) - 1) * layers[-1].outputs
    return found
