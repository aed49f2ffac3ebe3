"""The budget of a pool on the devices of this machine, and sizes that name no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from orchestrator.pool.values import AUTO, Memory
from orchestrator.server.devices import Device
from orchestrator.settings.memory import HOST

_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})


def on_devices(memory: Memory, devices: Sequence[Device]) -> dict[str, int]:
    """Return MiB by device; a plain figure is of the first GPU, else of the host."""
    if isinstance(memory, Mapping):
        return dict(memory)
    gpus = [device.name for device in devices if device.name != HOST]
    return {(gpus or [HOST])[0]: memory}


def budget_of(
    memory: Memory | Literal["auto"],
    headroom: int,
    devices: Sequence[Device],
    held: Mapping[str, int] = _NOTHING,
) -> dict[str, int]:
    """Return the budget of each device in MiB.

    Args:
        memory: As in `[pool]`; a device that it leaves out has what is free.
        headroom: MiB that stay free on a device with what is free.
        held: MiB by device of servers that are running and count as free.
    """
    free = {one.name: max(0, one.free_mib + held.get(one.name, 0) - headroom) for one in devices}
    return free if memory == AUTO else free | on_devices(memory, devices)
