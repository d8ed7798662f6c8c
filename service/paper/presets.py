"""The paper's figures and tables as specs of sweeps, which anyone may submit as they are.

Adding one: a spec in `presets/` or a row in `VARIANTS`, a row in `PRESETS`, and a row in `build.BUILDERS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from ddpnopt.config import NUMERICS_VERSION
from ddpnopt.datasets.catalog import CLUSTERS
from service.errors import FieldError, InvalidInputError
from service.sweeps.documents import parse_yaml

FOLDER: Final = Path(__file__).parent / "presets"


@dataclass(frozen=True, slots=True)
class Preset:
    """A figure or a table.

    Attributes:
        name: as on the command line.
        title: as in the paper.
        sweeps: names of the specs.
        quick: what `--quick` changes in each of them: keys of the spec, those of `training` one by one.
    """

    name: str
    title: str
    sweeps: tuple[str, ...]
    quick: Mapping[str, Any]

    def documents(self, *, quick: bool = False) -> dict[str, dict[str, Any]]:
        """Return the specs by name."""
        return {name: _changed(spec(name), self.quick if quick else {}) for name in self.sweeps}


_SHORT: Final[Mapping[str, Any]] = {"seeds": 1, "training": {"steps": 1000, "test_every": 1000}}
_FEW_STEPS: Final[Mapping[str, Any]] = {
    "seeds": 1,
    "training": {"steps": 20, "eval_every": 20, "test_every": 20},
}
_FEWER: Final[Mapping[str, Any]] = {"seeds": 3}
_FIG4A: Final = ("fig4a-sgd", "fig4a-rmsprop", "fig4a-ekfac")

_FIG3: Final = tuple(f"fig3-{batch}" for batch in (8, 32, 128, 512))
_FIG3_DDP: Final = tuple(f"fig3-ddp-{batch}" for batch in (8, 32, 128))
_FCN: Final = ("wine", "digits", "mnist", "fashion_mnist")
_CNN: Final = ("mnist-cnn", "svhn-cnn", "cifar10-cnn")
_TABLE3: Final = (
    *(f"table3-{kind}{dataset}" for dataset in _FCN for kind in ("", "emsa-", "ddp-")),
    *(f"table3-{kind}{dataset}" for dataset in _CNN for kind in ("", "ekfac-", "emsa-")),
)
_TABLE4_AXES: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    base: {
        **{f"{base}-B{n}": {"training": {"batch_size": n}} for n in batches},
        **{f"{base}-X{n}": {"model": {"hidden": [n] * 4}} for n in widths},
        **{f"{base}-L{n}": {"model": {"hidden": [width] * n}} for n in depths},
    }
    for base, width, batches, widths, depths in (
        ("table4", 128, (256, 512, 1024), (64, 256, 512), (2, 8, 16)),
        ("table4-ddp", 8, (32, 64, 128), (4, 16, 32), (2, 8, 16)),
    )
}

VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    **{name: ("fig3", {"training": {"batch_size": int(name.split("-")[-1])}}) for name in _FIG3},
    **{name: ("fig3-ddp", {"training": {"batch_size": int(name.split("-")[-1])}}) for name in _FIG3_DDP},
    **{name: (base, changes) for base, axes in _TABLE4_AXES.items() for name, changes in axes.items()},
    "table3-fashion_mnist": ("table3-mnist", {"dataset": "fashion_mnist"}),
    "table3-emsa-fashion_mnist": ("table3-emsa-mnist", {"dataset": "fashion_mnist"}),
    "table3-ddp-fashion_mnist": ("table3-ddp-mnist", {"dataset": "fashion_mnist"}),
    **{
        f"table3-{kind}{dataset}-cnn": (f"table3-{kind}mnist-cnn", {"dataset": dataset})
        for dataset in ("svhn", "cifar10")
        for kind in ("", "ekfac-", "emsa-")
    },
}
"""Specs that differ from one in `presets/` in some keys, those of `training` and `model` one by one."""

PRESETS: Final[Mapping[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset("fig3", "Fig. 3: time and memory of an update on MNIST", (*_FIG3, *_FIG3_DDP), {"seeds": 1}),
        Preset("fig4a", "Fig. 4a: DDPNOpt against its baselines on DIGITS", _FIG4A, _FEWER),
        Preset("tables9-10", "Tables 9 and 10: the values behind Fig. 4a", _FIG4A, _FEWER),
        Preset("table3", "Table 3: accuracies of seven methods", _TABLE3, _FEW_STEPS),
        Preset(
            "table4",
            "Table 4: how time and memory grow with batch, width and depth",
            tuple(name for axes in _TABLE4_AXES.values() for name in axes),
            {"seeds": 1},
        ),
        Preset(
            "tables6-8",
            "Tables 6 to 8: the baselines at their best learning rates",
            ("table6", "table7", "table8"),
            _FEWER,
        ),
        Preset("fig4b", "Fig. 4b: examples of the training", _FIG4A[:2], _FEWER),
        Preset(
            "fig5",
            "Fig. 5: what the feedback policies of a CNN on MNIST answer",
            ("fig5",),
            {"training": {"steps": 20, "eval_every": 20}},
        ),
        Preset("fig6", "Fig. 6: a nine-layer net whose gradients vanish", ("fig12",), _SHORT),
        Preset(
            "fig8",
            "Fig. 8: the spectrum of the feedback policy on Gaussian clusters",
            tuple(f"fig8-{loss}-{k}" for loss in ("mmc", "ce") for k in CLUSTERS),
            {"seeds": 1},
        ),
        Preset("fig9", "Fig. 9: DDPNOpt against Adam on DIGITS", ("fig9",), _FEWER),
        Preset(
            "fig10",
            "Fig. 10: vanishing gradients with other losses and activations",
            ("fig10-ce", "fig10-relu"),
            _SHORT,
        ),
        Preset("fig11", "Fig. 11: vanishing gradients and first-order adaptive methods", ("fig11",), _SHORT),
        Preset("fig12", "Fig. 12: vanishing gradients at other learning rates", ("fig12",), _SHORT),
    )
}


def spec(name: str) -> dict[str, Any]:
    """Return a spec as a document, under its own name."""
    base, changes = VARIANTS.get(name, (name, {}))
    return _changed(parse_yaml((FOLDER / f"{base}.yaml").read_bytes()), changes) | {"name": name}


def text(name: str) -> str:
    """Return a spec as YAML: as it was written, if it is none of `VARIANTS`."""
    if name in VARIANTS:
        return yaml.safe_dump(spec(name), sort_keys=False, default_flow_style=None, width=100)
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def idempotency_key(document: Mapping[str, Any]) -> str:
    """Return the key that a preset's spec is submitted with, whoever submits it: what is there is taken.

    Results of other numerics are not: they would pass for this version's.
    """
    body = json.dumps([NUMERICS_VERSION, document], sort_keys=True).encode()
    return f"reproduce-{hashlib.sha256(body).hexdigest()[:32]}"


def get(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        InvalidInputError: if there is none.
    """
    if name not in PRESETS:
        raise InvalidInputError([FieldError("name", name, f"one of {', '.join(PRESETS)}, or all")])
    return PRESETS[name]


def _changed(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: document[key] | changes.get(key, {}) for key in ("training", "model")}
    return document | dict(changes) | merged
