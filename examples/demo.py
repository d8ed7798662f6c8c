"""Fig. 4a's SGD panel on DIGITS, from a spec to a picture, through the service and over REST.

Starts the embedded service on a free port, submits the sweep, shows progress, draws the heatmaps and stops
everything that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from service.cli.display import follow, heatmap_table
from service.client import Client
from service.results import plots

SPEC: Final = Path(__file__).with_name("digits-fig4a-sgd.yaml")
START_S: Final = 60
STOP_S: Final = 30


@contextmanager
def service(home: Path, **settings: str) -> Iterator[str]:
    """Run `ddpsweep serve` with some settings on a free port and yield its URL."""
    environment = {name: value for name, value in os.environ.items() if name != "DDPSWEEP_DATABASE_URL"}
    environment |= {"DDPSWEEP_HOME": str(home)} | settings
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield _url(process, home)
        finally:
            process.terminate()
            process.wait(STOP_S)


def _url(process: subprocess.Popen[str], home: Path) -> str:
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if found is None:
        sys.exit(f"the service did not start:\n{(home / 'serve.log').read_text()}")
    with Client(found.group()) as client:
        for _ in range(START_S * 5):
            if client.ready():
                return found.group()
            time.sleep(0.2)
    sys.exit(f"the service was not ready within {START_S} s:\n{(home / 'serve.log').read_text()}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    home = (out / "demo-home").resolve()
    console = Console(highlight=False)
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
