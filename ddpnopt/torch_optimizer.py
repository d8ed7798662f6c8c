"""The optimizers as torch.optim.Optimizer over one nn.Sequential.

    optimizer = DDPNOpt(model, lr=0.1, vxx_reg=1e-3)
    for inputs, targets in loader:
        loss = optimizer.step(inputs, targets)

A step does its own forward and backward passes; the parameters' `grad` is neither read nor written. It is the
step of a pack of one run: R = 1 in every shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks

from ddpnopt.config import (
    PRECONDITIONER_OF,
    Baseline,
    BaselineOptions,
    Convention,
    Dynamics,
    FeedbackConfig,
    OptimizerConfig,
    PreconditionerName,
    Safeguard,
    SecondMoment,
    TerminalHessian,
)
from ddpnopt.config import Loss as LossName
from ddpnopt.errors import ConfigError
from ddpnopt.introspection import Inspection, inspect
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.modules import ControlBuffer, Slot, convert
from ddpnopt.layers.network import Trajectory, rollout
from ddpnopt.optimizers import Members, make
from ddpnopt.optimizers.base import Blame, blame
from ddpnopt.rates import Rates

DTYPES: Final = (torch.float32, torch.float64)
GROUP_KEYS: Final = ("lr", "vxx_reg", "weight_decay", "momentum")
BASELINE_OF: Final[Mapping[str, Baseline]] = {name: b for b, name in PRECONDITIONER_OF.items()}  # type: ignore[misc]


class LayerOptimizer(torch.optim.Optimizer):
    """What `DDPNOpt` and `BaselineOptimizer` share: one run of a pack, over the parameters of a model.

    Attributes:
        status: why the last step left the parameters as they were; None if it did not.
        update_norms: |Δu_t| of the last step, t = 0..T-1, if `track_updates` is set; else empty.
    """

    status: Blame | None
    update_norms: tuple[float, ...]

    def __init__(
        self,
        model: nn.Sequential,
        config: OptimizerConfig,
        loss: LossName,
        param_groups: Iterable[dict[str, Any]] | None,
        *,
        track_updates: bool,
    ) -> None:
        if loss not in LOSSES:
            raise ConfigError("loss", loss, "one of " + ", ".join(LOSSES))
        converted = convert(model)
        self.network, self.slots, self.names = converted.network, converted.slots, converted.names
        self.loss = LOSSES[loss]
        self.track_updates = track_updates
        self.status, self.update_norms = None, ()
        numbers = (
            config.learning_rate,
            config.vxx_reg or 0.0,
            config.options.weight_decay,
            config.options.momentum,
        )
        groups = [{"params": list(model.parameters())}] if param_groups is None else list(param_groups)
        self._complete = False
        super().__init__(groups, dict(zip(GROUP_KEYS, numbers, strict=True)))
        self._complete = True
        self._config = config
        self._held = list(_held(model))
        self._first = [slot.parameters[0] for slot in self.slots]
        self._check_groups()
        self._group_of = tuple(self._find_group(t, slot) for t, slot in enumerate(self.slots))
        self._rates: dict[tuple[object, ...], Rates] = {}
        self._rates_from: tuple[object, ...] = ()
        self._buffer = ControlBuffer(self.network, self.slots)
        self._inner = make(Members(config, self.network, self.loss, self._current_rates()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the layers of a model are known from the start.

        Raises:
            ConfigError: always, once the optimizer is made.
        """
        if self._complete:
            allowed = "the groups that the optimizer was made with (param_groups)"
            raise ConfigError("param_groups", "one more", allowed)
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse: a copy would go on training the model that it was made for.

        Raises:
            ConfigError: always.
        """
        allowed = "a new optimizer over the copied model, and load_state_dict"
        raise ConfigError("optimizer", "a copy", allowed)

    def _check_groups(self) -> None:
        """Refuse what is not the model's, and numbers that the optimizer could not have been made with."""
        own = {p for slot in self.slots for p in slot.parameters}
        config, known = self._config, {"params", "param_names", "initial_lr", *GROUP_KEYS}
        for group in self.param_groups:
            if not own.issuperset(group["params"]):
                raise ConfigError("param_groups", "a parameter", "parameters of the model")
            if unknown := set(group) - known:
                raise ConfigError("param_groups", sorted(unknown), ", ".join(GROUP_KEYS))
            momentum, decay = float(group["momentum"]), float(group["weight_decay"])
            replace(
                config,
                learning_rate=float(group["lr"]) or 1.0,  # zero holds a layer still
                vxx_reg=None if config.vxx_reg is None else float(group["vxx_reg"]),
                options=replace(config.options, momentum=momentum, weight_decay=decay),
            )
        if len(kinds := {(str(p.dtype), str(p.device)) for p in own}) != 1:
            raise ConfigError("dtype", sorted(kinds), "one type on one device for all layers")

    def _find_group(self, t: int, slot: Slot) -> int:
        """Return which parameter group holds a layer's parameters."""
        held = [
            {i for i, group in enumerate(self.param_groups) if any(p is q for q in group["params"])}
            for p in slot.parameters
        ]
        name = f"layer {self.names[t]}"
        if not all(len(groups) == 1 for groups in held) or len(set.union(*held)) != 1:
            raise ConfigError(
                "param_groups", name, "every layer with all its parameters in one group, and in one only"
            )
        if len({p.requires_grad for p in slot.parameters}) != 1:
            raise ConfigError("requires_grad", name, "the same for all parameters of a layer")
        if any(p.dtype not in DTYPES for p in slot.parameters):
            raise ConfigError("dtype", str(slot.parameters[0].dtype), "float32 or float64")
        return held[0].pop()

    def _current_rates(self) -> tuple[Rates, ...]:
        return tuple(self._rates_of(i, slot) for i, slot in zip(self._group_of, self.slots, strict=True))

    def _rates_of(self, group: int, slot: Slot) -> Rates:
        """Return a layer's numbers as tensors, made anew only when a scheduler has changed them."""
        numbers = [float(self.param_groups[group][key]) for key in GROUP_KEYS]
        p = slot.parameters[0]
        lr, vxx_reg, decay, momentum = numbers
        lr = lr if p.requires_grad else 0.0
        key = (lr, vxx_reg, decay, momentum, p.dtype, p.device)
        if key not in self._rates:
            if len(self._rates) > 64:
                self._rates.clear()

            def column(value: float) -> Tensor:
                return torch.full((1, 1, 1), value, dtype=torch.float64).to(p.device, p.dtype)

            self._rates[key] = Rates(
                column(lr),
                column(vxx_reg),
                column(decay) if decay else None,
                column(momentum) if momentum else None,
                regularised=vxx_reg != 0,
            )
        return self._rates[key]

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Update the parameters by one batch.

        A step that would leave the finite numbers is not taken: the parameters and the optimizer's state stay
        as they were, and `status` says which quantity of which layer was to blame.

        Args:
            inputs: (B, *shape of a sample).
            targets: (B,) int64 labels, or (B, outputs) values for `mse`.

        Returns:
            The mean loss over the batch before the update, a scalar.

        Raises:
            ConfigError: if inputs and targets do not belong together, or if parameters or modules of the
                model have been replaced.
        """
        for held, items in self._held:
            if len(held) != len(items) or any(held[name] is not value for name, value in items):
                allowed = "the modules and parameters that the optimizer was made with"
                raise ConfigError("model", "other modules or parameters", allowed)
        samples = inputs.shape[0]
        if samples != targets.shape[0] or samples == 0:
            allowed = "as many targets as inputs, and at least one"
            raise ConfigError("inputs", f"{samples} with {targets.shape[0]} targets", allowed)
        return self._announced(inputs, targets) if self._watched() else self._run(inputs, targets)

    # torch.optim wraps `step` in hooks and a record for the profiler, a tenth of a small net's step. Who is
    # there to see it still gets it, from `_announced`; to torch, `step` is a function wrapped already.
    step.hooked = True  # type: ignore[attr-defined]

    def _watched(self) -> bool:
        """Return whether a profiler runs or a hook on `step` is registered."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or hooks._global_optimizer_pre_hooks
            or hooks._global_optimizer_post_hooks
            or getattr(torch.autograd, "_profiler_enabled", bool)()
        )

    def _run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode():
            loss = self._step(inputs.unsqueeze(0), targets.unsqueeze(0))
        return loss.clone()

    _announced = torch.optim.Optimizer.profile_hook_step(_run)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        buffer, inner = self._buffer, self._inner
        buffer.read()
        self._take_rates()
        controls = buffer.controls
        trajectory = rollout(buffer.network, controls, inputs)
        if targets.is_floating_point() and targets.shape != trajectory.output.shape:
            allowed = f"shape {tuple(trajectory.output.shape[1:])}, that of the outputs"
            raise ConfigError("targets", tuple(targets.shape[1:]), allowed)
        losses, gradient = self.loss.value_and_gradient(trajectory.output, targets)
        loss = losses.mean()
        self.status = None
        if not math.isfinite(loss.item()):
            self._leave(_of_forward_pass(inputs, trajectory, loss.item()))
            return loss
        before = inner.state()
        old = [u.clone() for u in controls] if self.track_updates else []
        trajectory.loss_gradient = gradient
        try:
            trace = inner.step(controls, trajectory, targets)
        except Exception:
            inner.load_state(before)
            raise
        if not buffer.finite():
            self._leave(blame(trace, 0, 1) or Blame("weights", None, float("nan")))
            inner.load_state(before)
            return loss
        buffer.write()
        if self.track_updates:
            pairs = zip(controls, old, strict=True)
            self.update_norms = tuple(float(torch.linalg.vector_norm(u - v)) for u, v in pairs)
        return loss

    def _leave(self, status: Blame) -> None:
        """Note why the parameters stay as they were."""
        self.status = status
        self.update_norms = (0.0,) * len(self.slots) if self.track_updates else ()

    def _take_rates(self) -> None:
        """Hand the numbers of the parameter groups on, if a scheduler or the user has changed them."""
        now = (
            [float(group[key]) for group in self.param_groups for key in GROUP_KEYS],
            [(p.requires_grad, p.dtype, p.device) for p in self._first],
        )
        members, network = self._inner.members, self._buffer.network
        if now != self._rates_from or members.network is not network:
            if self._rates_from and now[1] != self._rates_from[1]:  # the model has moved, or changed its type
                self._inner.load_state(_copied(self._inner.state(), self._first[0]))
            self._rates_from = now
            self._inner.members = replace(members, network=network, rates=self._current_rates())

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups and what the optimizer remembers, for `load_state_dict`."""
        return super().state_dict() | {"layers": _copied(self._inner.state()), "of": self._kind()}

    def _kind(self) -> dict[str, Any]:
        """Return what an optimizer must share with the one whose state it takes."""
        return {"baseline": self._config.baseline, "shapes": [list(slot.shape()) for slot in self.slots]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, on the device and in the type of the parameters.

        Raises:
            ConfigError: if it comes from another kind of optimizer.
        """
        if "layers" not in state_dict or state_dict.get("of") != self._kind():
            allowed = f"what state_dict returned for {self._kind()}"
            raise ConfigError("state_dict", state_dict.get("of", sorted(state_dict)), allowed)
        if state_dict["layers"].keys() != self._inner.state().keys():
            raise ConfigError("state_dict", sorted(state_dict["layers"]), ", ".join(self._inner.state()))
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("layers", "of")})
        like = self.slots[0].parameters[0]
        self._inner.load_state(_copied(state_dict["layers"], like))


