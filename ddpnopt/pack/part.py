"""What a pack is made of: parts, each of which trains some of the runs its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpnopt.layers.network import Controls
from ddpnopt.pack.batches import Stretch
from ddpnopt.results import Divergence


@dataclass(frozen=True, slots=True)
class Samples:
    """A set of samples on the device.

    Attributes:
        inputs: (N, features).
        targets: (N,) int64.
    """

    inputs: Tensor
    targets: Tensor


class Part(Protocol):
    """Some runs of a pack in training: a member is one of them that has not left.

    Nothing that one member does may touch the numbers of another.
    """

    @property
    def index(self) -> NDArray[np.int64]:
        """Return each member's place in the sequence that the pack was made of, (R,)."""
        ...

    def advance(self, stretch: Stretch, train_set: Samples) -> Mapping[int, Divergence]:
        """Do the updates of a stretch; members that leave the finite numbers leave the part.

        Returns:
            Why each of those left, by its place.
        """
        ...

    def measure(self, samples: Samples) -> Tensor:
        """Return mean loss and accuracy in percent over a whole set, (R, 2) float64."""
        ...

    def take_running(self, updates: int) -> Tensor:
        """Return mean loss and accuracy of the last `updates` batches, and start anew, (R, 2) float64."""
        ...

    def select(self, keep: NDArray[np.bool_]) -> None:
        """Keep only these members (R,), whose numbers stay as they are."""
        ...

    def controls(self) -> Controls:
        """Return a copy of u_t, each (R, o_t, ī_t)."""
        ...

    def set_controls(self, controls: Sequence[Tensor]) -> None:
        """Put other u_t in the place of the members', each (R, o_t, ī_t)."""
        ...

    def state(self) -> dict[str, Any]:
        """Return all that the next update depends on, as tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` of a part with the same members returned."""
        ...
