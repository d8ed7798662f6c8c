"""The spec that users hold, as models. Unknown keys are refused; numbers are never taken from strings.

What was added later has a default: a spec that an older version stored still reads, and means the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ddpnopt import config, probes
from ddpnopt.datasets.catalog import CATALOG
from ddpnopt.errors import ConfigError

MAX_GRID_VALUES: Final = 1000
MAX_SEEDS: Final = 10_000
MAX_GRIDS: Final = 100
MAX_RUNS: Final = 1_000_000
CURVE_POINTS: Final = 20
MAX_CURVE_POINTS: Final = 2000
MAX_PRIORITY: Final = 100
MAX_PROBE_NUMBERS: Final = 250_000
"""Of a run: what its probes record at all points of its curves, a megabyte."""
LABEL: Final = r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"

PositiveRate = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[list[Annotated[int, Field(ge=1, le=config.MAX_WIDTH)]], Field(max_length=config.MAX_DEPTH)]
Seed = Annotated[int, Field(ge=0, le=config.MAX_SEED)]


def _printable(text: str) -> str:
    if "\x00" in text or not text.isprintable():
        raise PydanticCustomError("text", "printable characters only")
    return text


def _distinct(values: list[Any]) -> list[Any]:
    seen = set()
    for value in values:
        if value in seen:
            raise PydanticCustomError(
                "duplicate", "each value once; {twice} is there twice", {"twice": repr(value)}
            )
        seen.add(value)
    return values


def _known_dataset(name: str) -> str:
    if name not in CATALOG:
        raise PydanticCustomError("dataset", "one of {known}", {"known": ", ".join(sorted(CATALOG))})
    return name


def _refused(error: ConfigError, *within: str) -> PydanticCustomError:
    """Turn what the numerics refuse into an error of this document.

    Args:
        error: names its field as `model.channels`, `betas[0]`.
        within: the part of that name that leads to the model which is being checked.
    """
    steps = error.field.replace("]", "").replace("[", ".").split(".")
    at = tuple(int(step) if step.isdigit() else step for step in steps)
    context = {"allowed": error.allowed, "at": at[len(within) :] if at[: len(within)] == within else at}
    return PydanticCustomError("config", "{allowed}", context | {"given": error.value})


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class _Part(_Model):
    """A part of a spec that stands for a configuration, which the numerics check.

    Attributes:
        within: what the numerics call the part where they name a field of it.
    """

    within: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            self.resolved()
        except ConfigError as error:
            raise _refused(error, *self.within) from error
        return self

    def resolved(self) -> object:
        """Return the configuration.

        Raises:
            ConfigError: if there is none.
        """
        raise NotImplementedError


class ModelSpec(_Part):
    """The net. See `ddpnopt.config.ModelConfig`."""

    within: ClassVar[tuple[str, ...]] = ("model",)

    kind: Annotated[config.ModelKind, Field(description="fully connected, or convolutions before that")]
    hidden: Annotated[Widths, Field(description="widths of the fully connected hidden layers")]
    activation: Annotated[config.Activation, Field(description="after every layer but the last")] = "tanh"
    channels: Annotated[
        Widths, Field(description="of a cnn's 3 × 3 convolutions; every second one halves the image")
    ] = []
    output: Annotated[config.Activation, Field(description="after the last layer")] = "identity"

    def resolved(self) -> config.ModelConfig:
        """Return the configuration."""
        return config.ModelConfig(
            tuple(self.hidden), self.activation, self.kind, tuple(self.channels), self.output
        )


class TrainingSpec(_Part):
    """How long, on what batches, and when what is measured; see `ddpnopt.config.TrainingConfig`."""

    within: ClassVar[tuple[str, ...]] = ("training",)

    steps: Annotated[int, Field(ge=1, le=config.MAX_STEPS)]
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    eval_every: Annotated[
        int | None,
        Field(ge=1, le=config.MAX_STEPS, description="steps between two points of the curves"),
    ] = None
    test_every: Annotated[
        int | None,
        Field(
            ge=1,
            le=config.MAX_STEPS,
            description="the same of the test set's metrics: a multiple of eval_every, or all steps",
        ),
    ] = None
    train_metrics: Annotated[
        config.TrainMetrics,
        Field(description="over the whole training set, or running means over the batches"),
    ] = "full"

    @model_validator(mode="after")
    def _curves_fit(self) -> TrainingSpec:
        every = self.eval_every
        least = max(1, math.ceil(self.steps / MAX_CURVE_POINTS))
        if every is not None and not least <= every <= self.steps:
            allowed = f"from {least} to {self.steps}: at most {MAX_CURVE_POINTS} points a curve"
            raise PydanticCustomError(
                "eval_every", "{allowed}", {"allowed": allowed, "at": ("eval_every",), "given": every}
            )
        return self

    def resolved(self) -> config.TrainingConfig:
        """Return the configuration, with about `CURVE_POINTS` points a curve if nothing else is said."""
        every = self.eval_every or math.ceil(self.steps / CURVE_POINTS)
        return config.TrainingConfig(self.steps, self.batch_size, every, self.test_every, self.train_metrics)


class FeedbackSpec(_Part):
    """The options of DDPNOpt that the paper leaves open; see `ddpnopt.config.FeedbackConfig`."""

    within: ClassVar[tuple[str, ...]] = ("ddpnopt",)

    terminal_hessian: config.TerminalHessian | None = None
    factorized: bool | None = None
    convention: config.Convention = "batch_mean"
    curvature_scale: NonNegative = 1.0
    safeguard: config.Safeguard = "clamp"
    feedback: bool = True
    dynamics: config.Dynamics = "first_order"

    def resolved(self) -> config.FeedbackConfig:
        """Return the configuration."""
        return config.FeedbackConfig(**self.model_dump())


class OptionsSpec(_Part):
    """A baseline's own numbers, which its DDPNOpt partner shares; see `ddpnopt.config.BaselineOptions`."""

    def resolved(self) -> config.BaselineOptions:
        """Return the configuration."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.model_dump().items()
        }
        return config.BaselineOptions(**given)


_DEFAULT: Final = config.BaselineOptions()


class SGDOptions(OptionsSpec):
    """Options of SGD."""

    momentum: Fraction = _DEFAULT.momentum
    weight_decay: NonNegative = _DEFAULT.weight_decay


class RMSpropOptions(OptionsSpec):
    """Options of RMSprop."""

    momentum: Fraction = _DEFAULT.momentum
    weight_decay: NonNegative = _DEFAULT.weight_decay
    rho: Fraction = _DEFAULT.rho
    eps: NonNegative = _DEFAULT.eps
    second_moment: config.SecondMoment = _DEFAULT.second_moment


class AdamOptions(OptionsSpec):
    """Options of Adam."""

    weight_decay: NonNegative = _DEFAULT.weight_decay
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = list(_DEFAULT.betas)
    eps: NonNegative = _DEFAULT.eps
    second_moment: config.SecondMoment = _DEFAULT.second_moment


class KroneckerOptions(OptionsSpec):
    """Options of KFAC and EKFAC."""

    momentum: Fraction = _DEFAULT.momentum
    weight_decay: NonNegative = _DEFAULT.weight_decay
    damping: NonNegative = _DEFAULT.damping
    factor_decay: Fraction = _DEFAULT.factor_decay
    inverse_every: Annotated[int, Field(ge=1, le=config.MAX_STEPS)] = _DEFAULT.inverse_every


class VGROptions(OptionsSpec):
    """Options of SGD-VGR."""

    momentum: Fraction = _DEFAULT.momentum
    weight_decay: NonNegative = _DEFAULT.weight_decay
    vgr: NonNegative = _DEFAULT.vgr


class EMSAOptions(OptionsSpec):
    """Options of E-MSA."""

    weight_decay: NonNegative = _DEFAULT.weight_decay
    augmentation: NonNegative = _DEFAULT.augmentation
    lbfgs_steps: Annotated[int, Field(ge=1, le=config.MAX_LBFGS_STEPS)] = _DEFAULT.lbfgs_steps


class VanillaDDPOptions(OptionsSpec):
    """Options of vanilla DDP."""

    weight_decay: NonNegative = _DEFAULT.weight_decay
    quu_reg: NonNegative = _DEFAULT.quu_reg
    memory_limit: Annotated[
        int, Field(ge=1, le=config.MAX_MEMORY_LIMIT, description="bytes that one run's matrices may take")
    ] = _DEFAULT.memory_limit


class GridSpec(_Model):
    """One baseline's table: learning rates down, V_xx regularisations of its DDPNOpt partner across."""

    baseline: config.Baseline
    options: OptionsSpec
    learning_rate: Annotated[
        list[PositiveRate], Field(min_length=1, max_length=MAX_GRID_VALUES), AfterValidator(_distinct)
    ]
    vxx_reg: Annotated[
        list[NonNegative],
        Field(max_length=MAX_GRID_VALUES, description="of the DDPNOpt partner; [] trains the baseline alone"),
        AfterValidator(_distinct),
    ]
    ddpnopt: FeedbackSpec = FeedbackSpec()

    @property
    def has_cells(self) -> bool:
        """Whether there are DDPNOpt runs to compare the baseline with."""
        return bool(self.vxx_reg)

    def methods(self) -> tuple[config.Method, ...]:
        """Return the methods that the grid's runs have."""
        return ("baseline", "ddpnopt") if self.has_cells else ("baseline",)

    def setting(self) -> str:
        """Name what the grid sets besides its axes, as `rho 0.98, safeguard psd`; empty if nothing.

        Options of DDPNOpt set nothing where it is not trained.
        """
        return ", ".join(map(" ".join, self.settings(self.methods()[-1])))

    def settings(self, method: str) -> Iterator[tuple[str, str]]:
        """Yield the options of a method's runs that are not the defaults, with their values as written."""
        for chosen in (self.options, self.ddpnopt) if method == "ddpnopt" else (self.options,):
            for name, value in chosen:
                if value != getattr(type(chosen)(), name):
                    yield name, _written(value)


