"""Which module builds the section of which preset, and what is said of sweeps whose data are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from service.paper import accuracies, best_tuned, costs, panels, policies, spectra, training, vanishing
from service.paper.results import Results
from service.paper.sections import Section
from service.sweeps.documents import parse_yaml

QUICK: Final = "Made with --quick: fewer seeds or steps, so that nothing here is evidence."
REMARKS: Final = Path(__file__).parent / "remarks.yaml"

BUILDERS: Final[Mapping[str, Callable[[Results], Section]]] = {
    "fig3": costs.fig3,
    "fig4a": panels.section,
    "tables9-10": panels.tables,
    "fig4b": training.section,
    "table3": accuracies.section,
    "table4": costs.table4,
    "tables6-8": best_tuned.section,
    "fig5": policies.section,
    "fig6": vanishing.fig6,
    "fig8": spectra.section,
    "fig9": panels.section,
    "fig10": vanishing.section,
    "fig11": vanishing.section,
    "fig12": vanishing.section,
}


def build(results: Results) -> Section:
    """Build a preset's section of what there is, and name in it what is missing."""
    preset = results.preset
    said = tuple(_missing(results))
    if not results.sweeps:
        return Section(preset.name, preset.title, said)
    section = BUILDERS[preset.name](results)
    quick = (QUICK,) if results.quick else ()
    return replace(section, findings=(*quick, *section.findings, *said), remarks=remarks(preset.name))


def _missing(results: Results) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in results.missing.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        yield f"{', '.join(names)} did not run: {why} (docs/datasets.md says where such files go)"


def remarks(name: str) -> tuple[str, ...]:
    """Return why what comes out of a preset may differ from the paper."""
    groups = parse_yaml(REMARKS.read_bytes())["groups"]
    return tuple(text for group in groups if name in group["presets"] for text in group["remarks"])
