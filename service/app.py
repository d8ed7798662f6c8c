"""The API: builds the application out of its parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy import select
from starlette.middleware.trustedhost import TrustedHostMiddleware

from service import __version__
from service.cluster import endpoints as cluster
from service.config import Settings
from service.dashboard import pages
from service.db import schema
from service.db.engine import open_engine
from service.http import Problem, Reading, install_handlers, problems
from service.results import endpoints as results
from service.sweeps import endpoints as sweeps
from service.sweeps.spec import SweepSpec
from service.teams import endpoints as teams


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: from the environment if not given.

    Raises:
        SetupError: if the database cannot be used.
    """
    settings = settings or Settings()
    engine = open_engine(settings.resolved_database_url())
    schema.check(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.dispose()

    app = FastAPI(
        title="DDPSweep",
        version=__version__,
        summary="Does DDPNOpt's feedback help, where, and how surely?",
        lifespan=lifespan,
        # Its pages would fetch scripts from elsewhere and run them here.
        docs_url=None,
        redoc_url=None,
    )
    app.state.engine, app.state.settings = engine, settings
    hosts = [host.strip() for host in settings.allowed_hosts.split(",")]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    install_handlers(app)
    for router in (sweeps.router, results.router, teams.router, cluster.router, pages.router):
        app.include_router(router)
    pages.mount_static(app)
    app.add_api_route("/healthz", _healthz, tags=["health"])
    app.add_api_route("/readyz", _readyz, tags=["health"], responses=problems(503))
    _publish_spec(app)
    return app


def _healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok", "version": __version__}


def _readyz(connection: Reading) -> dict[str, str]:
    """Say that the database answers; 503 if not."""
    connection.execute(select(1))
    return {"status": "ready"}


def _publish_spec(app: FastAPI) -> None:
    """Put the spec's schema into the OpenAPI document; its endpoints read the body themselves."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "SweepSpec" not in schemas:
            spec = SweepSpec.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(spec.pop("$defs"))
            schemas["SweepSpec"] = spec
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"))
            schemas["Problem"] = problem
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
