"""What a server takes of the memory of each device, and how that is known.

A figure is `declared` by the catalogue of a pool, `exact` (the server's own) or an `estimate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from orchestrator.base.record import Record, parsed

HOST: Final = "Host"
"""The device that every machine has; llama.cpp names the others, such as `CUDA0`."""

Source = Literal["declared", "exact", "estimate"]


def total(*parts: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of some figures in MiB by device: the host first, then the others by name."""
    sums: dict[str, int] = {}
    for part in parts:
        for device, mib in part.items():
            sums[device] = sums.get(device, 0) + mib
    return {device: sums[device] for device in sorted(sums, key=lambda d: (d != HOST, d))}


@dataclass(frozen=True, slots=True)
class Memory(Record):
    """The memory of a server, in all and by device.

    `as_dict` leaves out a `server_mib` that is not known, and `fitted` unless it is true.

    Attributes:
        mib: The sum of `devices`.
        source: How it is known.
        devices: MiB by device. An exact figure is the server's own, and what that leaves out: the
            projector and the prompt cache.
        server_mib: The server's own figure; None if it has printed none.
        fitted: The server has reduced its context to fit into the memory.
    """

    mib: int
    source: Source
    devices: dict[str, int] = field(hash=False)
    server_mib: int | None = None
    fitted: bool = False

    @classmethod
    def of(cls, source: Source, *parts: Mapping[str, int], **about: Any) -> Self:
        """Return the memory that some parts take together."""
        devices = total(*parts)
        return cls(sum(devices.values()), source, devices, **about)

    def as_dict(self) -> dict[str, Any]:
        members = Record.as_dict(self)
        return {n: value for n, value in members.items() if value != _OMITTED.get(n, _SENT)}

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        return parsed(cls, {**_OMITTED, **members})


_SENT: Final = object()
_OMITTED: Final = {"server_mib": None, "fitted": False}
