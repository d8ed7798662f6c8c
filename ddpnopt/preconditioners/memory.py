"""What preconditioners remember of each layer between steps.

Tensors are replaced, never written into: a shallow copy of the state is a snapshot to go back to.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Memory:
    """Named tensors and counters of each layer. Subclasses read and write `self.layers[t]`."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}

    def layer(self, t: int) -> dict[str, Any]:
        """Return the entries of layer t, empty at first."""
        return self.layers.setdefault(t, {})

    def state(self) -> dict[str, Any]:
        """See `Preconditioner.state`."""
        return {str(t): dict(entries) for t, entries in self.layers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Preconditioner.load_state`."""
        self.layers = {int(t): dict(entries) for t, entries in state.items()}

    def select(self, keep: Tensor) -> None:
        """See `Preconditioner.select`. A convolution's groups follow their run."""
        for entries in self.layers.values():
            runs = entries.get("runs")
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    blocks = value.unflatten(0, (runs, -1))
                    entries[name] = blocks[keep].flatten(0, 1)
            entries["runs"] = len(keep)


def running_average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """Return α old + (1 - α) new; the first value counts in full."""
    return new if old is None or decay == 0 else decay * old + (1 - decay) * new
