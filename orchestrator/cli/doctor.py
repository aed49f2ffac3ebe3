"""`doctor`: what this machine lacks to run llama-orchestrator, and what to do about it.

A check yields what it found: ok, a note, or a problem with its remedy. What limits the models but
not the program (no GPU, no Hub, little memory) is a note; for a given model, whatever it cannot run
without is a problem. Both name the page of the documentation that helps. Checks start no server and
create nothing but the slot's folder.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click

from orchestrator.base import launch
from orchestrator.cli import config, logs, options
from orchestrator.cli.output import byte_text, mib_text, say, say_json
from orchestrator.errors import (
    CacheDirError,
    OrchestratorError,
    SlotOwned,
    StateDirError,
)
from orchestrator.machine.plan import Plan
from orchestrator.models.hub import cache
from orchestrator.models.variants import Variant
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.runtime.service import Exchange, Service
from orchestrator.server import memory, process_table
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.environment import inherited_environment
from orchestrator.server.gpu_memory import TOOLS
from orchestrator.server.slot import Slot
from orchestrator.server.state_dir import cache_dir
from orchestrator.server.tree import can_listen, process
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary

_MARKS: Final = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "bold red")}
_GIB: Final = 1 << 30
_VERSION_TIMEOUT_S: Final = 20.0
_HUB_TIMEOUT_S: Final = 5.0
_INITS: Final = frozenset({"systemd", "init", "launchd", "runit", "s6-svscan", "openrc-init"})
_GPU_TOOLS: Final = tuple(tool for tool, *_ in TOOLS)
_FLAGS: Final = (
    *("--model", "--host", "--port", "--ctx-size", "--parallel", "--cache-type-k"),
    *("--cache-type-v", "--mmproj", "--jinja", "--chat-template-file"),
)
_SERVER_PAGE: Final = "docs/how-to/llama-server.md"
_SLOT_PAGE: Final = "docs/process-slot.md"
_EMPTY_PAGE: Final = f"{_SLOT_PAGE}#when-is-it-empty"
PAGES: Final = {
    "platform": "README.md#where-it-runs",
    "llama-server": _SERVER_PAGE,
    "server flags": _SERVER_PAGE,
    "embedded": _SERVER_PAGE,
    "state dir": _SLOT_PAGE,
    "disk": _SLOT_PAGE,
    "slot": "docs/how-to/workers.md",
    "keep": "docs/how-to/restarts.md",
    "pidfd": _EMPTY_PAGE,
    "flock": _EMPTY_PAGE,
    "proc": _EMPTY_PAGE,
    "memory": "docs/models.md#which-files",
    "gpu": "docs/how-to/gpu.md",
    "port": "docs/configuration.md#settings",
    "model cache": "docs/models.md#downloading",
    "hub": "docs/how-to/offline.md",
    "model": "docs/models.md#memory",
}
"""By the name of a check, the page that helps with what it found."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; `remedy` says what to do about it."""

    name: str
    verdict: Literal["ok", "note", "problem"]
    detail: str
    remedy: str | None = None

    @property
    def page(self) -> str | None:
        """The page that helps, unless all is well."""
        return None if self.verdict == "ok" else PAGES[self.name]


@dataclass(frozen=True, slots=True)
class Intent:
    """What `serve` would be started with."""

    llama_server: str
    slot: str
    state_dir: str | None
    port: int
    model: str | None


def _platform(_: Intent) -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if process_table.LINUX:
        yield Check("platform", "ok", name)
    else:
        seen = "tested under Wine, not on Windows" if sys.platform == "win32" else "never tested"
        yield Check("platform", "note", f"{name}, {seen}", "use Linux where it matters")


def _server(intent: Intent) -> Iterator[Check]:
    try:
        binary = find_server(intent.llama_server)
    except OrchestratorError as error:
        remedy = 'give --llama-server PATH, or pip install "llama-orchestrator[embedded]"'
        yield Check("llama-server", "problem", error.message, remedy)
        return
    where = binary.identity.path if binary.kind == "external" else "xllamacpp, embedded"
    try:
        version = _version(binary)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "run it by hand: a library may be missing, or it is built for another machine"
        yield Check("llama-server", "problem", f"{where} does not run: {error}", remedy)
        return
    yield Check("llama-server", "ok", f"{where}  {version}")
    try:
        catalogue = ask_catalogue(binary, cache_dir(intent.state_dir))
    except StateDirError:  # reported with the slot
        return
    if catalogue is None:
        yield Check("server flags", "note", "its --help cannot be read: flags are not checked")
    elif missing := [flag for flag in _FLAGS if not catalogue.has(flag)]:
        detail = f"it is too old and lacks {', '.join(missing)}"
        yield Check("server flags", "problem", detail, "use a newer build of llama.cpp")
    else:
        yield Check("server flags", "ok", "it has every flag that the settings use")


