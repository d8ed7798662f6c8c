"""Fig. 4a's SGD panel on DIGITS, from a spec to a picture, through the service and over REST.

Starts the embedded service on a free port, submits the sweep, shows progress, draws the heatmaps and stops
everything that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from service.cli.display import follow, heatmap_table
from service.cli.embedded import service
from service.client import Client
from service.errors import SetupError
from service.results import plots

SPEC: Final = Path(__file__).with_name("digits-fig4a-sgd.yaml")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    home = (out / "demo-home").resolve()
    console = Console(highlight=False)
    try:
        _run(out, home, console)
    except SetupError as error:
        sys.exit(str(error))


def _run(out: Path, home: Path, console: Console) -> None:
    with service(home) as url, Client(url) as client:
        sweep = client.submit(SPEC.read_bytes())
        console.print(f"sweep {sweep['id']}: watch it at {url}/sweeps/{sweep['id']}")
        last = follow(console, client.watch(sweep["id"]))
        if last["state"] != "completed":
            sys.exit(f"the sweep {last['state']}: {last['error']}")
        answer = client.heatmap_json(sweep["id"], metric="train_loss")
        panels = [client.heatmap(sweep["id"], metric=metric) for metric in ("train_loss", "accuracy")]
    (out / "fig4a-sgd.json").write_text(json.dumps(answer, indent=2) + "\n")
    plots.save(panels, out / "fig4a-sgd.png")
    for panel in panels:
        console.print(heatmap_table(panel))
    better = sum((cell.improvement or 0) > 0 for cell in panels[0].cells)
    console.print(f"training loss is lower with DDPNOpt in {better} of {len(panels[0].cells)} cells")
    console.print(f"wrote {out / 'fig4a-sgd.png'} and {out / 'fig4a-sgd.json'}")
    console.print(
        f"the dashboard with this sweep: DDPSWEEP_HOME={os.path.relpath(home)} make serve", soft_wrap=True
    )
    console.print(f"                               and open http://127.0.0.1:8321/sweeps/{sweep['id']}")


if __name__ == "__main__":
    main()
