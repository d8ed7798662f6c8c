"""What a run is: frozen values, checked when made, importable without torch.

Two runs with equal `RunConfig` give bit-identical results on the same kind of CPU, whatever pack,
worker or attempt they were trained in. Defaults are those of the paper, with the units that
`docs/units.md` explains.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

from ddpnopt.errors import ConfigError

Activation = Literal["tanh", "relu", "sigmoid", "identity"]
Baseline = Literal["sgd"]
Convention = Literal["batch_mean", "per_sample"]
DType = Literal["float32", "float64"]
Loss = Literal["cross_entropy"]
Method = Literal["baseline", "ddpnopt"]
Safeguard = Literal["clamp", "psd"]
TerminalHessian = Literal["exact", "gauss_newton"]

EVAL_CHUNK: Final = 512
"""Samples that metrics are taken on at once: fixed, since the order of a sum is part of its bits."""
MAX_WIDTH: Final = 8192
MAX_DEPTH: Final = 64
MAX_STEPS: Final = 10_000_000
MAX_SEED: Final = 2**63 - 1


def _one_of(field: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(field, value, "one of " + ", ".join(map(str, allowed)))


def _whole(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(field, value, f"a whole number from {low} to {high}")


def _finite(field: str, value: object, *, above_zero: bool) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (above_zero and value == 0):  # type: ignore[operator]
        raise ConfigError(field, value, "a finite number " + ("above 0" if above_zero else "of at least 0"))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A fully connected net: `len(hidden)` hidden layers and a linear read-out.

    Attributes:
        hidden: widths of the hidden layers; empty is a linear classifier.
        activation: after every layer but the last.
    """

    hidden: tuple[int, ...]
    activation: Activation = "tanh"
    kind: Literal["fcn"] = "fcn"

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, Literal["fcn"])
        _one_of("model.activation", self.activation, Activation)
        if not isinstance(self.hidden, tuple):
            raise ConfigError("model.hidden", self.hidden, "a tuple of widths")
        if len(self.hidden) > MAX_DEPTH:
            raise ConfigError("model.hidden", len(self.hidden), f"at most {MAX_DEPTH} layers")
        for i, width in enumerate(self.hidden):
            _whole(f"model.hidden[{i}]", width, 1, MAX_WIDTH)

    def widths(self, features: int, classes: int) -> tuple[int, ...]:
        """Return n_0..n_T: the input width, the hidden widths and the number of classes."""
        return (features, *self.hidden, classes)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How long, on what batches, and how often the metrics are taken.

    Attributes:
        steps: number of updates.
        batch_size: samples in a batch; batches are drawn without replacement within an epoch, and
            an incomplete last batch is dropped.
        eval_every: steps between two points of the curves; the last step is always a point.
    """

    steps: int
    batch_size: int
    eval_every: int

    def __post_init__(self) -> None:
        _whole("training.steps", self.steps, 1, MAX_STEPS)
        _whole("training.batch_size", self.batch_size, 1, 1_000_000)
        _whole("training.eval_every", self.eval_every, 1, MAX_STEPS)


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """The choices that the paper leaves open in DDPNOpt (defaults: the paper, in batch-mean units).

    Attributes:
        terminal_hessian: V_xx at T is the loss's exact Hessian or its Gauss-Newton outer product
            (Eq. 15); None picks the exact one for fully connected nets.
        factorized: V_xx as an outer product (Prop. 3); None picks it for a Gauss-Newton terminal
            Hessian and the full form otherwise. The outer product cannot hold an exact Hessian.
        convention: units of the value function: `batch_mean` are those of (1/B) Σ φ, `per_sample`
            those of φ. Gradients agree, the feedback's part of the update differs by a factor of B.
        curvature_scale: κ, factor on the terminal Hessian.
        safeguard: `clamp` is the paper's recursion; `psd` keeps V_xx positive semi-definite for any
            step size by keeping the Gauss-Newton term of Q_uu.
        feedback: False drops Q_ux, which leaves the baseline (Prop. 2).
    """

    terminal_hessian: TerminalHessian | None = None
    factorized: bool | None = None
    convention: Convention = "batch_mean"
    curvature_scale: float = 1.0
    safeguard: Safeguard = "clamp"
    feedback: bool = True

    def __post_init__(self) -> None:
        if self.terminal_hessian is not None:
            _one_of("ddpnopt.terminal_hessian", self.terminal_hessian, TerminalHessian)
        _one_of("ddpnopt.convention", self.convention, Convention)
        _one_of("ddpnopt.safeguard", self.safeguard, Safeguard)
        _finite("ddpnopt.curvature_scale", self.curvature_scale, above_zero=False)
        if self.factorized and self.terminal_hessian == "exact":
            raise ConfigError(
                "ddpnopt.factorized",
                True,
                "false with the exact terminal Hessian: an outer product has rank one "
                "(use terminal_hessian: gauss_newton)",
            )

    def resolved(self) -> FeedbackConfig:
        """Return the same choices with the defaults that hang on each other filled in."""
        hessian = self.terminal_hessian or ("gauss_newton" if self.factorized else "exact")
        factorized = hessian == "gauss_newton" if self.factorized is None else self.factorized
        return FeedbackConfig(
            hessian, factorized, self.convention, self.curvature_scale, self.safeguard, self.feedback
        )


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """One optimizer with its numbers.

    Attributes:
        baseline: the plain optimizer; its preconditioner is also that of the DDPNOpt partner.
        method: which of the two.
        learning_rate: η, above 0.
        vxx_reg: ε, added to V_xx at t = T-1..1 (Alg. 3, line 12); None for a baseline.
        feedback: the partner's options; None for a baseline.
    """

    baseline: Baseline
    method: Method
    learning_rate: float
    vxx_reg: float | None = None
    feedback: FeedbackConfig | None = None

    def __post_init__(self) -> None:
        _one_of("baseline", self.baseline, Baseline)
        _one_of("method", self.method, Method)
        _finite("learning_rate", self.learning_rate, above_zero=True)
        if self.method == "baseline":
            if self.vxx_reg is not None or self.feedback is not None:
                raise ConfigError("vxx_reg", self.vxx_reg, "nothing: a baseline has no value function")
            return
        if self.feedback is None:
            raise ConfigError("feedback", None, "the options of DDPNOpt")
        _finite("vxx_reg", self.vxx_reg, above_zero=False)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training. Two runs of a pair differ in `optimizer` alone."""

    dataset: str
    model: ModelConfig
    loss: Loss
    training: TrainingConfig
    optimizer: OptimizerConfig
    seed: int
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, Loss)
        _one_of("dtype", self.dtype, DType)
        _whole("seed", self.seed, 0, MAX_SEED)

    def pack_key(self) -> tuple[object, ...]:
        """Return what runs must share to be trained in one pack."""
        return (self.dataset, self.model, self.loss, self.training, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: if a value is not allowed.
            TypeError: if a key is unknown.
        """
        optimizer = dict(data["optimizer"])
        if optimizer.get("feedback") is not None:
            optimizer["feedback"] = FeedbackConfig(**optimizer["feedback"])
        model = dict(data["model"])
        model["hidden"] = tuple(model["hidden"])
        known = {f.name for f in fields(cls)} - {"model", "training", "optimizer"}
        rest = {k: v for k, v in data.items() if k not in {"model", "training", "optimizer"}}
        if unknown := set(rest) - known:
            raise TypeError(f"unknown keys: {sorted(unknown)}")
        return cls(
            model=ModelConfig(**model),
            training=TrainingConfig(**data["training"]),
            optimizer=OptimizerConfig(**optimizer),
            **rest,
        )
