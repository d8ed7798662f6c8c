"""The sweeps of a preset after they were run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.client import Client
from service.paper.presets import Preset
from service.results.queries import curve_steps
from service.sweeps.spec import SweepSpec


def stacked(
    spec: dict[str, Any], metric: str, curves: Sequence[dict[str, Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps (P,) of a sweep's curves and their values (runs, P).

    A run that diverged has NaN from there to the sweep's last step, also where all of them have.
    """
    steps = np.array(list(curve_steps(SweepSpec.model_validate(spec), metric)))
    values = np.full((len(curves), len(steps)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[: len(curve["values"])] = np.array(curve["values"], dtype=np.float64)
    return steps, values


@dataclass(frozen=True, slots=True)
class Results:
    """What a section is built from.

    Attributes:
        client: of the service that ran the sweeps.
        preset: which figure.
        sweeps: as the API answers them, by the name of their specs.
        quick: whether `--quick` was asked for.
        missing: why sweeps have no results, by the name of their specs: their data are not there.
    """

    client: Client
    preset: Preset
    sweeps: Mapping[str, dict[str, Any]]
    quick: bool
    missing: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """Say how each sweep was made: setting, seeds, device, seconds, day."""
        return tuple(self._note(name, sweep) for name, sweep in self.sweeps.items())

    def _note(self, name: str, sweep: dict[str, Any]) -> str:
        spec, progress, usage = sweep["spec"], sweep["progress"], sweep["usage"]
        training, model = spec["training"], spec["model"]
        seeds = spec["seeds"] if isinstance(spec["seeds"], int) else len(spec["seeds"])
        devices = sorted(
            {
                attempt["device"]
                for pack in self.client.packs(sweep["id"])
                for attempt in pack["attempts"]
                if attempt["device"]
            }
        )
        net = "-".join(map(str, [*model.get("channels", []), *model["hidden"]]))
        return (
            f"{name}: {spec['dataset']}, hidden {net}, {model['activation']}, "
            f"batch {training['batch_size']}, {training['steps']} steps, {seeds} seeds, "
            f"{progress['runs_total']} runs ({progress['runs_diverged']} diverged, "
            f"{progress['runs_reused']} reused), "
            f"{usage['device_seconds']:.1f} device-seconds on {', '.join(devices) or 'nothing'}, "
            f"ended {sweep['finished_at'][:10]}"
        )
