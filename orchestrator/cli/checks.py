"""What `doctor` looks at, one check a thing.

A check only looks: it yields what it found, and what to do about it where something is wrong. What
limits models but not the program (no GPU, no Hub, little memory) is a note; with a model named,
what that model cannot do without is a problem.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from orchestrator.errors import OrchestratorError, SlotOwned
from orchestrator.models.hub import cache
from orchestrator.models.variants import Variant
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.server import process_table
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.slot import Slot, cache_dir
from orchestrator.settings.reference import split_reference

_OLDEST: Final = (3, 11)
_GIB: Final = 1 << 30
_VERSION_WAIT_S: Final = 20.0
_HUB_WAIT_S: Final = 5.0
_GPU_TOOLS: Final = ("nvidia-smi", "rocm-smi")
_FLAGS: Final = (
    *("--model", "--host", "--port", "--ctx-size", "--parallel", "--cache-type-k"),
    *("--cache-type-v", "--mmproj", "--jinja", "--chat-template-file"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """What was found about one thing; `remedy` says what to do about it."""

    name: str
    verdict: Literal["ok", "note", "problem"]
    detail: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the machine is to be used for."""

    llama_server: str
    slot: str
    state_dir: str | None
    port: int
    model: str | None = None


def _python(_: Wanted) -> Iterator[Check]:
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < _OLDEST:
        yield Check("python", "problem", detail, "use Python 3.11 or newer")
    else:
        yield Check("python", "ok", detail)


def _platform(_: Wanted) -> Iterator[Check]:
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if process_table.LINUX:
        yield Check("platform", "ok", name)
    elif os.name == "posix":
        yield Check("platform", "note", name, "only Linux is tested so far")
    else:
        yield Check("platform", "problem", name, "use Linux, or WSL")


def _server(wanted: Wanted) -> Iterator[Check]:
    try:
        binary = find_server(wanted.llama_server)
    except OrchestratorError as error:
        remedy = 'give --llama-server PATH, or pip install "llama-orchestrator[embedded]"'
        yield Check("llama-server", "problem", error.message, remedy)
        return
    where = binary.identity.path if binary.kind == "external" else "xllamacpp, embedded"
    try:
        version = _version(binary.command)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "run it by hand: a library may be missing, or it is built for another machine"
        yield Check("llama-server", "problem", f"{where} does not run: {error}", remedy)
        return
    yield Check("llama-server", "ok", f"{where}  {version}")
    catalogue = ask_catalogue(binary, cache_dir(wanted.state_dir))
    if catalogue is None:
        yield Check("server flags", "note", "its --help cannot be read: no flag is ruled out")
    elif lacks := [flag for flag in _FLAGS if not catalogue.has(flag)]:
        detail = f"it is too old: it does not have {', '.join(lacks)}"
        yield Check("server flags", "problem", detail, "use a newer build of llama.cpp")
    else:
        yield Check("server flags", "ok", "it has every flag that settings are made of")


def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [*command, "--version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_VERSION_WAIT_S,
        check=True,
    )
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]
    return next((line for line in lines if "version" in line.lower()), "version unknown")


def _embedded(_: Wanted) -> Iterator[Check]:
    if importlib.util.find_spec("xllamacpp") is not None:
        yield Check("embedded", "ok", "xllamacpp is installed")
    else:
        remedy = 'for a server without a binary: pip install "llama-orchestrator[embedded]"'
        yield Check("embedded", "note", "xllamacpp is not installed", remedy)


def _slot(wanted: Wanted) -> Iterator[Check]:
    try:
        slot = Slot(wanted.slot, wanted.state_dir)
    except OrchestratorError as error:
        yield Check("state dir", "problem", error.message, "give --state-dir, or mend the folder")
        return
    root = slot.directory.parent
    free = shutil.disk_usage(root).free
    yield Check("state dir", "ok", f"{root} is writable")
    yield _amount("disk", free, f"free beside {root}", few=0.2, little=0.5)
    try:
        slot.claim()
    except SlotOwned as error:
        yield Check("slot", "note", error.message)
        return
    except OrchestratorError as error:
        yield Check("slot", "problem", error.message, "mend the folder")
        return
    yield _content_of(slot)
    slot.release()


def _content_of(slot: Slot) -> Check:
    """Say what a dead owner left in a slot that is ours for the moment."""
    record = slot.recall()
    left = {process.pid for process in slot.inhabitants()}
    server = record.server if record is not None else None
    if server is not None and process_table.is_alive(server):
        left.add(server.pid)
    if left:
        detail = f"{slot.name!r} is free, but a dead owner left {sorted(left)}"
        return Check("slot", "note", detail, "the next start ends them")
    if slot.record_path.exists():
        whose = f"of process {server.pid}, which is gone" if server else "that names no server"
        detail = f"{slot.name!r} is free, with a stale record {whose}"
        return Check("slot", "note", detail, "nothing: the next start removes it")
    return Check("slot", "ok", f"{slot.name!r} is free and empty")


def _kernel(_: Wanted) -> Iterator[Check]:
    try:
        os.close(os.pidfd_open(os.getpid()))
        yield Check("pidfd", "ok", "processes can be pinned")
    except (AttributeError, OSError):
        yield Check("pidfd", "note", "not available", "Linux 5.3 has it; exits are polled for")
    try:
        with tempfile.TemporaryFile() as one:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Check("flock", "ok", "files can be locked")
    except OSError as error:
        yield Check("flock", "problem", f"not available: {error}", "use a local file system")
    if process_table.identify(os.getpid()) is not None and process_table.boot_id():
        yield Check("proc", "ok", "the process table can be read")
    else:
        yield Check("proc", "problem", "the process table cannot be read", "mount /proc")


