"""Settings, all from the environment (`DDPSWEEP_…`)."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Final

from platformdirs import user_data_path
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL

from service.errors import SetupError
from service.sweeps.device import Device
from workers.protocol import DeviceKind

DEFAULT_PORT: Final = 8321
MAX_BODY_BYTES: Final = 4 * 2**20
MEMORY_SHARE: Final = 0.75


class Settings(BaseSettings):
    """What an operator can set.

    Attributes:
        url: where the client finds the service.
        home: folder of the embedded database and of the logs.
        database_url: SQLAlchemy URL; the default is SQLite in `home`.
        ray_address: of a Ray cluster to join; unset starts a private one.
        slots: packs at once on a private Ray; unset takes every CPU. Packs are planned for as many.
        pack_memory: bytes that a pack may take. Unset, packs are planned for a slot's share of three quarters
            of what this machine has; workers of a private Ray take no more, those of a cluster what there is.
        gpus: of this machine; with any, a private Ray trains on these alone, and packs are planned for them.
        gpu_memory: bytes of each GPU; packs for GPUs are planned for three quarters of them.
        backlog: packs that wait in Ray beyond the devices, so that an autoscaler sees demand.
        checkpoints: folder that all workers see, where packs that train for long keep their state; unset is
            one in `home` with a private Ray, and none on a cluster.
        checkpoint_every: seconds of training between two of these.
        allowed_hosts: names under which the server may be addressed, with commas between them. Without
            authentication, a page elsewhere must not reach it under a name of its own (DNS rebinding).
        allow_unauthenticated: lets the server listen beyond loopback although anyone who reaches it may
            use it; for a trusted proxy or a container network in front.
    """

    model_config = SettingsConfigDict(env_prefix="DDPSWEEP_", extra="ignore", env_ignore_empty=True)

    url: str = f"http://127.0.0.1:{DEFAULT_PORT}"
    home: Path = Field(default_factory=lambda: user_data_path("ddpsweep"))
    database_url: SecretStr | None = None
    ray_address: str | None = None
    slots: int | None = Field(default=None, ge=1, le=10_000)
    pack_memory: int | None = Field(default=None, ge=64 * 2**20)
    gpus: int = Field(default=0, ge=0, le=1000)
    gpu_memory: int = Field(default=16 * 2**30, ge=2**30)
    backlog: int = Field(default=0, ge=0, le=1000)
    checkpoints: Path | None = None
    checkpoint_every: float = Field(default=60.0, gt=0)
    allow_unauthenticated: bool = False
    allowed_hosts: str = "127.0.0.1,localhost,[::1]"

    def resolved_database_url(self) -> str | URL:
        """Return the database's URL with its password in it: for the engine, never for a log."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        # Not pasted into a string: a path may have % or ? in it.
        return URL.create("sqlite", database=str(self.home.expanduser().resolve() / "ddpsweep.db"))

    def machine(self) -> Device:
        """Return what packs are planned for: this machine's CPUs, unless something else is set."""
        slots = self.slots or os.cpu_count() or 1
        if self.pack_memory is not None:
            return Device("cpu", slots, slots * self.pack_memory)
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", slots, int(MEMORY_SHARE * physical))

    def device_for(self, kind: DeviceKind | None) -> Device:
        """Return what the packs of a sweep are planned for that asks for a kind of device, or for none."""
        if kind is None:
            kind = "gpu" if self.gpus and not self.ray_address else "cpu"
        return Device("gpu", 1, int(MEMORY_SHARE * self.gpu_memory)) if kind == "gpu" else self.machine()

    def worker_memory(self) -> int | None:
        """Return the bytes that a worker's training may take; None does not limit it."""
        if self.ray_address and self.pack_memory is None:
            return None  # this machine says nothing about the cluster's
        return self.machine().slot_memory

    def checkpoint_folder(self) -> Path | None:
        """Return where workers keep the state of packs; None if they do not."""
        if self.checkpoints is not None:
            return self.checkpoints.expanduser().resolve()
        return None if self.ray_address else self.home.expanduser().resolve() / "checkpoints"

    def make_home(self) -> Path:
        """Create the home folder, readable by this user alone.

        Raises:
            SetupError: if it cannot be created or written.
        """
        home = self.home.expanduser()
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = home / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SetupError(f"DDPSWEEP_HOME {home} cannot be written: {error.strerror or error}") from error
        return home


def check_host(host: str, settings: Settings) -> None:
    """Refuse to listen where strangers could use the service without authentication.

    Raises:
        SetupError: if the host is not a loopback address.
    """
    if settings.allow_unauthenticated or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SetupError(
            f"--host {host}: there is no authentication, so the server listens on loopback only "
            "(127.0.0.1, ::1); DDPSWEEP_ALLOW_UNAUTHENTICATED=1 says that something in front protects it"
        )
