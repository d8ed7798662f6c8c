"""Run a preset's sweeps by a service, as anybody's sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

from ddpnopt.errors import MissingDataError
from service.client import Client
from service.errors import SetupError
from service.paper.presets import Preset, idempotency_key
from service.paper.results import Results

NO_DATA: Final = f"{MissingDataError.__name__}: "
"""How the error of a pack begins whose dataset's files are not there: workers write the class's name."""

Follow = Callable[[str, Iterable[dict[str, Any]]], dict[str, Any]]
"""Takes a spec's name and the states of its sweep as they come; returns the last one."""


def run(client: Client, preset: Preset, follow: Follow, *, quick: bool = False) -> Results:
    """Submit what has not been submitted, wait for it, and return the results.

    The same preset again takes the sweeps that are there: what was interrupted goes on, what failed or was
    cancelled is tried again. A sweep whose dataset's files are not there is left out, and said to be.

    Raises:
        SetupError: if a sweep does not complete for another reason.
        Refused: if the service takes a spec not.
    """
    submitted = {name: _submit(client, document) for name, document in preset.documents(quick=quick).items()}
    done, missing = {}, {}
    for name, sweep_id in submitted.items():
        sweep = follow(name, client.watch(sweep_id))
        if sweep["state"] == "completed":
            done[name] = sweep
        elif sweep["state"] == "failed" and str(sweep["error"]).startswith(NO_DATA):
            # What was looked for; where is the machine's business.
            missing[name] = sweep["error"].removeprefix(NO_DATA).partition(" in ")[0]
        else:
            raise SetupError(f"sweep {sweep_id} ({name}) {sweep['state']}: {sweep['error']}")
    return Results(client, preset, done, quick, missing)


def _submit(client: Client, document: dict[str, Any]) -> str:
    body = json.dumps(document).encode()
    sweep = client.submit(body, "application/json", idempotency_key=idempotency_key(document))
    # One that was there may have been stopped, or have failed packs.
    if "resume" in sweep["actions"]:
        client.resume(sweep["id"])
    if "retry" in sweep["actions"]:
        client.retry(sweep["id"])
    return str(sweep["id"])
