"""What packs are compared with: plain PyTorch loops, torch.func's ensembling, and the machine's matmul rate.

Each function returns a call without arguments that does a number of updates, for
`benchmarks.settings.interleaved` to time beside a pack. A side starts from the weights and sees the batches
of the pack's run of the same seed; it draws them before it is timed, which favours it. The caller sets the
number of threads.

Index legend: r run, b sample, i inputs, ī inputs and the constant one, o outputs, p position of a patch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from benchmarks.settings import interleaved
from ddpnopt.config import LayerShape, ModelConfig
from ddpnopt.datasets.load import load
from ddpnopt.models import ZOO, sequential
from ddpnopt.pack import rng

RATE: Final = 0.1
"""Learning rate of a side that is given none: what a step costs does not depend on it."""
RATE_FLOPS: Final = 2e9
"""Work of one timing of the matmul rate, so that small packs and large ones take about as long."""
KRONECKER: Final = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Net:
    """A model on a dataset."""

    dataset: str
    model: ModelConfig

    def layers(self) -> tuple[LayerShape, ...]:
        """Return the sizes of the layers with parameters."""
        data = load(self.dataset)
        return self.model.layers(data.shape, int(data.train_targets.max()) + 1)

    def widths(self) -> tuple[int, ...]:
        """Return n_0..n_T of a fully connected net."""
        layers = self.layers()
        return (layers[0].inputs, *(layer.outputs for layer in layers))


NETS: Final[Mapping[str, Net]] = MappingProxyType(
    {
        "64-16-16-16-16-10": Net("digits", ModelConfig((16,) * 4)),
        "64-10-10-10-10-10": Net("digits", ModelConfig((10,) * 4)),
        "MNIST CNN": Net("mnist", ZOO["mnist", "cnn"]),
    }
)
"""The paper's nets on DIGITS and on MNIST; the last takes its files from where `docs/datasets.md` says."""


def samples_of(net: Net, dtype: torch.dtype, *, test: bool = False) -> tuple[Tensor, Tensor]:
    """Return a net's training or test set: inputs (N, features), or images (N, c, h, w), and labels (N,)."""
    data = load(net.dataset)
    inputs, targets = (
        (data.test_inputs, data.test_targets) if test else (data.train_inputs, data.train_targets)
    )
    shape = data.shape if net.model.convolutional else (math.prod(data.shape),)
    return torch.from_numpy(inputs).to(dtype).reshape(-1, *shape), torch.from_numpy(targets)


