"""What a server takes of the memory of each device, and how that is known.

A figure is `declared` by the catalogue of a pool, `exact` (the server's own) or an `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from orchestrator.base.record import Record, parsed

HOST: Final = "Host"
"""The device that every machine has; llama.cpp names the others, such as `CUDA0`."""

Source = Literal["declared", "exact", "estimate"]
Devices = tuple[tuple[str, int], ...]
"""MiB by device, the host first, then in order of their names."""


def devices_of(mib: Mapping[str, int]) -> Devices:
    """Return the devices of which anything is taken."""
    return tuple(sorted(((n, m) for n, m in mib.items() if m), key=lambda d: (d[0] != HOST, d)))


def total(*parts: Iterable[tuple[str, int]]) -> Devices:
    """Return the sum of some figures, by device."""
    sums: dict[str, int] = {}
    for part in parts:
        for name, mib in part:
            sums[name] = sums.get(name, 0) + mib
    return devices_of(sums)


@dataclass(frozen=True, slots=True)
class Memory(Record):
    """The memory of a server, in all and by device.

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
    devices: Devices
    server_mib: int | None = None
    fitted: bool = False

    @classmethod
    def of(
        cls,
        source: Source,
        devices: Devices,
        *,
        server_mib: int | None = None,
        fitted: bool = False,
    ) -> Self:
        return cls(sum(mib for _, mib in devices), source, devices, server_mib, fitted)

    def as_dict(self) -> dict[str, Any]:
        members = {**Record.as_dict(self), "devices": dict(self.devices)}
        return {n: v for n, v in members.items() if v != _OMITTED.get(n, _SENT)}

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        devices = devices_of({str(name): int(mib) for name, mib in members["devices"].items()})
        others = {**members, "mib": sum(mib for _, mib in devices), "devices": []}
        return replace(parsed(cls, others), devices=devices)


_SENT: Final = object()
_OMITTED: Final = {"server_mib": None, "fitted": False}
