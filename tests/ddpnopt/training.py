"""Small models and batches, for the tests of the public classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.torch_optimizer import LayerOptimizer

Batch = tuple[Tensor, Tensor]

CLASSES: Final = 3
FEATURES: Final = 5
IMAGE: Final = (2, 6, 6)

PRECONDITIONERS: Final[dict[str, dict[str, Any]]] = {
    "identity": {"lr": 0.3},
    "rmsprop": {"lr": 0.01, "rho": 0.9, "eps": 1e-6},
    "adam": {"lr": 0.01, "betas": (0.8, 0.95)},
    "kfac": {"lr": 0.05, "damping": 0.1, "factor_decay": 0.5, "inverse_every": 2},
    "ekfac": {"lr": 0.05, "damping": 0.1, "factor_decay": 0.5, "inverse_every": 2},
}
"""Numbers under which each trains, and has something to remember."""

FORMS: Final[dict[str, dict[str, Any]]] = {
    "full": {"terminal_hessian": "exact"},
    "outer_product": {"terminal_hessian": "gauss_newton"},
    "second_order": {"terminal_hessian": "exact", "dynamics": "second_order"},
    "open_loop": {"feedback": False},
}


def fcn(
    dtype: torch.dtype = torch.float64, seed: int = 0, activation: type[nn.Module] = nn.Tanh
) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 6), activation(), nn.Linear(6, 4), activation(), nn.Linear(4, CLASSES)
    ).to(dtype)


def cnn(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(IMAGE[0], 4, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    ).to(dtype)


MODELS: Final = {"fcn": (fcn, (FEATURES,)), "cnn": (cnn, IMAGE)}


def batches(
    count: int, shape: tuple[int, ...] = (FEATURES,), size: int = 8, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Draw batches of clusters, one for each class, the same ones every time."""
    generator = torch.Generator().manual_seed(17)
    centres = torch.randn(CLASSES, *shape, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(count):
        targets = torch.randint(CLASSES, (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
        found.append(((centres[targets] + noise).to(dtype), targets))
    return found


def ddpnopt(model: nn.Sequential, preconditioner: str = "identity", **options: Any) -> DDPNOpt:
    """Make an optimizer with numbers under which it trains; `options` go before them."""
    return DDPNOpt(model, preconditioner=preconditioner, **PRECONDITIONERS[preconditioner] | options)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert bits(a) == bits(e), f"tensor {i}: {a}, expected {e}"


def bits(x: Tensor) -> tuple[Any, ...]:
    """What is equal only if every bit is, that of a NaN too."""
    return x.shape, x.dtype, x.numpy(force=True).tobytes()


def tensors(state: Any) -> Iterator[tuple[str, Any]]:
    """List what a nested state holds, by its place."""
    if isinstance(state, dict):
        for key, value in sorted(state.items(), key=str):
            yield from ((f"{key}.{place}", leaf) for place, leaf in tensors(value))
    else:
        yield "", state


class Snapshot:
    """The parameters and what the optimizer remembers, to be found again bit for bit."""

    def __init__(self, model: nn.Module, optimizer: LayerOptimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.weights = weights(model)
        self.state = copy.deepcopy(optimizer.state_dict())

    def assert_unchanged(self) -> None:
        assert_same_bits(weights(self.model), self.weights)
        now, before = dict(tensors(self.optimizer.state_dict())), dict(tensors(self.state))
        assert now.keys() == before.keys()
        for place, value in now.items():
            is_tensor = isinstance(value, Tensor)
            same = bits(value) == bits(before[place]) if is_tensor else value == before[place]
            assert same, place
