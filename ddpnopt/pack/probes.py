"""Records of a pack's members besides their metrics: see `ddpnopt.probes` for what they are.

Each member is looked at alone, by an optimizer of its own, so that nothing depends on who shares the pack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ddpnopt.config import LayerShape, Probe, TrainingConfig
from ddpnopt.errors import ConfigError
from ddpnopt.introspection import inspect_member, policy_spectrum
from ddpnopt.layers.network import Controls
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.pack.part import Part, Samples
from ddpnopt.pack.tensors import TensorPart
from ddpnopt.probes import IMAGE_RANK, OF_POLICIES, SPECTRUM_SAMPLES, is_point, shape
from ddpnopt.results import Record

log = logging.getLogger(__name__)

Look = Callable[[DDPNOpt, Controls], Tensor]
Point = tuple[int, NDArray[np.float32]]
"""A step and what was recorded there."""


class Recorder:
    """What the members of a pack have recorded so far.

    Args:
        probes: what they are asked for.
        training: when.
        layers: of their nets.
        sample: the shape of a sample.
        train_set: for spectra.
        test_set: for images.
        cost_of: tells what an update of the run at a place costs alone, as `ddpnopt.pack.cost` measures it.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        training: TrainingConfig,
        layers: Sequence[LayerShape],
        sample: tuple[int, ...],
        train_set: Samples,
        test_set: Samples,
        cost_of: Callable[[int], Tensor],
    ) -> None:
        self._training, self._layers, self._sample = training, layers, sample
        self._train_set, self._test_set, self._cost_of = train_set, test_set, cost_of
        self._looks: dict[Probe, Look] = {"policy_spectrum": self._spectrum, "policy_image": self._images}
        # By place: a pack may have thousands of runs, of which each is asked for its own.
        self._points: dict[Probe, dict[int, list[Point]]] = {probe: {} for probe in probes}

    def take(self, step: int, parts: Sequence[Part]) -> None:
        """Record what belongs to a point of the curves."""
        wanted = [probe for probe in self._points if is_point(probe, self._training, step)]
        for part in parts:
            assert isinstance(part, TensorPart)  # nothing with probes trains in lanes
            for probe in wanted:
                for place, values in self._taken(probe, part):
                    self._points[probe].setdefault(place, []).append((step, values))

    def of(self, place: int) -> dict[str, Record]:
        """Return what the run at a place has recorded."""
        found: dict[str, Record] = {}
        for probe, points in self._points.items():
            if own := points.get(place):
                steps = np.array([step for step, _ in own], dtype=np.int64)
                found[probe] = Record(steps, np.stack([values for _, values in own]))
        return found

    def state(self) -> dict[str, Any]:
        """Return all of it, as tensors and plain values."""
        return {
            probe: {
                place: [(step, torch.from_numpy(values)) for step, values in own]
                for place, own in points.items()
            }
            for probe, points in self._points.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._points = {
            probe: {
                place: [(step, values.numpy()) for step, values in own] for place, own in state[probe].items()
            }
            for probe in self._points
        }

    def _taken(self, probe: Probe, part: TensorPart) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if probe in OF_POLICIES:
            return self._policies(probe, part)
        return self._costs(part) if probe == "cost" else self._norms(part)

    def _costs(self, part: TensorPart) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for place in part.index.tolist():
            yield place, self._cost_of(place).float().numpy()

    def _norms(self, part: TensorPart) -> Iterator[tuple[int, NDArray[np.float32]]]:
        norms = part.take_update_norms().float().numpy(force=True)
        yield from zip(part.index.tolist(), norms, strict=True)

    def _policies(self, probe: Probe, part: TensorPart) -> Iterator[tuple[int, NDArray[np.float32]]]:
        size = shape(probe, self._layers, self._sample)
        for place, optimizer, controls in part.sweepers():
            try:
                found = self._looks[probe](optimizer, controls).float().numpy(force=True)
            except (ConfigError, LinAlgError) as error:
                log.warning("run %d of the pack: no %s: %s", place, probe, error)
                found = np.full(size, np.nan, np.float32)
            yield place, found.reshape(size)

    def _spectrum(self, optimizer: DDPNOpt, controls: Controls) -> Tensor:
        inputs, targets = self._train_set.inputs, self._train_set.targets
        names = [f"layer {t}" for t in range(len(controls))]
        seen = inspect_member(
            optimizer, names, controls, inputs[:SPECTRUM_SAMPLES], targets[:SPECTRUM_SAMPLES]
        )
        eigenvalues = policy_spectrum(seen)
        # Of a K of rank one only as many come as there are samples: the others are zero.
        whole = eigenvalues.new_zeros(self._layers[-1].state)
        whole[: len(eigenvalues)] = eigenvalues
        return whole

    def _images(self, optimizer: DDPNOpt, controls: Controls) -> Tensor:
        names = [f"layer {t}" for t in range(len(controls))]
        inputs, targets = self._test_set.inputs, self._test_set.targets
        found = inputs.new_full((len(self._layers), self._layers[-1].outputs, inputs.shape[1]), torch.nan)
        for label in range(self._layers[-1].outputs):
            rows = (targets == label).nonzero().flatten()
            if len(rows) == 0:
                continue
            row = rows[min(IMAGE_RANK, len(rows) - 1)].reshape(1)
            found[0, label] = inputs[row]
            seen = inspect_member(optimizer, names, controls, inputs[row], targets[row])
            for layer in seen.layers[1:]:
                leading = layer.K.right_singular_vectors()[:, 0]
                found[layer.t, label] = seen.deconvolve(leading, layer.t).flatten()
        return found
