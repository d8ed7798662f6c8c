"""Start a private Ray or join a cluster, and know what becomes of it. Whoever wants Ray has it from here."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# Ray reads these when it is imported, so they come first. RAY_AUTH_MODE: without a token, anyone who reaches
# a Ray port runs code there.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from workers import gcs
from workers.placement import Cluster, cluster_of
from workers.protocol import CannotJoinError, ExecutorLostError

__all__ = ["Probe", "join", "ray", "start_private"]

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 256 * 2**20
"""Results are small; the default of a third of the memory would be taken from training."""

PROBE_EVERY_S: Final = 2.0
SILENCE_S: Final = 12.0
NOTICE_S: Final = 5.0

SECRETS: Final = ("DDPSWEEP_", "PG", "POSTGRES_")
"""How variables begin that are none of Ray's business: workers inherit the environment of its processes."""
NO_SECRETS: Final = frozenset({"DDPSWEEP_DATA", "DDPSWEEP_LANES"})

LOOPBACK: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for machines that cannot be part of a cluster. Off, all its ports are bound to 127.0.0.1."""

COMMON: Final[dict[str, Any]] = {
    "log_to_driver": False,
    "logging_level": logging.WARNING,
    "namespace": "ddpsweep",
}


@contextmanager
def _private_environment() -> Iterator[None]:
    """Start Ray's processes without secrets, and with files that only this user reads."""
    secret = {name for name in os.environ if name.startswith(SECRETS)} - NO_SECRETS
    hidden = {name: os.environ.pop(name) for name in secret}
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
        os.environ.update(hidden)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Bind what Ray starts to 127.0.0.1.

    The driver has read the switch when Ray was imported, before anyone knew whether to start a Ray or to join
    one; its processes read it for themselves.
    """
    variable, constant = os.environ.get(LOOPBACK), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[LOOPBACK]
        else:
            os.environ[LOOPBACK] = variable


def start_private(slots: int | None, gpus: int) -> str:
    """Start a Ray on this machine that ends with this process, however that ends; return its name."""
    # Its token lives in this process tree alone.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with _private_environment(), _on_loopback():
        # address="local" and not None: a connected process elsewhere can make None join its cluster.
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=slots,
            num_gpus=gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            **COMMON,
        )
    return f"private-{secrets.token_hex(8)}"


def join(address: str) -> str:
    """Join the cluster at `host:port`; return its name, which no other has.

    Raises:
        ConnectionError: if that is not possible, in one line that says what to do; a `CannotJoinError` if
            asking again would not help.
    """
    gcs.check(address)
    try:
        with _private_environment():
            ray.init(address=address, **COMMON)
        name: str = ray.get_runtime_context().get_session_name()
    except (RayError, RuntimeError, OSError, ValueError) as error:
        ray.shutdown()
        raise _refusal(address, error) from error
    return name


def _refusal(address: str, error: Exception) -> ConnectionError:
    said = f"the Ray cluster at {address} cannot be joined: " + " ".join(str(error).split())[:500]
    if "ersion mismatch" in said:
        return CannotJoinError(f"{said}; install the same Ray and Python here as on its nodes")
    return ConnectionError(said)


class Probe:
    """Asks the cluster now and then for its nodes, and whether this process's node is still one of them.

    In a thread, since the question itself hangs for a minute when the head is gone.
    """

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._answered = time.monotonic()
        self._alive = True
        self._stopped = threading.Event()
        self.cluster = Cluster((), {})
        self._look()
        self._raylet = next(node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == self._node)
        threading.Thread(target=self._ask, name="ray-probe", daemon=True).start()

    def _look(self) -> None:
        self.cluster = cluster_of(ray.nodes())
        self._alive = self._node in self.cluster.labels
        self._answered = time.monotonic()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _ask(self) -> None:
        while self._alive and not self._stopped.wait(PROBE_EVERY_S):
            try:
                self._look()
            except Exception as error:
                log.warning("the Ray cluster does not answer: %r", error)

    def problem(self) -> str | None:
        """Say why the cluster is lost; None while it is not. Never blocks."""
        if not self._alive:
            return "this node is no longer part of the Ray cluster"
        if time.monotonic() - self._answered > SILENCE_S:
            return f"the Ray cluster has not answered for {SILENCE_S:.0f} s"
        return None

    def check(self, *, after_a_loss: bool = False) -> None:
        """Make sure that the cluster answers.

        Args:
            after_a_loss: wait until Ray has had the time to notice that the whole node is gone.

        Raises:
            ExecutorLostError: if it does not.
        """
        if after_a_loss and self._raylet_is_gone():
            # Ray itself needs longer to notice on a busy machine, and the loss would count as the packs' own.
            raise ExecutorLostError("the raylet of this node has died")
        until = time.monotonic() + (NOTICE_S if after_a_loss else 0.0)
        while True:
            if problem := self.problem():
                raise ExecutorLostError(problem)
            if time.monotonic() >= until:
                return
            time.sleep(0.2)

    def _raylet_is_gone(self) -> bool:
        """Tell whether nobody listens any more where this process's raylet did; it is on this machine."""
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.settimeout(1.0)
            try:
                knocking.connect(self._raylet)
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            except OSError:  # busy
                return False
        return False