def _version(binary: ServerBinary) -> str:
    done = subprocess.run(
        [*binary.command, "--version"],
        env={**os.environ, **inherited_environment(binary.kind)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_VERSION_TIMEOUT_S,
        check=True,
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if "version" in line.lower()), "version unknown")


def _embedded(_: Intent) -> Iterator[Check]:
    if importlib.util.find_spec("xllamacpp") is not None:
        yield Check("embedded", "ok", "xllamacpp is installed")
    else:
        remedy = 'for a server without a binary: pip install "llama-orchestrator[embedded]"'
        yield Check("embedded", "note", "xllamacpp is not installed", remedy)


def _slot(intent: Intent) -> Iterator[Check]:
    try:
        slot = Slot(intent.slot, intent.state_dir)
    except OrchestratorError as error:
        yield Check("state dir", "problem", error.message, "give another --state-dir")
        return
    root = slot.directory.parent
    yield Check("state dir", "ok", f"{root} is writable")
    free = shutil.disk_usage(root).free
    yield _amount("disk", free, f"free at {root}", problem_gib=0.2, note_gib=0.5)
    try:
        slot.claim()
    except SlotOwned as error:
        yield Check("slot", "note", error.message)
        return
    except OrchestratorError as error:
        yield Check("slot", "problem", error.message, "check the folder's permissions")
        return
    yield _leftovers(slot)
    slot.release()


def _leftovers(slot: Slot) -> Check:
    """Report what a dead owner left in a slot that we have claimed."""
    server = slot.recall()
    left = {process.pid for process in slot.inhabitants()}
    if left:
        detail = f"{slot.name!r} is free, but a dead owner left the processes {sorted(left)}"
        return Check("slot", "note", detail, "nothing to do: the next start adopts or ends them")
    if slot.record_path.exists():
        server_is = f"of process {server.pid}, which is gone" if server else "without a server"
        detail = f"{slot.name!r} is free, with a stale record {server_is}"
        return Check("slot", "note", detail, "nothing to do: the next start removes it")
    return Check("slot", "ok", f"{slot.name!r} is free and empty")


def _keeping(_: Intent) -> Iterator[Check]:
    """Whether a server can go on after its host (`on_host_exit = "keep"`)."""
    if not can_listen():
        yield Check("keep", "note", "a server can be kept on Linux and Windows only")
    elif (init := _other_init()) is not None:
        detail = f"pid 1 is {init}: at its end everything ends, a kept server too"
        remedy = "keep the container running while the service in it restarts"
        yield Check("keep", "note", detail, remedy)
    elif (mode := _kill_mode()) not in {None, "process", "none"}:
        detail = f"systemd ends everything of this unit at its end (KillMode={mode})"
        yield Check("keep", "note", detail, "set KillMode=process in the unit")
    else:
        yield Check("keep", "ok", "a server can be kept for the next owner of its slot")


