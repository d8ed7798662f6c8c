"""The paper's figures and tables as specs of sweeps, which anyone may submit as they are.

Adding one: a spec in `presets/`, a row in `PRESETS`, and a row in `build.BUILDERS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
        sweeps: names of the specs in `presets/`.
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
_FEWER: Final[Mapping[str, Any]] = {"seeds": 3}
_FIG4A: Final = ("fig4a-sgd", "fig4a-rmsprop", "fig4a-ekfac")

PRESETS: Final[Mapping[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset("fig4a", "Fig. 4a: DDPNOpt against its baselines on DIGITS", _FIG4A, _FEWER),
        Preset("tables9-10", "Tables 9 and 10: the values behind Fig. 4a", _FIG4A, _FEWER),
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
    """Return a spec of `presets/` as a document."""
    return parse_yaml((FOLDER / f"{name}.yaml").read_bytes())


def idempotency_key(document: Mapping[str, Any]) -> str:
    """Return the key that a preset's spec is submitted with, whoever submits it: what is there is taken."""
    body = json.dumps(document, sort_keys=True).encode()
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
    training = document["training"] | changes.get("training", {})
    return document | dict(changes) | {"training": training}