def model_of(net: Net, seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Build a net with the weights that a run of that seed starts from."""
    data, layers = load(net.dataset), net.layers()
    shape = data.shape if net.model.convolutional else (math.prod(data.shape),)
    model = sequential(net.model, shape, layers[-1].outputs).to(dtype)
    modules = [module for module in model if isinstance(module, KRONECKER)]
    with torch.no_grad():
        for module, u in zip(modules, rng.initial_controls(seed, layers), strict=True):
            module.weight.copy_(torch.from_numpy(u[:, :-1]).reshape(module.weight.shape))
            module.bias.copy_(torch.from_numpy(u[:, -1]))
    return model


def batches_of(seed: int, samples: int, batch: int, updates: int) -> Tensor:
    """Return the rows of the training set that a run of that seed sees, (updates, B) int64."""
    epochs = math.ceil(updates / (samples // batch))
    drawn = [rng.epoch_batches(seed, epoch, samples, batch) for epoch in range(epochs)]
    return torch.from_numpy(np.concatenate(drawn)[:updates])


class _Kronecker(torch.optim.Optimizer):
    """Descent along M⁻¹ ∇J with a Kronecker-factored M of each Linear and Conv2d layer.

    Hooks save what enters a layer and the gradient at what leaves it; the factors are the current batch's,
    E[x̄ x̄ᵀ] and E[g gᵀ] with the samples' own gradients g, over patches for a convolution as in KFC (Grosse &
    Martens, 2016).

    Args:
        model: whose parameters all belong to Linear and Conv2d layers, with biases and without groups.
        lr: η.
        damping: γ.
        inverse_every: steps between two inversions.

    Raises:
        ValueError: for a model with other parameters.
    """

    def __init__(self, model: nn.Module, lr: float, damping: float = 0.01, inverse_every: int = 1) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, KRONECKER)]
        plain = all(layer.bias is not None and getattr(layer, "groups", 1) == 1 for layer in self.layers)
        if not plain or 2 * len(self.layers) != len(list(model.parameters())):
            raise ValueError(
                "parameters: expected Linear and Conv2d layers' alone, with biases, without groups"
            )
        super().__init__(model.parameters(), {"lr": lr, "damping": damping, "inverse_every": inverse_every})
        self.steps = 0
        self.inputs: dict[nn.Module, Tensor] = {}
        self.gradients: dict[nn.Module, Tensor] = {}
        self.inverses: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._save)

    def _save(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            self.inputs[layer] = args[0].detach()
            # A hook on the tensor: a module's full backward hook would wrap the layer in two more functions.
            output.register_hook(partial(self.gradients.__setitem__, layer))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters by the gradients of a mean over the batch that `backward` has left."""
        group = self.param_groups[0]
        for layer in self.layers:
            x, g = self._samples(layer)
            if self.steps % group["inverse_every"] == 0:
                self.inverses[layer] = self.inverse(*_factors(x, g), group["damping"])
            gradient = torch.cat((layer.weight.grad.flatten(1), layer.bias.grad.unsqueeze(1)), dim=1)
            step = self.precondition(layer, x, g, gradient, group["damping"])
            layer.weight.add_(step[:, :-1].reshape(layer.weight.shape), alpha=-group["lr"])
            layer.bias.add_(step[:, -1], alpha=-group["lr"])
        self.steps += 1

    def _samples(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x̄ (B, ī, P) and the gradients of each sample's loss, (B, o, P)."""
        x, g = self.inputs.pop(layer), self.gradients.pop(layer)
        g = g.flatten(2) if g.dim() > 2 else g.unsqueeze(2)
        if isinstance(layer, nn.Conv2d):
            x = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        else:
            x = x.unsqueeze(2)
        return functional.pad(x, (0, 0, 0, 1), value=1.0), g * len(g)

    def inverse(self, inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Take the factors (ī, ī) and (o, o) apart."""
        raise NotImplementedError

    def precondition(
        self, layer: nn.Module, x: Tensor, g: Tensor, gradient: Tensor, damping: float
    ) -> Tensor:
        """Return M⁻¹ of the gradient (o, ī)."""
        raise NotImplementedError


def _factors(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x̄ x̄ᵀ] (ī, ī), summed over the positions, and E[g gᵀ] (o, o), averaged over them."""
    flat_x, flat_g = (a.transpose(0, 1).flatten(1) for a in (x, g))
    return flat_x @ flat_x.T / len(x), flat_g @ flat_g.T / flat_g.shape[1]


class KFAC(_Kronecker):
    """M = (Ā + π√γ I) ⊗ (Ḡ + √γ/π I), π² the ratio of the mean eigenvalues (Martens & Grosse, 2015)."""

    def inverse(self, inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Return the inverses of the damped factors."""
        pi = (inputs.diagonal().mean() / outputs.diagonal().mean()).sqrt()
        root = damping**0.5
        return _inverse(inputs, pi * root), _inverse(outputs, root / pi)

    def precondition(
        self, layer: nn.Module, x: Tensor, g: Tensor, gradient: Tensor, damping: float
    ) -> Tensor:
        """See `_Kronecker.precondition`."""
        of_inputs, of_outputs = self.inverses[layer]
        return of_outputs @ gradient @ of_inputs


def _inverse(factor: Tensor, damping: Tensor) -> Tensor:
    damped = factor.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


class EKFAC(_Kronecker):
    """M = (U_o ⊗ U_i) diag(s + γ) (U_o ⊗ U_i)ᵀ, with the factors' eigenvectors and s = E[(U_oᵀ ∇φ U_i)²].

    George et al., 2018. The second moments s are the current batch's at every step.
    """

    def inverse(self, inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Return the eigenvectors."""
        return torch.linalg.eigh(inputs)[1], torch.linalg.eigh(outputs)[1]

    def precondition(
        self, layer: nn.Module, x: Tensor, g: Tensor, gradient: Tensor, damping: float
    ) -> Tensor:
        """See `_Kronecker.precondition`."""
        U_i, U_o = self.inverses[layer]
        M = _moments(x, g, U_i, U_o).add_(damping)
        return U_o @ ((U_o.T @ gradient @ U_i) / M) @ U_i.T


def _moments(x: Tensor, g: Tensor, U_i: Tensor, U_o: Tensor) -> Tensor:
    """Return the samples' mean of (U_oᵀ g x̄ᵀ U_i)², (o, ī)."""
    if x.shape[2] == 1:  # the square of an outer product is the outer product of squares
        rotated_x, rotated_g = x.squeeze(2) @ U_i, g.squeeze(2) @ U_o
        return rotated_g.square_().T @ rotated_x.square_() / len(x)
    # Rotating the samples' gradients takes less than rotating patches: positions outnumber channels.
    return (U_o.T @ (torch.bmm(g, x.mT) @ U_i)).square_().mean(dim=0)


OPTIMIZERS: Final[Mapping[str, Callable[..., torch.optim.Optimizer]]] = MappingProxyType(
    {
        "sgd": lambda model, **options: torch.optim.SGD(model.parameters(), **options),
        "rmsprop": lambda model, **options: torch.optim.RMSprop(model.parameters(), **options),
        "adam": lambda model, **options: torch.optim.Adam(model.parameters(), **options),
        "kfac": KFAC,
        "ekfac": EKFAC,
    }
)
"""The optimizers of a plain loop by name, each from a model and its options."""


@dataclass(frozen=True)
class PlainLoop:
    """An ordinary training loop of one net; a call does one update for each row of `batches`.

    Attributes:
        model: trained in place.
        optimizer: over the model's parameters.
        inputs: (N, *shape of a sample).
        targets: (N,) int64.
        batches: (updates, B) int64 indices.
    """

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    batches: Tensor

    def __call__(self) -> None:
        """Train."""
        model, optimizer, loss_of = self.model, self.optimizer, nn.CrossEntropyLoss()
        inputs, targets = self.inputs, self.targets
        for rows in self.batches:
            optimizer.zero_grad()
            loss_of(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()


def plain_loop(
    optimizer_name: str,
    net: Net,
    batch: int,
    updates: int,
    *,
    rate: float = RATE,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PlainLoop:
    """Return an ordinary training loop of one net.

    Args:
        optimizer_name: one of `OPTIMIZERS`.
        net: what to train.
        batch: B.
        updates: of a call.
        rate: the learning rate.
        seed: of the weights and the batches.
        dtype: of weights and inputs.
        options: of the optimizer, such as `damping` or torch's `fused`.
    """
    model = model_of(net, seed, dtype)
    inputs, targets = samples_of(net, dtype)
    optimizer = OPTIMIZERS[optimizer_name](model, lr=rate, **options)
    return PlainLoop(model, optimizer, inputs, targets, batches_of(seed, len(targets), batch, updates))


@dataclass(frozen=True)
class FunctionalEnsemble:
    """R nets under plain SGD; a call does one update of all for each row of `batches`.

    Attributes:
        parameters: by name, each (R, *shape), trained in place.
        rates: by name, the learning rates, (R, 1, …).
        gradients: takes the parameters, inputs (R, B, *shape) and targets (R, B).
        inputs: (N, *shape of a sample).
        targets: (N,) int64.
        batches: (updates, R, B) int64 indices.
    """

    parameters: dict[str, Tensor]
    rates: dict[str, Tensor]
    gradients: Callable[[dict[str, Tensor], Tensor, Tensor], dict[str, Tensor]]
    inputs: Tensor
    targets: Tensor
    batches: Tensor

    def __call__(self) -> None:
        """Train."""
        parameters, rates, inputs, targets = self.parameters, self.rates, self.inputs, self.targets
        for rows in self.batches:
            gradients = self.gradients(parameters, inputs[rows], targets[rows])
            for name, values in parameters.items():
                values.addcmul_(gradients[name], rates[name], value=-1)


def functional_ensemble(
    runs: int,
    net: Net,
    batch: int,
    updates: int,
    *,
    rates: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> FunctionalEnsemble:
    """Return R nets under plain SGD as torch.func's model ensembling, each with its own batches and rate.

    stack_module_state, functional_call and vmap(grad), as torch documents them. The parameters are detached,
    so that autograd records nothing beneath `grad`, and each is updated in place by one operation.

    Args:
        runs: R; run r has the weights and the batches of seed r.
        net: what to train.
        batch: B.
        updates: of a call.
        rates: R learning rates; None gives every run the same.
        dtype: of weights and inputs.
        compiled: by torch.compile, which takes its time at the first call and needs a C++ compiler.
    """
    models = [model_of(net, seed, dtype) for seed in range(runs)]
    parameters = {name: values.detach() for name, values in stack_module_state(models)[0].items()}
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss_of(own: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(skeleton, own, (inputs,)), targets)

    gradients = vmap(grad(loss_of))
    inputs, targets = samples_of(net, dtype)
    column = torch.tensor([RATE] * runs if rates is None else rates, dtype=dtype)
    batches = [batches_of(seed, len(targets), batch, updates) for seed in range(runs)]
    return FunctionalEnsemble(
        parameters,
        {name: column.reshape(-1, *(1,) * (values.dim() - 1)) for name, values in parameters.items()},
        torch.compile(gradients) if compiled else gradients,
        inputs,
        targets,
        torch.stack(batches, dim=1),
    )


class Product(NamedTuple):
    """The sizes of one run's part of a batched product, (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns


def flops(products: Sequence[Product]) -> int:
    """Return the floating-point operations of one run."""
    return sum(product.flops for product in products)


def sgd_products(widths: Sequence[int], batch: int) -> list[Product]:
    """List the products that one step of SGD needs, in their order.

    Forward h = x Wᵀ of t = 0..T-1; then from the last layer to the first the gradient J_hᵀ x, and for t ≥ 1
    the pull-back J_h W. Biases are sums, not products.

    Args:
        widths: n_0..n_T of a fully connected net.
        batch: B.
    """
    layers = list(enumerate(pairwise(widths)))
    products = [Product(batch, n, m) for _, (n, m) in layers]
    for t, (n, m) in reversed(layers):
        products.append(Product(m, batch, n))
        if t > 0:
            products.append(Product(batch, m, n))
    return products


def ddpnopt_products(widths: Sequence[int], batch: int) -> list[Product]:
    """List the products that one step of DDPNOpt needs, in their order: M = I, V_xx an outer product.

    Forward h = x Wᵀ of t = 0..T-1; from the last layer to t = 1 the pull-back through W of two rows for each
    sample, V_h and z_h; then, layer by layer, the feedback's W δx for t ≥ 1, the gradient, and for t < T-1
    the second forward pass through the new weights. Contraction, overlap and biases are sums, not products.
    At t = T-1 a Gauss-Newton terminal Hessian makes the two rows equal, and one would do; two are counted.

    Args:
        widths: n_0..n_T of a fully connected net.
        batch: B.
    """
    layers = list(enumerate(pairwise(widths)))
    products = [Product(batch, n, m) for _, (n, m) in layers]
    products += [Product(2 * batch, m, n) for t, (n, m) in reversed(layers) if t > 0]
    for t, (n, m) in layers:
        if t > 0:
            products.append(Product(batch, n, m))
        products.append(Product(m, batch, n))
        if t < len(layers) - 1:
            products.append(Product(batch, n, m))
    return products


def matmul_side(
    products: Sequence[Product], runs: int, updates: int, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Return a call that does nothing but the products of `updates` steps of R runs, by torch.bmm.

    Operands lie in one piece and results have their place, which is faster than the transposed views of a
    step: what comes out is a limit.
    """
    generator = torch.Generator().manual_seed(0)

    def operand(*shape: int) -> Tensor:
        return torch.randn(runs, *shape, dtype=dtype, generator=generator)

    operands = [
        (operand(p.rows, p.inner), operand(p.inner, p.columns), operand(p.rows, p.columns)) for p in products
    ]

    def multiply() -> None:
        for _ in range(updates):
            for left, right, out in operands:
                torch.bmm(left, right, out=out)

    return multiply


def batched_matmul_rate(
    products: Sequence[Product], runs: int, *, dtype: torch.dtype = torch.float32, repeats: int = 5
) -> float:
    """Measure the machine's rate of exactly these products for R runs at once.

    Args:
        products: of one step and run, as `sgd_products` and `ddpnopt_products` list them.
        runs: R.
        dtype: of the operands.
        repeats: timings, of which the median counts.

    Returns:
        FLOP/s: all operations over all the time, so that each size counts as it occurs.
    """
    work = flops(products) * runs
    updates = max(1, round(RATE_FLOPS / work))
    side = matmul_side(products, runs, updates, dtype)
    side()
    (seconds,) = interleaved([side], repeats)
    return work * updates / seconds
