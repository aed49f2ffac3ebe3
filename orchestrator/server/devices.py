"""What memory this machine has for models, and where a model's need of it would lie.

The host's is read by us: a server that was built without GPUs takes all memory for free. That of
the GPUs is what the binary itself lists, in the environment that it would be started in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from orchestrator.base.log import event_log
from orchestrator.base.record import Record
from orchestrator.models.estimate import Estimate
from orchestrator.server import memory
from orchestrator.server.binaries import run
from orchestrator.settings.files import FileIdentity
from orchestrator.settings.memory import HOST
from orchestrator.settings.resources import resources_of
from orchestrator.settings.target import ServerBinary, Target

_FLAG: Final = "--list-devices"
_HEADING: Final = "Available devices:"
_LINE: Final = re.compile(r" +(\S+): .*\((\d{1,9}) MiB, (\d{1,9}) MiB free\)\s*", re.ASCII)
_MAX_DEVICES: Final = 64
_ASK_AGAIN_S: Final = 60.0
_log = event_log("orchestrator.server")


@dataclass(frozen=True, slots=True)
class Device(Record):
    """Memory of one kind, in MiB.

    Attributes:
        name: `Host`, or as the server calls it, e.g. `CUDA0`.
    """

    name: str
    total_mib: int
    free_mib: int


_without_gpu: set[FileIdentity] = set()
_ask_after: dict[FileIdentity, float] = {}


def devices(server: ServerBinary, root: Path = Path("/")) -> tuple[Device, ...]:
    """Return the host and then the GPUs that a server would use, with what is free of them now.

    Runs the binary for at most 10 s, if its help lists the flag for that; once only where it has no
    GPU, and after an inconclusive answer at most once a minute.

    Args:
        server: With its `catalogue`.
        root: Where `proc` and `sys` are mounted.
    """
    return (_host(root), *_gpus(server))


def _host(root: Path) -> Device:
    total, free = memory.total_and_available_bytes(root)
    if total is None or free is None:  # no Linux
        found = psutil.virtual_memory()
        total, free = found.total, found.available
    return Device(HOST, total >> 20, min(total, free) >> 20)


def _gpus(server: ServerBinary) -> tuple[Device, ...]:
    identity = server.identity
    if server.catalogue is None or not server.catalogue.has(_FLAG) or identity in _without_gpu:
        return ()
    if time.monotonic() < _ask_after.get(identity, 0.0):
        return ()
    try:
        returncode, text = run((*server.command, _FLAG), server.kind)
        why = f"exit status {returncode}"
    except (OSError, ValueError) as error:
        returncode, text, why = -1, "", str(error)
    if returncode != 0 or _HEADING not in text:
        _log("warning", "devices.inconclusive", server=server.command[0], reason=why)
        _ask_after[identity] = time.monotonic() + _ASK_AGAIN_S
        return ()
    found = tuple({gpu.name: gpu for gpu in _listed(text)}.values())
    if not found:
        _without_gpu.add(identity)
    return found


def _listed(text: str) -> Iterator[Device]:
    """Yield the devices with a memory of their own: some libraries list themselves with none."""
    for line in text.partition(_HEADING)[2].splitlines()[:_MAX_DEVICES]:
        if (found := _LINE.fullmatch(line)) is not None and found[1] != HOST:
            total, free = int(found[2]), int(found[3])
            if total > 0:
                yield Device(found[1], total, min(total, free))


def spread(estimate: Estimate, devices: Sequence[Device], target: Target) -> dict[str, int]:
    """Return how many MiB of an estimate lie on each device: on the GPUs in proportion to what is
    free there, which is the server's default, and on the host what does not fit or always is there.

    Args:
        devices: As `devices` returns them.
        target: What to run; its extra args may choose devices.
    """
    asked, gpus = resources_of(target), {gpu.name: gpu for gpu in devices if gpu.name != HOST}
    names = gpus if asked.devices is None else dict.fromkeys(asked.devices)
    used = [gpus[name] for name in names if name in gpus]
    used = used[:1] if asked.is_on_one_gpu else used
    free = sum(gpu.free_mib for gpu in used)
    left = min(estimate.server_mib, free)
    shares = {HOST: estimate.total_mib - left, **dict.fromkeys(gpus, 0)}
    for gpu in used:
        if free > 0:  # the last one takes the rest, so nothing is lost by rounding
            shares[gpu.name] = left * gpu.free_mib // free
            left, free = left - shares[gpu.name], free - gpu.free_mib
    return shares