def _written(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class SGDGrid(GridSpec):
    """A grid of SGD."""

    baseline: Literal["sgd"]
    options: SGDOptions = SGDOptions()


class RMSpropGrid(GridSpec):
    """A grid of RMSprop."""

    baseline: Literal["rmsprop"]
    options: RMSpropOptions = RMSpropOptions()


class AdamGrid(GridSpec):
    """A grid of Adam."""

    baseline: Literal["adam"]
    options: AdamOptions = AdamOptions()


class KroneckerGrid(GridSpec):
    """A grid of KFAC or EKFAC."""

    baseline: Literal["kfac", "ekfac"]
    options: KroneckerOptions = KroneckerOptions()


class LoneGrid(GridSpec):
    """Learning rates of a baseline that has no DDPNOpt partner."""

    baseline: config.LoneBaseline
    vxx_reg: Annotated[
        list[NonNegative], Field(max_length=0, description="nothing: there is no DDPNOpt partner")
    ] = []

    @field_validator("vxx_reg", mode="before")
    @classmethod
    def _no_columns(cls, given: object, info: ValidationInfo) -> object:
        return given if given == [] else cls._refuse_partner(given, info)

    @field_validator("ddpnopt")
    @classmethod
    def _no_partner(cls, given: FeedbackSpec, info: ValidationInfo) -> FeedbackSpec:
        if given != FeedbackSpec():
            cls._refuse_partner(given.model_dump(exclude_defaults=True), info)
        return given

    @staticmethod
    def _refuse_partner(given: object, info: ValidationInfo) -> NoReturn:
        context = {"baseline": info.data.get("baseline", "the baseline"), "given": given}
        raise PydanticCustomError("partner", "nothing: {baseline} has no DDPNOpt partner", context)


class VGRGrid(LoneGrid):
    """A grid of SGD-VGR."""

    baseline: Literal["sgd_vgr"]
    options: VGROptions = VGROptions()


class EMSAGrid(LoneGrid):
    """A grid of E-MSA."""

    baseline: Literal["emsa"]
    options: EMSAOptions = EMSAOptions()


class VanillaDDPGrid(LoneGrid):
    """A grid of vanilla DDP."""

    baseline: Literal["vanilla_ddp"]
    options: VanillaDDPOptions = VanillaDDPOptions()


Grid: TypeAlias = Annotated[
    SGDGrid | RMSpropGrid | AdamGrid | KroneckerGrid | VGRGrid | EMSAGrid | VanillaDDPGrid,
    Field(discriminator="baseline"),
]
"""A grid by its baseline, which decides what options there are."""


class DeviceSpec(_Model):
    """The devices that a sweep may use; all of its packs train on one kind."""

    kind: Annotated[Literal["cpu", "gpu"] | None, Field(description="any if not given")] = None
    model: Annotated[
        str | None,
        Field(
            max_length=63,
            pattern=LABEL,
            description="as nodes are labelled",
        ),
    ] = None


class SweepSpec(_Model):
    """A sweep: what to train, how long, on which seeds, over which grids, and how urgently."""

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
    dataset: Annotated[str, AfterValidator(_known_dataset)]
    model: ModelSpec
    loss: config.Loss = "cross_entropy"
    training: TrainingSpec
    seeds: (
        Annotated[int, Field(ge=1, le=MAX_SEEDS)]
        | Annotated[list[Seed], Field(min_length=1, max_length=MAX_SEEDS), AfterValidator(_distinct)]
    )
    dtype: config.DType = "float32"
    probes: Annotated[
        list[config.Probe],
        Field(description="what runs record besides their metrics"),
        AfterValidator(_distinct),
    ] = []
    grids: Annotated[list[Grid], Field(min_length=1, max_length=MAX_GRIDS)]
    priority: Annotated[
        int,
        Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="within the team; higher ones come first"),
    ] = 0
    reuse: Annotated[
        bool, Field(description="take the results of equal runs of the team instead of training again")
    ] = True
    device: DeviceSpec = DeviceSpec()

    @field_validator("training")
    @classmethod
    def _batch_fits(cls, training: TrainingSpec, info: Any) -> TrainingSpec:
        dataset = CATALOG.get(info.data.get("dataset", ""))
        if dataset is not None and training.batch_size > dataset.train_size:
            raise PydanticCustomError(
                "batch_size",
                "at most {most}, the training set of {dataset}",
                {
                    "most": dataset.train_size,
                    "dataset": dataset.name,
                    "at": ("batch_size",),
                    "given": training.batch_size,
                },
            )
        return training

    @model_validator(mode="after")
    def _net_fits_the_samples(self) -> SweepSpec:
        try:
            self.layers()
        except ConfigError as error:
            raise _refused(error) from error
        return self

    @model_validator(mode="after")
    def _baselines_take_the_net(self) -> SweepSpec:
        for position, grid in enumerate(self.grids):
            if grid.baseline == "vanilla_ddp" and self.model.resolved().convolutional:
                raise PydanticCustomError(
                    "baseline",
                    "any other for a cnn: the dense matrices of a convolution's batch fit no memory",
                    {"at": ("grids", position, "baseline"), "given": grid.baseline},
                )
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> SweepSpec:
        total = self.runs_total()
        if total > MAX_RUNS:
            raise PydanticCustomError(
                "runs",
                "at most {most} runs in a sweep",
                {"most": MAX_RUNS, "at": ("grids",), "given": f"{total} runs"},
            )
        return self

    @model_validator(mode="after")
    def _probes_fit(self) -> SweepSpec:
        shape = CATALOG[self.dataset].shape
        total = probes.numbers(self.probes, self.training.resolved(), self.layers(), shape)
        if total > MAX_PROBE_NUMBERS:
            raise PydanticCustomError(
                "probes",
                "at most {most} numbers in a run: fewer points (eval_every), or a smaller net",
                {"most": MAX_PROBE_NUMBERS, "at": ("probes",), "given": f"{total} numbers in a run"},
            )
        return self

    def seed_list(self) -> tuple[int, ...]:
        """Return the seeds: 0..n-1 if only their number was given."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    def layers(self) -> tuple[config.LayerShape, ...]:
        """Return the sizes of the net's layers on this dataset."""
        dataset = CATALOG[self.dataset]
        return self.model.resolved().layers(dataset.shape, dataset.classes)

    def runs_total(self) -> int:
        """Count the runs by arithmetic: a baseline is trained once per learning rate and seed."""
        per_seed = sum(len(g.learning_rate) * (1 + len(g.vxx_reg)) for g in self.grids)
        return per_seed * (self.seeds if isinstance(self.seeds, int) else len(self.seeds))

    def run_config(
        self, grid: int, method: config.Method, learning_rate: float, vxx_reg: float | None, seed: int
    ) -> config.RunConfig:
        """Return the configuration of one run of the sweep."""
        chosen = self.grids[grid]
        feedback = chosen.ddpnopt.resolved() if method == "ddpnopt" else None
        return config.RunConfig(
            dataset=self.dataset,
            model=self.model.resolved(),
            loss=self.loss,
            training=self.training.resolved(),
            optimizer=config.OptimizerConfig(
                chosen.baseline, method, learning_rate, vxx_reg, feedback, chosen.options.resolved()
            ),
            seed=seed,
            dtype=self.dtype,
            probes=tuple(self.probes),
        )
