"""Which module builds the section of which preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from service.paper import best_tuned, panels, policies, spectra, training, vanishing
from service.paper.results import Results
from service.paper.sections import Section

BUILDERS: Final[Mapping[str, Callable[[Results], Section]]] = {
    "fig4a": panels.section,
    "tables9-10": panels.section,
    "fig4b": training.section,
    "tables6-8": best_tuned.section,
    "fig5": policies.section,
    "fig6": vanishing.section,
    "fig8": spectra.section,
    "fig9": panels.section,
    "fig10": vanishing.section,
    "fig11": vanishing.section,
    "fig12": vanishing.section,
}
