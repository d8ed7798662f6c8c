"""From a preconditioned direction to the new controls, for every optimizer that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ddpnopt.config import PreconditionerName
from ddpnopt.optimizers.base import Members
from ddpnopt.preconditioners import PRECONDITIONERS, Preconditioner
from ddpnopt.preconditioners.memory import Memory
from ddpnopt.rates import Rates


class Descent:
    """u ← u - η v with v ← μ v + M⁻¹ d; without momentum v is M⁻¹ d."""

    def __init__(self, preconditioner: Preconditioner) -> None:
        self.preconditioner = preconditioner
        self.memory = Memory()

    def update(self, t: int, u: Tensor, direction: Tensor, rates: Rates) -> None:
        """Update u_t (R, o, ī) in place by d_t (R, o, ī)."""
        step = self.preconditioner.precondition(t, direction)
        if rates.momentum is not None:
            entries = self.memory.layer(t)
            # The first velocity is the step itself, as in torch.optim.
            step = step if "v" not in entries else rates.momentum * entries["v"] + step
            entries["v"], entries["runs"] = step, len(u)
        u.addcmul_(step, rates.learning_rate, value=-1)

    def state(self) -> dict[str, Any]:
        """See `Optimizer.state`."""
        return {"preconditioner": self.preconditioner.state(), "momentum": self.memory.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Optimizer.load_state`."""
        self.preconditioner.load_state(state["preconditioner"])
        self.memory.load_state(state["momentum"])

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.preconditioner.select(keep)
        self.memory.select(keep)


class DescentOptimizer:
    """What every optimizer that goes down by `Descent` shares: members, state, and the selection of both."""

    def __init__(self, members: Members, preconditioner: PreconditionerName) -> None:
        self.members = members
        self.descent = Descent(PRECONDITIONERS[preconditioner](members.config.options))

    def state(self) -> dict[str, Any]:
        """See `Optimizer.state`."""
        return self.descent.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Optimizer.load_state`."""
        self.descent.load_state(state)

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.members = self.members.select(keep)
        self.descent.select(keep)


def inverses(preconditioner: Preconditioner, layers: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return the tensors of each M_t⁻¹, for finding what is not finite."""
    return [
        (t, part)
        for t in layers
        for inverse in (preconditioner.inverse(t),)
        for part in (inverse.inputs, inverse.outputs, inverse.scale)
        if part is not None
    ]
