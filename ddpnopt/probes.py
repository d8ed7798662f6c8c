"""What a run can be asked to record besides its metrics, and the shape of it. Importable without torch.

    update_norm      |Δu_t| of each layer, averaged over the updates since the last point (Fig. 6b): (T,)
    policy_spectrum  eigenvalues of E_b[K_bᵀK_b] of the prediction layer's feedback gain, descending (Fig. 8),
                     on the first `SPECTRUM_SAMPLES` samples of the training set: (n_{T-1},)
    policy_image     what each layer's policy answers most strongly, projected back to image space (Alg. 4,
                     Fig. 5), for one sample of the test set of each class, which itself stands in the place
                     of t = 0, where there is no feedback: (T, classes, *shape of a sample)
    cost             what an update costs when the run trains alone, by tensors, on one thread (Fig. 3,
                     Table 4): median seconds, and the most bytes that torch allocates from the making of the
                     net to its third update; taken on a net of its own after the last step: (2,)

Policies are DDPNOpt's alone: a baseline has none and records nothing of them. A run with probes trains as
tensors, not in lanes, and is another run than one without: its bits may differ. A cost is the machine's as
much as the run's: of all that is recorded it alone is not the same each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from ddpnopt.config import LayerShape, Probe, TrainingConfig

SPECTRUM_SAMPLES: Final = 64
IMAGE_RANK: Final = 2
"""Which sample of a class is shown, from 0: the first ones of MNIST's test set are not its most legible."""

COST: Final = ("seconds", "bytes")
"""What the cost's two numbers are."""

AT_THE_END: Final[frozenset[Probe]] = frozenset({"policy_image", "cost"})
OF_POLICIES: Final[frozenset[Probe]] = frozenset({"policy_spectrum", "policy_image"})


def shape(probe: Probe, layers: Sequence[LayerShape], sample: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what is recorded at a point.

    Args:
        probe: what is recorded.
        layers: of the net, t = 0..T-1.
        sample: the shape of a sample.
    """
    if probe == "update_norm":
        return (len(layers),)
    if probe == "policy_spectrum":
        return (layers[-1].state,)
    if probe == "cost":
        return (len(COST),)
    return (len(layers), layers[-1].outputs, *sample)


def points(probe: Probe, training: TrainingConfig) -> Iterator[int]:
    """Yield the steps at which a probe is recorded: points of the curves, some at the last one alone."""
    yield from (step for step in training.points() if is_point(probe, training, step))


def is_point(probe: Probe, training: TrainingConfig, step: int) -> bool:
    """Tell whether a probe is recorded at a point of the curves."""
    return step == training.steps if probe in AT_THE_END else step > 0 or probe in OF_POLICIES


def numbers(
    probes: Sequence[Probe], training: TrainingConfig, layers: Sequence[LayerShape], sample: Sequence[int]
) -> int:
    """Count the numbers that a run records."""
    return sum(math.prod(shape(p, layers, sample)) * sum(1 for _ in points(p, training)) for p in probes)
