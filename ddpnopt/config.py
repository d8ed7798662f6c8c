"""What a run is: frozen values, checked when made, importable without torch.

Two runs with equal `RunConfig` give bit-identical results on the same kind of CPU, whatever pack,
worker or attempt they were trained in. Defaults are those of the paper, with the units that
`docs/units.md` explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from ddpnopt.errors import ConfigError

Activation = Literal["tanh", "relu", "sigmoid", "gelu", "leaky_relu", "identity"]
Baseline = Literal["sgd", "rmsprop", "adam", "kfac", "ekfac", "sgd_vgr", "emsa", "vanilla_ddp"]
Convention = Literal["batch_mean", "per_sample"]
DType = Literal["float32", "float64"]
Dynamics = Literal["first_order", "second_order"]
LoneBaseline = Literal["sgd_vgr", "emsa", "vanilla_ddp"]
Loss = Literal["cross_entropy", "mse", "mmc"]
Method = Literal["baseline", "ddpnopt"]
ModelKind = Literal["fcn", "cnn"]
PairedBaseline = Literal["sgd", "rmsprop", "adam", "kfac", "ekfac"]
Probe = Literal["update_norm", "policy_spectrum", "policy_image", "cost"]
PreconditionerName = Literal["identity", "rmsprop", "adam", "kfac", "ekfac"]
Safeguard = Literal["clamp", "psd"]
SecondMoment = Literal["batch", "per_sample"]
TerminalHessian = Literal["exact", "gauss_newton"]
TrainMetrics = Literal["full", "running"]

PRECONDITIONER_OF: Final[Mapping[str, PreconditionerName]] = {
    "sgd": "identity",
    "rmsprop": "rmsprop",
    "adam": "adam",
    "kfac": "kfac",
    "ekfac": "ekfac",
}
"""The preconditioner of each baseline that has a DDPNOpt partner."""

NUMERICS_VERSION: Final = 4
"""Raised whenever a change alters the bits of any run's result; stored with every result."""

MMC_NORM: Final = 10.0
"""C_MM, the squared norm of the Max-Mahalanobis centres."""
KERNEL: Final = 3
"""Side of a CNN's convolution kernels."""
POOL_EVERY: Final = 2
"""A CNN halves its images after so many convolutions, by a maximum over 2 × 2."""

EVAL_CHUNK: Final = 512
"""Samples that metrics are taken on at once: fixed, since the order of a sum is part of its bits."""
MAX_WIDTH: Final = 8192
MAX_DEPTH: Final = 64
MAX_STEPS: Final = 10_000_000
MAX_LBFGS_STEPS: Final = 10_000
MAX_MEMORY_LIMIT: Final = 2**63 - 1
MAX_SEED: Final = 2**63 - 1


