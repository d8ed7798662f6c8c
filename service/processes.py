"""The processes of one machine: the API, the dispatcher, and a supervisor over one of them or both.

The dispatcher is Ray's driver, which Ray itself ends when its head is lost. So it is a child: the supervisor
outlives it, takes back the leases that it held, and starts another.

A child reads from a pipe that the supervisor holds open. When the supervisor ends, however that happens, the
pipe closes and the child ends itself: nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from service.config import Settings, check_host
from service.db import schema
from service.db.engine import open_engine
from service.dispatch.loop import give_back
from service.dispatch.main import EXIT_LOST, new_owner
from service.errors import SetupError

log = logging.getLogger(__name__)

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 30.0
STEADY_S: Final = 60.0
"""A child that lived this long died of something new."""
QUICK_FAILURES: Final = 5
STOP_S: Final = 15.0


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """Return a bound socket, so that a port in use is known before anything starts.

    Raises:
        SetupError: if the port is taken or the host is not allowed.
    """
    check_host(host, settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"cannot listen on {host}:{port}: {reason}; --port chooses another") from error
    return bound


def prepare_database(settings: Settings, *, migrate: bool) -> Engine:
    """Make the home and open the database at this code's schema.

    Raises:
        SetupError: if either cannot be had.
    """
    settings.make_home()
    engine = open_engine(settings.resolved_database_url())
    if migrate:
        schema.upgrade(engine)
    schema.check(engine)
    return engine


def run_api(settings: Settings, bound: socket.socket) -> None:
    """Serve the API on a bound socket until SIGTERM or SIGINT."""
    import uvicorn

    from service.app import create_app

    config = uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[bound])


@dataclass(slots=True)
class Child:
    """A process that is started again when it dies.

    Attributes:
        arguments: makes the arguments of each start.
        died: called after each death, before the next start.
        inherited: file descriptors that it keeps.
    """

    name: str
    arguments: Callable[[], list[str]]
    died: Callable[[], None]
    inherited: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    deaths: int = 0
    failures: int = 0

    def start(self, lifeline: int) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "service.processes", *self.arguments(), str(lifeline)]
        self.process = subprocess.Popen(command, pass_fds=(*self.inherited, lifeline), start_new_session=True)
        self.started = time.monotonic()

    def look(self, lifeline: int) -> None:
        """Notice a death; start again once the delay is over.

        Raises:
            SetupError: if it keeps giving up as soon as it starts. One that is killed, or loses its Ray, is
                started again as often as that happens.
        """
        now = time.monotonic()
        if self.process is None:
            if now >= self.restart_at:
                self.start(lifeline)
            return
        code = self.process.poll()
        if code is None:
            return
        self._end_group()
        self.process = None
        if now - self.started > STEADY_S:
            self.deaths = self.failures = 0
        self.deaths += 1
        self.failures += code >= 0 and code != EXIT_LOST
        if self.failures >= QUICK_FAILURES:
            raise SetupError(f"the {self.name} ends as soon as it starts (exit {code}); see the lines above")
        log.warning("the %s ended with %d; starting it again", self.name, code)
        self.died()
        self.restart_at = now + min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (self.deaths - 1))

    def ask_to_stop(self) -> None:
        """Ask the process to end."""
        if self.process is not None:
            self.process.terminate()

    def stop(self) -> int:
        """Wait for the process to end, and then insist; return its exit code."""
        if self.process is None:
            return 0
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("the %s did not end in %d s; killed", self.name, STOP_S)
            self.process.kill()
            self.process.wait()
        self._end_group()
        return int(self.process.returncode)

    def _end_group(self) -> None:
        """End what the dead child has left: some of Ray's processes outlive a killed driver by a minute."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Runs a dispatcher, and perhaps the API, as children.

    Args:
        engine: gives back the leases of a dispatcher that died.
        bound: the API's socket; None runs no API.
    """

    def __init__(self, engine: Engine, bound: socket.socket | None) -> None:
        self.engine, self.owner = engine, ""
        self.children = [Child("dispatcher", self._dispatcher_arguments, self._dispatcher_died)]
        if bound is not None:
            port = bound.fileno()
            self.children.insert(0, Child("API", lambda: ["api", str(port)], lambda: None, (port,)))
        self._stop = threading.Event()

    def _dispatcher_arguments(self) -> list[str]:
        self.owner = new_owner()
        return ["dispatcher", self.owner]

    def _dispatcher_died(self) -> None:
        try:
            given_back = give_back(self.engine, self.owner)
        except DBAPIError as error:
            log.warning("its packs wait for their leases to run out: %s", error.orig)
        else:
            log.warning("%d packs of the dispatcher were put back into the queue", given_back)

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()

    def run(self) -> None:
        """Keep the children alive until `stop`; then end them.

        Raises:
            SetupError: if a child cannot be kept alive.
        """
        read_end, write_end = os.pipe()
        try:
            while not self._stop.is_set():
                for child in self.children:
                    child.look(read_end)
                self._stop.wait(0.2)
        finally:
            for child in self.children:
                child.ask_to_stop()
            for child in self.children:
                if child.stop() != 0:
                    child.died()
            for end in (read_end, write_end):
                os.close(end)


def follow_lifeline(lifeline: int) -> None:
    """End this process when the supervisor's end of the pipe closes."""

    def wait() -> None:
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def configure_logging() -> None:
    """Log to standard error, one line an event."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for chatty in ("alembic", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def main(arguments: list[str]) -> int:
    """Run as a child: `api FD LIFELINE` or `dispatcher OWNER LIFELINE`."""
    role, what, lifeline = arguments
    configure_logging()
    follow_lifeline(int(lifeline))
    settings = Settings()
    try:
        if role == "api":
            run_api(settings, socket.socket(fileno=int(what)))
        else:
            from service.dispatch import main as dispatcher

            dispatcher.run(settings, what)
    except SetupError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
