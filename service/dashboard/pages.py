"""The pages. Each has a live part that the page's script fetches again while the sweep runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from sqlalchemy import Connection

from service import __version__
from service.dashboard import offers, views
from service.http import Reading
from service.results import figures
from service.results.queries import heatmap
from service.sweeps import queries
from service.sweeps.endpoints import Position
from service.sweeps.schemas import Sweep
from service.sweeps.spec import SweepSpec

HERE: Final = Path(__file__).parent
LISTED: Final = 100
METRICS: Final = ("train_loss", "accuracy")
# Plotly sets style attributes itself; scripts come from this server alone.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)

router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(HERE / "templates")


def duration(seconds: float | None) -> str:
    """Write seconds as a person would."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ago(moment: datetime) -> str:
    """Write how long ago a moment was."""
    return f"{duration((datetime.now(UTC) - moment).total_seconds())} ago"


templates.env.filters |= {"duration": duration, "ago": ago, "spread": figures.spread}
templates.env.globals |= {
    "version": __version__,
    "SHOWN_PACKS": views.SHOWN_PACKS,
    "SHOWN_ATTEMPTS": views.SHOWN_ATTEMPTS,
}


@router.get("/")
def sweep_list(request: Request, connection: Reading) -> HTMLResponse:
    """Show the newest sweeps."""
    return _page(request, "sweeps.html", sweeps=_sweeps(connection))


@router.get("/live")
def sweep_list_live(request: Request, connection: Reading) -> HTMLResponse:
    """Return the live part of the list."""
    return _page(request, "_sweeps.html", sweeps=_sweeps(connection))


@router.get("/sweeps/{sweep_id}")
def sweep_page(request: Request, sweep_id: str, connection: Reading) -> HTMLResponse:
    """Show one sweep."""
    return _page(request, "sweep.html", **_sweep(connection, sweep_id))


@router.get("/sweeps/{sweep_id}/live")
def sweep_page_live(request: Request, sweep_id: str, connection: Reading) -> HTMLResponse:
    """Return the live part of a sweep's page."""
    return _page(request, "_sweep.html", **_sweep(connection, sweep_id))


@router.get("/sweeps/{sweep_id}/packs/{pack}/log")
def log_page(
    request: Request,
    sweep_id: str,
    pack: Position,
    connection: Reading,
    attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> HTMLResponse:
    """Show what an attempt at a pack wrote."""
    sweep = Sweep.of(queries.get(connection, sweep_id))
    found = views.pack_log(connection, sweep_id, pack, attempt)
    return _page(request, "log.html", sweep=sweep, found=found)


@router.get("/new")
def new_sweep_page(
    request: Request, spec: Annotated[str | None, Query(max_length=64)] = None
) -> HTMLResponse:
    """Offer the paper's presets, and a place to write a spec, which begins as one of theirs."""
    begun, text = offers.spec_text(spec)
    state = request.app.state
    if not hasattr(state, "offers"):  # planning all of them takes a while, and always comes to the same
        state.offers = offers.every(state.settings)
    return _page(request, "new.html", offers=state.offers, begun=begun, text=text)


@router.get("/cluster")
def cluster_page(request: Request, connection: Reading) -> HTMLResponse:
    """Show the machines, what runs where and for whom."""
    return _page(request, "cluster.html", **views.cluster(connection))


@router.get("/cluster/live")
def cluster_page_live(request: Request, connection: Reading) -> HTMLResponse:
    """Return the live part of the cluster's page."""
    return _page(request, "_cluster.html", **views.cluster(connection))


@router.get("/static/plotly.min.js")
def plotly_script() -> FileResponse:
    """Serve the script that the plotly package ships."""
    import plotly

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return FileResponse(script, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})


def mount_static(app: FastAPI) -> None:
    """Serve the style sheet and the pages' scripts."""
    app.mount("/static", StaticFiles(directory=HERE / "static"))


def _sweeps(connection: Connection) -> list[Sweep]:
    return [Sweep.of(row) for row in queries.newest(connection, LISTED, None)]


def _sweep(connection: Connection, sweep_id: str) -> dict[str, Any]:
    sweep = Sweep.of(queries.get(connection, sweep_id))
    checked = SweepSpec.model_validate(sweep.spec)
    panels = []
    for grid in (position for position, grid in enumerate(checked.grids) if grid.has_cells):
        for metric in METRICS:
            panel = heatmap(connection, sweep_id, metric, grid=grid)
            digits = figures.digits(panel)
            panels.append(
                {
                    "id": f"{metric}-{grid}",
                    "metric": metric,
                    "title": figures.title(panel),
                    "setting": panel.setting,
                    "figure": json.dumps(figures.plotly_figure(panel)),
                    "vxx_reg": panel.vxx_reg,
                    "rows": [
                        (rate, [(cell, figures.label(cell, digits)) for cell in line])
                        for rate, line in figures.rows(panel)
                    ],
                }
            )
    spec = yaml.safe_dump(sweep.spec, sort_keys=False, default_flow_style=None, width=100)
    shown = views.first_packs(connection, sweep)
    return {
        "sweep": sweep,
        "panels": panels,
        "lone_tables": views.lone_tables(connection, sweep_id, checked, METRICS),
        "spec": spec,
        "buttons": views.buttons(sweep),
        "packs": shown,
        "failures": views.failures(connection, sweep, shown),
    }


def _page(request: Request, name: str, **context: Any) -> HTMLResponse:
    headers = {
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    return templates.TemplateResponse(request, name, context, headers=headers)