class DDPNOpt(LayerOptimizer):
    """The DDP neural optimizer (Liu, Chen, Theodorou, ICLR 2021).

    Args:
        model: an nn.Sequential of the modules that `ddpnopt.layers.modules.supported` lists.
        loss: φ: `cross_entropy`, `mse` (½|x - y|²) or `mmc` (Max-Mahalanobis center).
        lr: η.
        preconditioner: M, and with it the baseline that feedback=False equals.
        vxx_reg: ε, added to V_xx (Alg. 3, line 12).
        convention, curvature_scale, terminal_hessian, factorized, dynamics, safeguard, feedback: see
            `ddpnopt.config.FeedbackConfig`.
        momentum, weight_decay, rho, betas, eps, second_moment, damping, factor_decay, inverse_every: see
            `ddpnopt.config.BaselineOptions`; what the preconditioner has no use for is refused.
        param_groups: groups of parameters with their own lr, vxx_reg, weight_decay or momentum, as
            torch.optim takes them; a layer's parameters belong in one group.
        track_updates: keep `update_norms`.

    Raises:
        ConfigError: for a value or a combination that is not allowed, or a model that cannot be read.
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss: LossName = "cross_entropy",
        *,
        lr: float,
        preconditioner: PreconditionerName = "identity",
        vxx_reg: float = 0.0,
        convention: Convention = "batch_mean",
        curvature_scale: float = 1.0,
        terminal_hessian: TerminalHessian | None = None,
        factorized: bool | None = None,
        dynamics: Dynamics = "first_order",
        safeguard: Safeguard = "clamp",
        feedback: bool = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rho: float = 0.99,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: SecondMoment = "batch",
        damping: float = 0.01,
        factor_decay: float = 0.0,
        inverse_every: int = 1,
        param_groups: Iterable[dict[str, Any]] | None = None,
        track_updates: bool = False,
    ) -> None:
        if preconditioner not in BASELINE_OF:
            raise ConfigError("preconditioner", preconditioner, "one of " + ", ".join(BASELINE_OF))
        options = BaselineOptions(
            momentum=momentum,
            weight_decay=weight_decay,
            rho=rho,
            betas=tuple(betas),  # type: ignore[arg-type]
            eps=eps,
            second_moment=second_moment,
            damping=damping,
            factor_decay=factor_decay,
            inverse_every=inverse_every,
        )
        choices = FeedbackConfig(
            terminal_hessian, factorized, convention, curvature_scale, safeguard, feedback, dynamics
        )
        config = OptimizerConfig(
            BASELINE_OF[preconditioner], "ddpnopt", float(lr), float(vxx_reg), choices, options
        )
        super().__init__(model, config, loss, param_groups, track_updates=track_updates)

    def inspect(self, inputs: Tensor, targets: Tensor) -> Inspection:
        """Return what the optimizer sees on a batch, and change nothing: see `ddpnopt.introspection`."""
        return inspect(self, inputs, targets)


class BaselineOptimizer(LayerOptimizer):
    """A baseline of the paper under the same interface: `optimizer.step(inputs, targets)`.

    Args:
        model: as of `DDPNOpt`.
        name: `sgd`, `rmsprop`, `adam`, `kfac`, `ekfac`, `sgd_vgr`, `emsa` or `vanilla_ddp`.
        loss: as of `DDPNOpt`.
        lr: η.
        options: the baseline's own numbers.
        param_groups, track_updates: as of `DDPNOpt`.

    Raises:
        ConfigError: for a value that is not allowed, or a model that cannot be read.
    """

    def __init__(
        self,
        model: nn.Sequential,
        name: Baseline,
        loss: LossName = "cross_entropy",
        *,
        lr: float,
        options: BaselineOptions = BaselineOptions(),  # noqa: B008 - frozen
        param_groups: Iterable[dict[str, Any]] | None = None,
        track_updates: bool = False,
    ) -> None:
        config = OptimizerConfig(name, "baseline", float(lr), options=options)
        super().__init__(model, config, loss, param_groups, track_updates=track_updates)


Held = tuple[Mapping[str, object], list[tuple[str, object]]]


def _held(module: nn.Module) -> Iterator[Held]:
    """List the modules and parameters in a model: each table, and what is in it now."""
    for table in (module._modules, module._parameters):
        if table:  # most are empty, and they are compared at every step
            yield table, list(table.items())
    for child in module._modules.values():
        if child is not None:
            yield from _held(child)


def _of_forward_pass(inputs: Tensor, trajectory: Trajectory, loss: float) -> Blame:
    """Find where the forward pass left the finite numbers."""
    states: Sequence[tuple[int | Literal["batch"], Tensor]] = [
        ("batch", inputs),
        *enumerate(trajectory.inputs[1:], start=1),
        (len(trajectory.inputs), trajectory.output),
    ]
    for place, x in states:
        bad = x[~torch.isfinite(x)]
        if len(bad):
            if place == "batch":
                return Blame("inputs of the batch", None, float(bad[0]))
            return Blame(f"activation after layer {place - 1}", place - 1, float(bad[0]))
    return Blame("batch_loss", None, loss)


def _copied(state: Any, like: Tensor | None = None) -> Any:
    """Copy nested state; floating-point tensors go to the device and type of `like`."""
    if isinstance(state, dict):
        return {key: _copied(value, like) for key, value in state.items()}
    if not isinstance(state, Tensor):
        return state
    return state.clone() if like is None else state.detach().to(like, copy=True)