def _one_of(field: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(field, value, "one of " + ", ".join(map(str, allowed)))


def _whole(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(field, value, f"a whole number from {low} to {high}")


def _widths(field: str, values: object) -> None:
    if not isinstance(values, tuple):
        raise ConfigError(field, values, "a tuple of widths")
    if len(values) > MAX_DEPTH:
        raise ConfigError(field, len(values), f"at most {MAX_DEPTH} layers")
    for i, width in enumerate(values):
        _whole(f"{field}[{i}]", width, 1, MAX_WIDTH)


def _fraction(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(field, value, "a number from 0 to below 1")


def _finite(field: str, value: object, *, above_zero: bool) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (above_zero and value == 0):  # type: ignore[operator]
        raise ConfigError(field, value, "a finite number " + ("above 0" if above_zero else "of at least 0"))


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The size of one layer with controls.

    Attributes:
        outputs: o, rows of u.
        inputs: entries of a patch, or of the state for a fully connected layer; u has one column more.
        positions: places that u is applied at: 1 for a fully connected layer.
        state: entries of the state that enters the layer.
    """

    outputs: int
    inputs: int
    positions: int
    state: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A net: fully connected, or convolutions followed by fully connected layers.

    Attributes:
        hidden: widths of the fully connected hidden layers; empty leaves the read-out alone.
        activation: after every layer but the last.
        kind: `fcn` or `cnn`.
        channels: of a CNN's convolutions, each 3 × 3 with padding 1; after every second one a 2 × 2 maximum.
        output: activation of the read-out; the paper's is the identity, and sigmoid on WINE (A.6.1).
    """

    hidden: tuple[int, ...]
    activation: Activation = "tanh"
    kind: ModelKind = "fcn"
    channels: tuple[int, ...] = ()
    output: Activation = "identity"

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, ModelKind)
        _one_of("model.activation", self.activation, Activation)
        _one_of("model.output", self.output, Activation)
        _widths("model.hidden", self.hidden)
        _widths("model.channels", self.channels)
        if (self.kind == "cnn") != bool(self.channels):
            allowed = "at least one convolution for a cnn" if self.kind == "cnn" else "nothing for an fcn"
            raise ConfigError("model.channels", self.channels, allowed)

    @property
    def convolutional(self) -> bool:
        """Whether there is a convolution, for which the paper takes the Gauss-Newton form (A.6.1)."""
        return self.kind == "cnn"

    def layers(self, shape: tuple[int, ...], classes: int) -> tuple[LayerShape, ...]:
        """Return the size of every layer with controls, t = 0..T-1.

        Args:
            shape: of a sample: (features,), or (channels, height, width).
            classes: outputs of the last layer.

        Raises:
            ConfigError: if a CNN's images are too small for it, or samples are no images.
        """
        found: list[LayerShape] = []
        if self.convolutional:
            if len(shape) != 3:
                raise ConfigError("model.kind", self.kind, f"fcn: samples of shape {shape} are no images")
            channels, height, width = shape
            for i, after in enumerate(self.channels, start=1):
                state = channels * height * width
                found.append(LayerShape(after, channels * KERNEL**2, height * width, state))
                channels = after
                if i % POOL_EVERY == 0:
                    height, width = height // 2, width // 2
                if height * width == 0:
                    allowed = f"at most {i - 1} convolutions for images of {shape[1]} × {shape[2]}"
                    raise ConfigError("model.channels", self.channels, allowed)
            shape = (channels, height, width)
        features = math.prod(shape)
        for outputs in (*self.hidden, classes):
            found.append(LayerShape(outputs, features, 1, features))
            features = outputs
        return tuple(found)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How long, on what batches, and how often the metrics are taken.

    Attributes:
        steps: number of updates.
        batch_size: samples in a batch; batches are drawn without replacement within an epoch, and
            an incomplete last batch is dropped.
        eval_every: steps between two points of the curves; the last step is always a point.
        test_every: the same of the metrics on the test set, a multiple of it; None is at every point, all of
            the steps at the first and the last alone.
        train_metrics: `full` takes the loss and accuracy over the whole training set by the weights of the
            moment, from step 0 on. `running` averages those of the batches since the last point, each by the
            weights before its update: no pass over the training set, and no point at step 0. Baseline and
            partner are measured alike.
    """

    steps: int
    batch_size: int
    eval_every: int
    test_every: int | None = None
    train_metrics: TrainMetrics = "full"

    def __post_init__(self) -> None:
        _whole("training.steps", self.steps, 1, MAX_STEPS)
        _whole("training.batch_size", self.batch_size, 1, 1_000_000)
        _whole("training.eval_every", self.eval_every, 1, MAX_STEPS)
        _one_of("training.train_metrics", self.train_metrics, TrainMetrics)
        if self.test_every is not None:
            _whole("training.test_every", self.test_every, 1, MAX_STEPS)
            if self.test_every % self.eval_every and self.test_every < self.steps:
                allowed = f"a multiple of eval_every, {self.eval_every}, or all {self.steps} steps"
                raise ConfigError("training.test_every", self.test_every, allowed)

    def takes_train_metrics(self, step: int) -> bool:
        """Tell whether a step is a point of the curves of `train_loss` and `train_accuracy`."""
        return self._is_point(step, self.eval_every) and (step > 0 or self.train_metrics == "full")

    def takes_test_metrics(self, step: int) -> bool:
        """Tell whether a step is a point of the curves of `test_loss` and `accuracy`."""
        return self._is_point(step, self.test_every or self.eval_every)

    def points(self) -> Iterator[int]:
        """Yield the steps at which metrics of some kind are taken: 0, every `eval_every`, and the last."""
        yield from range(0, self.steps, self.eval_every)
        yield self.steps

    def _is_point(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps


@dataclass(frozen=True, slots=True)
class BaselineOptions:
    """The numbers of a baseline besides its learning rate, which its DDPNOpt partner shares.

    Attributes:
        momentum: μ in v ← μ v + M⁻¹ d, u ← u - η v.
        weight_decay: λ of ℓ_t(u) = λ/2 |u|², coupled as in torch.optim.
        rho: RMSprop's ρ, torch's `alpha`.
        betas: Adam's.
        eps: added to sqrt(v) in RMSprop and Adam.
        second_moment: s₂ of RMSprop and Adam: `batch` is the square of the mean gradient, as in torch,
            `per_sample` the mean of the samples' squares, as Table 2 writes.
        damping: γ of KFAC and EKFAC.
        factor_decay: α of their running averages; 0 is the current batch alone.
        inverse_every: steps between two inversions of their factors.
        vgr: weight of SGD-VGR's regulariser (Pascanu et al., 2013).
        augmentation: ρ of E-MSA's augmented Hamiltonian (Eq. 23).
        lbfgs_steps: iterations of E-MSA's L-BFGS, per layer and update.
        quu_reg: Tikhonov term on vanilla DDP's Q_uu.
        memory_limit: bytes that vanilla DDP's matrices may take for one run.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    rho: float = 0.99
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    second_moment: SecondMoment = "batch"
    damping: float = 0.01
    factor_decay: float = 0.0
    inverse_every: int = 1
    vgr: float = 0.1
    augmentation: float = 1.0
    lbfgs_steps: int = 5
    quu_reg: float = 0.1
    memory_limit: int = 2 * 2**30

    def __post_init__(self) -> None:
        for name in ("momentum", "rho", "factor_decay"):
            _fraction(name, getattr(self, name))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ConfigError("betas", self.betas, "two numbers")
        for i, beta in enumerate(self.betas):
            _fraction(f"betas[{i}]", beta)
        for name in ("weight_decay", "eps", "damping", "vgr", "augmentation", "quu_reg"):
            _finite(name, getattr(self, name), above_zero=False)
        _one_of("second_moment", self.second_moment, SecondMoment)
        _whole("inverse_every", self.inverse_every, 1, MAX_STEPS)
        _whole("lbfgs_steps", self.lbfgs_steps, 1, MAX_LBFGS_STEPS)
        _whole("memory_limit", self.memory_limit, 1, MAX_MEMORY_LIMIT)

    def check(self, baseline: str) -> None:
        """Refuse what a baseline has no use for.

        Raises:
            ConfigError: if an option that is not the baseline's differs from its default.
        """
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name not in OPTIONS_OF[baseline] and given != field.default:
                allowed = ", ".join(OPTIONS_OF[baseline])
                raise ConfigError(field.name, given, f"nothing: {baseline} has {allowed}")


_KRONECKER: Final = ("momentum", "weight_decay", "damping", "factor_decay", "inverse_every")

OPTIONS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "sgd": ("momentum", "weight_decay"),
    "rmsprop": ("momentum", "weight_decay", "rho", "eps", "second_moment"),
    "adam": ("weight_decay", "betas", "eps", "second_moment"),
    "kfac": _KRONECKER,
    "ekfac": _KRONECKER,
    "sgd_vgr": ("momentum", "weight_decay", "vgr"),
    "emsa": ("weight_decay", "augmentation", "lbfgs_steps"),
    "vanilla_ddp": ("weight_decay", "quu_reg", "memory_limit"),
}
"""The options that each baseline takes."""


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """The choices that the paper leaves open in DDPNOpt (defaults: the paper, in batch-mean units).

    Attributes:
        terminal_hessian: V_xx at T is the loss's exact Hessian or its Gauss-Newton outer product
            (Eq. 15); None picks the exact one for fully connected nets and Gauss-Newton where there is a
            convolution (A.6.1).
        factorized: V_xx as an outer product (Prop. 3); None picks it for a Gauss-Newton terminal
            Hessian and the full form otherwise. The outer product cannot hold an exact Hessian.
        convention: units of the value function: `batch_mean` are those of (1/B) Σ φ, `per_sample`
            those of φ. Gradients agree, the feedback's part of the update differs by a factor of B.
        curvature_scale: κ, factor on the terminal Hessian.
        safeguard: `clamp` is the paper's recursion; `psd` keeps V_xx positive semi-definite for any
            step size by keeping the Gauss-Newton term of Q_uu.
        feedback: False drops Q_ux, which leaves the baseline (Prop. 2).
        dynamics: `second_order` is DDPNOpt2nd (Eq. 26-27), which takes the full form.
    """

    terminal_hessian: TerminalHessian | None = None
    factorized: bool | None = None
    convention: Convention = "batch_mean"
    curvature_scale: float = 1.0
    safeguard: Safeguard = "clamp"
    feedback: bool = True
    dynamics: Dynamics = "first_order"

    def __post_init__(self) -> None:
        if self.terminal_hessian is not None:
            _one_of("ddpnopt.terminal_hessian", self.terminal_hessian, TerminalHessian)
        _one_of("ddpnopt.convention", self.convention, Convention)
        _one_of("ddpnopt.safeguard", self.safeguard, Safeguard)
        _one_of("ddpnopt.dynamics", self.dynamics, Dynamics)
        _finite("ddpnopt.curvature_scale", self.curvature_scale, above_zero=False)
        if self.factorized and self.terminal_hessian == "exact":
            raise ConfigError(
                "ddpnopt.factorized",
                True,
                "false with the exact terminal Hessian: an outer product has rank one "
                "(use terminal_hessian: gauss_newton)",
            )
        if self.factorized and self.dynamics == "second_order":
            raise ConfigError(
                "ddpnopt.factorized",
                True,
                "false with second-order dynamics, which add terms of full rank to V_xx",
            )

    def resolved(self, *, convolutional: bool = False) -> FeedbackConfig:
        """Return the same choices with the defaults that hang on each other filled in.

        Args:
            convolutional: whether the net has a convolution.
        """
        hessian = self.terminal_hessian or ("gauss_newton" if self.factorized or convolutional else "exact")
        factorized = self.factorized
        if factorized is None:
            factorized = hessian == "gauss_newton" and self.dynamics == "first_order"
        return replace(self, terminal_hessian=hessian, factorized=factorized)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """One optimizer with its numbers.

    Attributes:
        baseline: the plain optimizer; its preconditioner is also that of the DDPNOpt partner.
        method: which of the two.
        learning_rate: η, above 0.
        vxx_reg: ε, added to V_xx at t = T-1..1 (Alg. 3, line 12); None for a baseline.
        feedback: the partner's options; None for a baseline.
        options: the baseline's own numbers, which its partner shares.
    """

    baseline: Baseline
    method: Method
    learning_rate: float
    vxx_reg: float | None = None
    feedback: FeedbackConfig | None = None
    options: BaselineOptions = BaselineOptions()

    def __post_init__(self) -> None:
        _one_of("baseline", self.baseline, Baseline)
        _one_of("method", self.method, Method)
        _finite("learning_rate", self.learning_rate, above_zero=True)
        self.options.check(self.baseline)
        if self.method == "baseline":
            if self.vxx_reg is not None or self.feedback is not None:
                raise ConfigError("vxx_reg", self.vxx_reg, "nothing: a baseline has no value function")
            return
        _one_of("baseline", self.baseline, PairedBaseline)
        if self.feedback is None:
            raise ConfigError("feedback", None, "the options of DDPNOpt")
        _finite("vxx_reg", self.vxx_reg, above_zero=False)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training. Two runs of a pair differ in `optimizer` alone.

    Attributes:
        probes: what is recorded besides the metrics, each once; see `ddpnopt.probes`.
    """

    dataset: str
    model: ModelConfig
    loss: Loss
    training: TrainingConfig
    optimizer: OptimizerConfig
    seed: int
    dtype: DType = "float32"
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, Loss)
        _one_of("dtype", self.dtype, DType)
        _whole("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.probes, tuple) or len(set(self.probes)) < len(self.probes):
            raise ConfigError("probes", self.probes, "a tuple of probes, each once")
        for i, probe in enumerate(self.probes):
            _one_of(f"probes[{i}]", probe, Probe)

    def pack_key(self) -> tuple[object, ...]:
        """Return what runs must share to be trained in one pack."""
        return (self.dataset, self.model, self.loss, self.training, self.dtype, self.probes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        written = asdict(self)
        if not self.probes:  # as before there were any: keys are made of this
            del written["probes"]
        return written

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
        if "options" in optimizer:
            options = dict(optimizer["options"])
            options["betas"] = tuple(options["betas"])
            optimizer["options"] = BaselineOptions(**options)
        model: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["model"].items()}
        known = {f.name for f in fields(cls)} - {"model", "training", "optimizer"}
        rest = {k: v for k, v in data.items() if k not in {"model", "training", "optimizer"}}
        if "probes" in rest:
            rest["probes"] = tuple(rest["probes"])
        if unknown := set(rest) - known:
            raise TypeError(f"unknown keys: {sorted(unknown)}")
        return cls(
            model=ModelConfig(**model),
            training=TrainingConfig(**data["training"]),
            optimizer=OptimizerConfig(**optimizer),
            **rest,
        )
