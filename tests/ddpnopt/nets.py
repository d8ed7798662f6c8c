"""Random small nets, the same twice: as the library's layers and as the oracle's stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt.config import BaselineOptions, FeedbackConfig, OptimizerConfig
from ddpnopt.layers.losses import LOSSES, max_mahalanobis_centers
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import Controls, Network
from ddpnopt.optimizers import Members
from ddpnopt.rates import Rates
from tests.reference import oracle, preconditioners

RUNS = 2

MODULES: dict[str, tuple[Callable[[], nn.Module], oracle.Map]] = {
    "tanh": (nn.Tanh, torch.tanh),
    "relu": (nn.ReLU, oracle.relu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "gelu": (nn.GELU, oracle.gelu),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), oracle.leaky_relu(0.1)),
    "identity": (nn.Identity, oracle.identity),
}
SMOOTH = ("tanh", "sigmoid", "gelu", "identity")


@dataclass
class Net:
    """A net under construction: modules, and stages whose σ grows with each map."""

    modules: list[nn.Module] = field(default_factory=list)
    stages: list[list[Any]] = field(default_factory=list)

    def affine(self, module: nn.Module, make: Callable[..., oracle.Stage], *args: Any, **kwargs: Any) -> None:
        self.modules.append(module)
        self.stages.append([make, args, kwargs, []])

    def map(self, module: nn.Module, sigma: oracle.Map) -> None:
        self.modules.append(module)
        self.stages[-1][3].append(sigma)

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> None:
        self.affine(nn.Linear(inputs, outputs, bias=bias), oracle.linear, inputs, outputs, bias)

    def conv(self, inputs: int, outputs: int, kernel: int, **kwargs: Any) -> None:
        self.affine(
            nn.Conv2d(inputs, outputs, kernel, **kwargs), oracle.conv2d, inputs, outputs, kernel, **kwargs
        )

    def sequential(self) -> nn.Sequential:
        return nn.Sequential(*self.modules).double()

    def oracle(self) -> list[oracle.Stage]:
        return [
            make(*args, **kwargs, sigma=oracle.chain(*sigma)) for make, args, kwargs, sigma in self.stages
        ]


@dataclass
class Case:
    """Two runs of one net on batches of their own, with numbers of their own."""

    net: Net
    inputs: Tensor
    targets: Tensor
    controls: Controls
    loss: str
    learning_rate: tuple[float, ...]
    vxx_reg: tuple[float, ...]
    feedback: FeedbackConfig
    options: BaselineOptions

    @property
    def network(self) -> Network:
        return convert(self.net.sequential()).network

    def members(self, baseline: str, method: str = "ddpnopt") -> Members:
        partner = method == "ddpnopt"
        config = OptimizerConfig(
            baseline, method, 0.1, 0.0 if partner else None, self.feedback if partner else None, self.options
        )

        def column(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)

        network, decay = self.network, self.options.weight_decay
        rates = Rates(
            column(self.learning_rate),
            column(self.vxx_reg),
            column((decay,) * RUNS) if decay else None,
            column((self.options.momentum,) * RUNS) if self.options.momentum else None,
        )
        return Members(config, network, LOSSES[self.loss], (rates,) * len(network.stages))

    def oracle_loss(self) -> oracle.Loss:
        classes = self.net.oracle()[-1].u_shape[0]
        losses = {
            "cross_entropy": oracle.cross_entropy,
            "mse": oracle.mse,
            "mmc": oracle.mmc(max_mahalanobis_centers(classes)),
        }
        return losses[self.loss]

    def oracle_options(self, baseline: str, r: int) -> oracle.Options:
        resolved = self.feedback.resolved(
            convolutional=any(isinstance(m, nn.Conv2d) for m in self.net.modules)
        )
        return oracle.Options(
            learning_rate=self.learning_rate[r],
            vxx_reg=self.vxx_reg[r],
            terminal_hessian=resolved.terminal_hessian,
            factorized=resolved.factorized,
            dynamics=resolved.dynamics,
            convention=resolved.convention,
            safeguard=resolved.safeguard,
            curvature_scale=resolved.curvature_scale,
            weight_decay=self.options.weight_decay,
            momentum=self.options.momentum,
            feedback=resolved.feedback,
            preconditioner=dense_preconditioner(baseline, self.options),
        )


def dense_preconditioner(baseline: str, options: BaselineOptions) -> oracle.Preconditioner:
    kronecker = (options.damping, options.factor_decay, options.inverse_every)
    return {
        "sgd": preconditioners.Identity,
        "rmsprop": lambda: preconditioners.RMSprop(options.second_moment, options.rho, options.eps),
        "adam": lambda: preconditioners.Adam(options.second_moment, *options.betas, options.eps),
        "kfac": lambda: preconditioners.KFAC(*kronecker),
        "ekfac": lambda: preconditioners.EKFAC(*kronecker),
    }[baseline]()


@st.composite
def fully_connected(draw: st.DrawFn, activations: tuple[str, ...]) -> tuple[Net, tuple[int, ...]]:
    net = Net()
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    classes = draw(st.integers(2, 4))
    for t, (i, o) in enumerate(zip(widths, [*widths[1:], classes], strict=True)):
        net.linear(i, o, bias=draw(st.booleans()))
        names = draw(st.lists(st.sampled_from(activations), max_size=2 if t < len(widths) - 1 else 1))
        for name in names:
            module, sigma = MODULES[name]
            net.map(module(), sigma)
    return net, (widths[0],)


@st.composite
def convolutional(draw: st.DrawFn, activations: tuple[str, ...]) -> tuple[Net, tuple[int, ...]]:
    net = Net()
    channels, height, width = draw(st.integers(1, 2)), draw(st.integers(3, 4)), draw(st.integers(3, 4))
    shape = (channels, height, width)
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
        outputs = groups * draw(st.integers(1, 2))
        net.conv(
            channels,
            outputs,
            draw(st.integers(1, 3)),
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=draw(st.booleans()),
        )
        channels = outputs
        module, sigma = MODULES[draw(st.sampled_from(activations))]
        net.map(module(), sigma)
        pool = draw(st.sampled_from(["none", "max", "overlapping max", "average"]))
        if pool == "max":
            net.map(nn.MaxPool2d(2, 1), oracle.max_pool2d(2, 1))
        elif pool == "overlapping max":
            net.map(nn.MaxPool2d(3, 1, 1), oracle.max_pool2d(3, 1, 1))
        elif pool == "average":
            net.map(nn.AvgPool2d(2, 1, 1), oracle.avg_pool2d(2, 1, 1))
    net.map(nn.Flatten(), oracle.flatten)
    try:
        features = net.sequential()(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    except RuntimeError:
        features = 0  # the images got smaller than a kernel
    assume(0 < features <= 24)
    net.linear(features, draw(st.integers(2, 3)))
    return net, shape


@st.composite
def cases(draw: st.DrawFn, kind: str, baseline: str, feedback: dict[str, Any]) -> Case:
    second_order = feedback.get("dynamics") == "second_order"
    # Kinks are no harm, but E of second order is only told apart from zero where σ bends.
    activations = SMOOTH if second_order else tuple(MODULES)
    net, shape = draw((fully_connected if kind == "fcn" else convolutional)(activations))
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    slots = convert(net.sequential()).slots
    shapes = [slot.read().shape[1:] for slot in slots]
    classes = shapes[-1][0]

    def per_run(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        return draw(st.tuples(*[values] * RUNS))

    return Case(
        net=net,
        inputs=normal(RUNS, batch, *shape),
        targets=torch.randint(classes, (RUNS, batch), generator=generator),
        controls=[normal(RUNS, o, i) / max(i, 1) ** 0.5 for o, i in shapes],
        loss=draw(st.sampled_from(sorted(LOSSES))),
        learning_rate=per_run(st.floats(0.01, 0.5)),
        vxx_reg=per_run(st.just(0.0) | st.floats(1e-4, 0.5)),
        feedback=FeedbackConfig(
            **feedback,
            convention=draw(st.sampled_from(["batch_mean", "per_sample"])),
            safeguard=draw(st.sampled_from(["clamp", "psd"])),
            curvature_scale=draw(st.just(1.0) | st.floats(0, 2)),
        ),
        options=draw(numbers(baseline)),
    )


@st.composite
def numbers(draw: st.DrawFn, baseline: str) -> BaselineOptions:
    options: dict[str, Any] = {"weight_decay": draw(st.just(0.0) | st.floats(0.01, 0.3))}
    if baseline != "adam":
        options["momentum"] = draw(st.sampled_from([0.0, 0.5]))
    if baseline in ("rmsprop", "adam"):
        options["second_moment"] = draw(st.sampled_from(["batch", "per_sample"]))
        # A root near zero would ask for more digits than there are.
        options["eps"] = draw(st.floats(0.1, 1))
    if baseline in ("kfac", "ekfac"):
        options["damping"] = draw(st.floats(0.1, 1))
    if baseline == "kfac":
        options["factor_decay"] = draw(st.sampled_from([0.0, 0.6]))
        options["inverse_every"] = draw(st.integers(1, 2))
    return BaselineOptions(**options)
