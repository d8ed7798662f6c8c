"""What the searches over settings share: a sweep is submitted once, and waited for."""

from __future__ import annotations

import json
from typing import Any

from service.client import Client
from service.paper.presets import idempotency_key


def submitted(client: Client, document: dict[str, Any]) -> str:
    """Submit a spec, or take the sweep that was made of the very same; return its id."""
    body = json.dumps(document).encode()
    return str(client.submit(body, "application/json", idempotency_key=idempotency_key(document))["id"])


def completed(client: Client, sweep_id: str) -> dict[str, Any]:
    """Wait for a sweep and return it.

    Raises:
        SystemExit: if it does not complete.
    """
    *_, sweep = client.watch(sweep_id, 1.0)
    if sweep["state"] != "completed":
        raise SystemExit(f"sweep {sweep_id} {sweep['state']}: {sweep['error']}")
    return sweep
