"""What packs are planned for."""

from __future__ import annotations

from dataclasses import dataclass

from workers.protocol import DeviceKind


@dataclass(frozen=True, slots=True)
class Device:
    """A device, or the CPUs of a machine.

    Attributes:
        kind: `cpu`, where packs train beside each other, one on each core; or `gpu`, where large ones take
            turns.
        cores: of a CPU; 1 for a GPU.
        memory: bytes that training may take, of all packs at once.
    """

    kind: DeviceKind = "cpu"
    cores: int = 2
    memory: int = 4 * 2**30

    @property
    def slots(self) -> int:
        """Packs at once: on a CPU one a core; a GPU is full with one, since large packs fill it."""
        return self.cores if self.kind == "cpu" else 1

    @property
    def slot_memory(self) -> int:
        """Bytes that one pack may take."""
        return self.memory // self.slots
