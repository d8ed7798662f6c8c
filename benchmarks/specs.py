"""The packs of a spec file, as the service plans them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ddpnopt.config import RunConfig
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import plan

FIG4A: Final = Path(__file__).parent.parent / "examples" / "digits-fig4a-sgd.yaml"


def packs_of(path: Path, steps: int | None = None) -> list[list[RunConfig]]:
    """Return the packs of a spec file as the service plans them, with other `steps` if given."""
    document = parse_yaml(path.read_bytes())
    if steps is not None:
        document["training"]["steps"] = steps
    spec = parse_spec(document)
    return [
        [spec.run_config(run.grid, run.method, run.learning_rate, run.vxx_reg, run.seed) for run in pack]
        for pack in plan(spec).packs
    ]