def _other_init() -> str | None:
    """Return the name of pid 1 if it is no init system, which ends with its container."""
    if sys.platform == "win32":
        return None
    try:
        name = Path("/proc/1/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return None if name in _INITS else name


def _kill_mode() -> str | None:
    """Return systemd's KillMode of the service that we are in; None if in none."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("/")[2]
        if not group.endswith(".service"):
            return None
        command = ["systemctl", "show", "--property=KillMode", "--value", group]
        done = subprocess.run(command, capture_output=True, timeout=5.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def _kernel(_: Intent) -> Iterator[Check]:
    if sys.platform != "win32":
        yield from _posix_kernel()
    if process_table.identify(os.getpid()) is not None and process_table.boot_id():
        yield Check("proc", "ok", "the process table can be read")
    else:
        yield Check("proc", "problem", "the process table cannot be read", "mount /proc")


if sys.platform != "win32":
    import fcntl

    def _posix_kernel() -> Iterator[Check]:
        if (fd := process.pidfd(os.getpid())) is not None:
            os.close(fd)
            yield Check("pidfd", "ok", "available")
        else:
            remedy = "use Linux 5.3 or newer; without it, exits are found by polling"
            yield Check("pidfd", "note", "not available", remedy)
        try:
            with launch.output_file() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Check("flock", "ok", "files can be locked")
        except OSError as error:
            yield Check("flock", "problem", f"not available: {error}", "use a local file system")


def _memory(_: Intent) -> Iterator[Check]:
    available, limit = memory.available_bytes(), min(memory.limits(), default=None)
    if available is None:
        yield Check("memory", "note", "unknown")
        return
    what = "available" if available != limit else "allowed by the control group"
    yield _amount("memory", available, what, problem_gib=0.25, note_gib=2.0)


def _amount(name: str, size: int, what: str, *, problem_gib: float, note_gib: float) -> Check:
    gib = size / _GIB
    detail = f"{byte_text(size)} {what}"
    if gib < problem_gib:
        return Check(name, "problem", detail, "free some: even a small model does not fit")
    if gib < note_gib:
        return Check(name, "note", detail, "enough for small models only")
    return Check(name, "ok", detail)


def _gpu(_: Intent) -> Iterator[Check]:
    if found := _gpu_tool():
        yield Check("gpu", "ok", f"{found} is installed")
        return
    remedy = "with a GPU: install its driver and tools, and a llama-server built for it"
    yield Check("gpu", "note", f"no {' or '.join(_GPU_TOOLS)}: models run on the CPU", remedy)


def _gpu_tool() -> str | None:
    return next(filter(None, map(shutil.which, _GPU_TOOLS)), None)


def _port(intent: Intent) -> Iterator[Check]:
    address = f"127.0.0.1:{intent.port}"
    try:
        socket.create_server(("127.0.0.1", intent.port)).close()
    except OSError as error:
        is_ours = error.errno == errno.EADDRINUSE and _is_orchestrator(f"http://{address}")
        detail = f"{address} is not available: {os.strerror(error.errno or 0)}"
        remedy = "stop the process that uses it, or serve with --port 0"
        yield Check("port", "note" if is_ours else "problem", detail, remedy)
    else:
        yield Check("port", "ok", f"{address} is free")


def _is_orchestrator(url: str) -> bool:
    try:
        asked = Exchange(Service(url), "GET", "/healthz", timeout_s=2.0)
        return asked.json(lambda answer: bool(answer == {"status": "alive"}))
    except OrchestratorError:
        return False


def _hub(_: Intent) -> Iterator[Check]:
    try:
        folder = cache.directory()
    except CacheDirError as error:
        yield Check("model cache", "note", error.message)
        return
    free = _free_bytes(folder)
    yield _amount("model cache", free, f"free for {folder}", problem_gib=0.2, note_gib=5.0)
    if cache.is_offline():
        detail = "HF_HUB_OFFLINE is set: only cached models can be loaded"
        yield Check("hub", "note", detail, "unset it to download models")
        return
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        request = urllib.request.Request(hub, method="HEAD")  # noqa: S310 (the user's own setting)
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError as error:  # any status proves that it is reachable
        error.close()
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        remedy = "check network and proxy; cached and local models can still be loaded"
        yield Check("hub", "note", f"{hub} is unreachable: {why}", remedy)
        return
    yield Check("hub", "ok", f"{hub} is reachable")


def _free_bytes(folder: Path) -> int:
    """Return the free disk space at a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _model(intent: Intent) -> Iterator[Check]:
    if intent.model is None:
        return
    plan, server = None, intent.llama_server
    try:
        with contextlib.closing(
            Orchestrator(llama_server=server, state_dir=intent.state_dir)
        ) as unstarted:
            found = unstarted.variants(intent.model).variants
            with contextlib.suppress(OrchestratorError):  # then its need is unknown
                plan = unstarted.plan(intent.model)
    except OrchestratorError as error:
        yield Check("model", "problem", error.message, f"a load would fail: {error.category}")
        return
    label = LoadRequest(model_path=intent.model).variant
    names = ", ".join(str(one.gguf_variant) for one in found)
    for one in found:
        if one.is_default if label is None else (one.gguf_variant or "").lower() == label.lower():
            yield _fit(one, plan)
            return
    if label is None:
        detail = f"{intent.model}: the default variant is incomplete"
        yield Check("model", "problem", detail, f"name a complete variant: {names}")
    else:  # a load accepts other names for a variant too
        detail = f"{intent.model}: {label} is not listed, so its size is unknown"
        yield Check("model", "note", detail, f"use a name from the list: {names}")


def _fit(model: Variant, plan: Plan | None) -> Check:
    size = model.size_bytes
    if size is None:
        return Check("model", "note", f"{model.gguf_variant or 'the model'} has an unknown size")
    detail = f"{model.gguf_variant or 'the model'} has {byte_text(size)}"
    if not model.is_cached and size > (free := _free_bytes(cache.directory())):
        remedy = "free some, move the cache (HF_HUB_CACHE), or choose a smaller variant"
        return Check("model", "problem", f"{detail}, {byte_text(free)} of disk free", remedy)
    if plan is None or plan.memory is None:
        return Check("model", "note", f"{detail}; what it needs of memory is unknown")
    left = plan.free or {}
    detail += f" and needs {mib_text(plan.memory.mib)} of memory ({plan.memory.source}): "
    detail += ", ".join(
        f"{device} {mib_text(mib)}" + f" of {mib_text(left.get(device, 0))}" * (device in left)
        for device, mib in plan.memory.devices.items()
    )
    if plan.fits is False:
        remedy = "choose a smaller variant or context, or free memory"
        return Check("model", "problem", f"{detail}; that does not fit", remedy)
    return Check("model", "ok", detail)


CHECKS: Final[tuple[Callable[[Intent], Iterator[Check]], ...]] = (
    *(_platform, _server, _embedded, _slot, _keeping, _kernel, _memory, _gpu, _port, _hub, _model),
)


@click.command(
    params=[
        click.Argument(["model"], required=False),
        config.config_option(is_flag=False, flag_value=""),
        *(config.SCHEMA, *config.SERVING, options.JSON),
    ]
)
@click.pass_context
def doctor(ctx: click.Context, /, *, as_json: bool, **given: Any) -> int:
    """Check this machine, with the settings of `serve`, and say what to fix.

    With MODEL (a file, a folder, or owner/name[:VARIANT] on the Hub), check that it fits too. With
    --config (a FILE may follow), first show the value and the source of every setting.
    """
    logs.configure("warning")
    explained = {"config": config.explain(ctx)} if config.is_named(ctx) else {}
    if explained and not as_json:
        _show_settings(explained["config"])
    intent = Intent(**{name: given[name] for name in Intent.__slots__})
    found = []
    for check in CHECKS:
        for result in check(intent):
            found.append(result)
            if not as_json:
                _show(result)
    problems = sum(result.verdict == "problem" for result in found)
    if as_json:
        checks = [{**asdict(one), "page": one.page} for one in found]
        say_json({"ok": not problems, **explained, "checks": checks})
    elif problems:
        say((f"\n{problems} to fix", "bold red"))
    else:
        say(("\nready", "bold green"), ("  try: llama-orchestrator demo", "dim"))
    return 1 if problems else 0


def _show_settings(explained: dict[str, Any]) -> None:
    say(("config  ", "bold"), explained["file"] or f"no file at {config.default_file()}")
    for one in explained["settings"]:
        value = ", ".join(one["value"]) if isinstance(one["value"], tuple) else one["value"]
        text = str(value) if value not in (None, "") else "-"
        source = f"{one['source']} {one['origin'] or ''}"
        say(f"  {one['name']:<15}{text:<22} ", (source.rstrip(), "dim"))
    for name in explained["unknown_variables"]:
        say(("· ", "yellow"), f"{name} is not a setting and has no effect")
    say()


def _show(check: Check) -> None:
    mark, style = _MARKS[check.verdict]
    say((f"{mark} ", style), (f"{check.name:<13}", "bold"), check.detail)
    if check.remedy:
        say(" " * 15, ("→ ", style), check.remedy)
    if check.page:
        say(" " * 15, (check.page, "dim"))
