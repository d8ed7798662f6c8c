"""The dispatcher's process: the only place that wires an executor in."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, NoReturn

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from service.config import Settings
from service.db import schema
from service.db.engine import is_transient, open_engine
from service.dispatch.loop import Dispatcher
from service.errors import SetupError
from workers.protocol import CannotJoinError, ExecutorLostError

if TYPE_CHECKING:
    from workers.ray_executor import RayExecutor

log = logging.getLogger(__name__)

ROUND_S: Final = 0.5
WATCH_EVERY_S: Final = 1.0
GRACE_S: Final = 3.0
"""In which the loop may notice by itself that its Ray is lost."""
DRAIN_S: Final = 8.0
"""In which packs write their state before the dispatcher ends: less than its supervisor waits."""
EXIT_LOST: Final = 75
"""EX_TEMPFAIL: start it again."""


def new_owner() -> str:
    """Return a name that no other dispatcher has, ever."""
    return f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(6)}"


def _executor(settings: Settings) -> RayExecutor:
    """Start Ray or join it.

    Raises:
        SetupError: if it cannot be joined as it is set up.
    """
    # Here and not at the top: importing Ray takes a second and changes signal handlers.
    from workers.protocol import WorkerOptions
    from workers.ray_executor import RayExecutor

    checkpoints = settings.checkpoint_folder()
    options = WorkerOptions(
        memory=settings.worker_memory(),
        checkpoints=None if checkpoints is None else str(checkpoints),
        checkpoint_every=settings.checkpoint_every,
    )
    try:
        return RayExecutor(
            settings.ray_address, settings.slots, options, backlog=settings.backlog, gpus=settings.gpus
        )
    except CannotJoinError as error:
        raise SetupError(str(error)) from error
    except ConnectionError as error:
        # It may be on its way up, or come back.
        log.error("%s", error)
        os._exit(EXIT_LOST)
    except RuntimeError as error:
        raise SetupError(f"Ray on this machine: {error}") from error


def _check_database(engine: Engine) -> None:
    """Make sure that the database is this version's; if it is away, end so that the next one tries again.

    Raises:
        SetupError: if it is not.
    """
    try:
        schema.check(engine)
    except SetupError as error:
        if not (isinstance(error.__cause__, DBAPIError) and is_transient(error.__cause__)):
            raise
        log.error("%s", error)
        os._exit(EXIT_LOST)


def run(settings: Settings, owner: str) -> None:
    """Dispatch until SIGTERM or SIGINT, then let the packs write their state and give them back.

    Raises:
        SetupError: if the database or the cluster cannot be used.
    """
    stop, done = threading.Event(), threading.Event()
    engine = open_engine(settings.resolved_database_url())
    _check_database(engine)
    executor = _executor(settings)
    keeps_state = settings.checkpoint_folder() is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log.info("dispatcher %s on cluster %s", owner, executor.cluster)
    dispatcher = Dispatcher(engine, executor, owner, keeps_state=keeps_state)

    def watch() -> None:
        # A call into a Ray whose local node died can hang for ever: poll alone cannot be relied on to raise.
        while not done.wait(WATCH_EVERY_S):
            if problem := executor.problem():
                time.sleep(GRACE_S)
                log.error("%s; the call into Ray hangs", problem)
                _end_without_ray(dispatcher)

    threading.Thread(target=watch, name="watch-ray", daemon=True).start()
    try:
        while not stop.is_set():
            dispatcher.step(ROUND_S)
        dispatcher.close(DRAIN_S if keeps_state else 0.0)
    except ExecutorLostError as error:
        log.error("%s; this dispatcher ends, the next one starts afresh", error)
        _end_without_ray(dispatcher)
    except BaseException:
        dispatcher.close()
        raise
    done.set()
    executor.close()
    engine.dispose()


def _end_without_ray(dispatcher: Dispatcher) -> NoReturn:
    """Give the packs back and end at once: what Ray does at exit waits for a cluster that is not there."""
    try:
        dispatcher.abandon()
    except DBAPIError as error:
        log.error("its packs wait for their leases to run out: %s", error.orig)
    os._exit(EXIT_LOST)