def _memory(_: Wanted) -> Iterator[Check]:
    available = _available_bytes()
    if available is None:
        yield Check("memory", "note", "cannot be told")
    else:
        yield _amount("memory", available, "available", few=0.25, little=2.0)


def _available_bytes() -> int | None:
    """Return the memory that a server may have; a container's limit counts, if it has one."""
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        (group,) = (
            line[3:]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line[:3] == "0::"
        )
        limit = int(Path(f"/sys/fs/cgroup{group}/memory.max").read_text())
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return kib * 1024
    return min(kib * 1024, limit)


def _amount(name: str, count_bytes: int, what: str, *, few: float, little: float) -> Check:
    """Judge an amount in GiB: hardly anything runs with `few`, only small models with `little`."""
    gib = count_bytes / _GIB
    detail = f"{gib:,.1f} GiB {what}"
    if gib < few:
        return Check(name, "problem", detail, "free some: not even a small model fits")
    if gib < little:
        return Check(name, "note", detail, "enough for small models only")
    return Check(name, "ok", detail)


def _gpu(_: Wanted) -> Iterator[Check]:
    if found := _gpu_tool():
        yield Check("gpu", "ok", f"{found} is there to ask")
        return
    remedy = "with a GPU: install its driver with its tools, and a llama-server built for it"
    yield Check("gpu", "note", f"no {' or '.join(_GPU_TOOLS)}: models run on the CPU", remedy)


def _gpu_tool() -> str | None:
    return next(filter(None, map(shutil.which, _GPU_TOOLS)), None)


def _hub(_: Wanted) -> Iterator[Check]:
    folder = cache.directory()
    yield _amount("model cache", _free_bytes(folder), f"free for {folder}", few=0.2, little=5.0)
    if cache.is_offline():
        detail = "HF_HUB_OFFLINE is set: only what is in the cache is loaded"
        yield Check("hub", "note", detail, "unset it to download")
        return
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        asked = urllib.request.Request(hub, method="HEAD")  # noqa: S310 (whatever the user has set)
        urllib.request.urlopen(asked, timeout=_HUB_WAIT_S).close()  # noqa: S310
    except urllib.error.HTTPError as error:  # it is there, and answers as it likes
        error.close()
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        remedy = "check network and proxy; what is in the cache or on disk is loaded without it"
        yield Check("hub", "note", f"{hub} cannot be reached: {why}", remedy)
        return
    yield Check("hub", "ok", f"{hub} answers")


def _free_bytes(folder: Path) -> int:
    """Return what is free where a folder is, or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _model(wanted: Wanted) -> Iterator[Check]:
    if wanted.model is None:
        return
    looking = Orchestrator(state_dir=wanted.state_dir)  # claims nothing for a listing
    try:
        found = looking.variants(wanted.model).variants
    except OrchestratorError as error:
        yield Check("model", "problem", error.message, f"it would fail with {error.category}")
        return
    finally:
        looking.close()
    _, label = split_reference(wanted.model) or (None, None)
    meant = (
        one
        for one in found
        if (one.is_default if label is None else (one.gguf_variant or "").lower() == label.lower())
    )
    if (model := next(meant, None)) is not None:
        yield _fit(model)
        return
    whole = ", ".join(str(one.gguf_variant) for one in found)
    if label is None:
        detail = f"{wanted.model}: parts of what a load would take are missing"
        yield Check("model", "problem", detail, f"name one that is whole: {whole}")
    else:  # a load also takes other names for a variant than the shortest one
        detail = f"{wanted.model}: {label} is not listed so: whether it fits cannot be told"
        yield Check("model", "note", detail, f"name it as it is listed: {whole}")


def _fit(model: Variant) -> Check:
    """Say whether a model fits where it has to."""
    size, free = model.size_bytes, _free_bytes(cache.directory())
    shown = f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / (1 << 20):,.1f} MiB"
    detail = f"{model.gguf_variant or 'it'} has {shown}"
    if not model.is_cached and size > free:
        remedy = "free some, move the cache (HF_HUB_CACHE), or choose a smaller variant"
        return Check("model", "problem", f"{detail}, {free / _GIB:,.1f} GiB of disk free", remedy)
    memory = _available_bytes()
    if memory is not None and size > memory:
        detail += f", {memory / _GIB:,.1f} GiB of memory available"
        remedy = "choose a smaller variant, or free memory"
        return Check("model", "note" if _gpu_tool() else "problem", detail, remedy)
    return Check("model", "ok", f"{detail}, and fits")


def _port(wanted: Wanted) -> Iterator[Check]:
    try:
        socket.create_server(("127.0.0.1", wanted.port)).close()
    except OSError as error:
        detail = f"127.0.0.1:{wanted.port} cannot be had: {error.strerror}"
        remedy = "stop what has it, or serve with --port 0"
        is_used = error.errno == errno.EADDRINUSE
        yield Check(
            "port", "note" if is_used and _is_ours(wanted.port) else "problem", detail, remedy
        )
    else:
        yield Check("port", "ok", f"127.0.0.1:{wanted.port} is free")


def _is_ours(port: int) -> bool:
    """Does an orchestrator serve there already?"""
    from orchestrator.cli.client import Remote
    from orchestrator.cli.output import Failure

    try:
        url = f"http://127.0.0.1:{port}"
        return Remote(url, None, as_json=True).call("GET", "/healthz", timeout_s=2.0) == {
            "status": "alive"
        }
    except Failure:
        return False


CHECKS: Final[tuple[Callable[[Wanted], Iterator[Check]], ...]] = (
    *(_python, _platform, _server, _embedded, _slot, _kernel, _memory, _gpu, _port, _hub, _model),
)
