"""The paper's presets as a page offers them: what each would come to on this service, and what it submits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ddpnopt.datasets.fetch import OFFICIAL
from service.config import Settings
from service.errors import InvalidInputError, NotFoundError
from service.paper.presets import PRESETS, Preset, idempotency_key, text
from service.sweeps.documents import parse_spec, shown
from service.sweeps.endpoints import planned_here
from service.sweeps.schemas import Validated

FIRST: Final = "fig4a-sgd"
"""The spec that one's own begins as."""


@dataclass(frozen=True, slots=True)
class Size:
    """A preset as it is, or its quick version.

    Attributes:
        label: `quick` or `full`.
        changes: what the quick version changes, in words.
        sweeps: what is submitted: `name`, `key` and `spec` of each.
        runs, run_steps, seconds: what they come to together, as `validate` counts.
        refusal: why this service would not take them; empty if it would.
    """

    label: str
    changes: str
    sweeps: list[dict[str, Any]]
    runs: int = 0
    run_steps: int = 0
    seconds: float = 0.0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A preset.

    Attributes:
        files: the datasets that it needs files of.
    """

    preset: Preset
    files: list[str]
    sizes: tuple[Size, ...]


def every(settings: Settings) -> list[Offer]:
    """List the presets in their order."""
    return [_offer(preset, settings) for preset in PRESETS.values()]


def spec_text(name: str | None) -> tuple[str, str]:
    """Return a preset's spec as YAML, with its name; `FIRST` if none is named.

    Raises:
        NotFoundError: if no preset has such a spec.
    """
    chosen = FIRST if name is None else name
    known = {FIRST, *(sweep for preset in PRESETS.values() for sweep in preset.sweeps)}
    if chosen not in known:  # which keeps out paths, too
        raise NotFoundError(f"no spec {chosen!r} among the presets")
    return chosen, text(chosen)


def _offer(preset: Preset, settings: Settings) -> Offer:
    sizes = tuple(_size(preset, settings, quick=quick) for quick in (True, False))
    datasets = {sweep["spec"]["dataset"] for size in sizes for sweep in size.sweeps}
    return Offer(preset, sorted(datasets & set(OFFICIAL)), sizes)


def _size(preset: Preset, settings: Settings, *, quick: bool) -> Size:
    documents = preset.documents(quick=quick)
    sweeps = [
        {"name": name, "key": idempotency_key(document), "spec": document}
        for name, document in documents.items()
    ]
    label, changes = ("quick", ", ".join(_words(preset.quick))) if quick else ("full", "")
    try:
        counted = [_validated(document, settings) for document in documents.values()]
    except InvalidInputError as error:  # too large for this service's devices
        return Size(label, changes, sweeps, refusal=str(error))
    return Size(
        label,
        changes,
        sweeps,
        sum(c.runs for c in counted),
        sum(c.run_steps for c in counted),
        sum(c.estimated_seconds for c in counted),
    )


def _validated(document: dict[str, Any], settings: Settings) -> Validated:
    spec = parse_spec(document)
    return Validated.of(spec, planned_here(spec, settings))


def _words(changes: Mapping[str, Any]) -> Iterator[str]:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _words(value)
        else:
            yield f"{key} {shown(value)}"
