"""`doctor`: can this machine run it, and if not, what is to be done.

One line a check: ok, a note, or a problem with its remedy. It starts no server, and leaves no more
behind than the slot's folder, which the first start would make too.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import click

from orchestrator import proctable
from orchestrator.cli import config, logs, options
from orchestrator.cli.output import say, say_json
from orchestrator.errors import OrchestratorError, SlotOwned
from orchestrator.servers import find_server
from orchestrator.slot import Slot

_OLDEST: Final = (3, 11)
_GIB: Final = 1 << 30
_VERSION_WAIT_S: Final = 20.0
_MARKS: Final = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "bold red")}


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


@click.command()
@config.config_option(is_flag=False, flag_value="")
@click.option("--schema", is_flag=True, help="Print the JSON schema of the file, and end.")
@config.serving_options()
@options.json_option()
@click.pass_context
def doctor(ctx: click.Context, /, *, as_json: bool, schema: bool, **given: Any) -> int:
    """Check this machine for what `serve` would be, and say what to fix.

    With --config (FILE or not), say first where every setting comes from.
    """
    if schema:
        say_json(config.schema(ctx.command))
        return 0
    logs.configure("warning", "console")
    wanted = Wanted(**{name: given[name] for name in Wanted.__slots__})
    explained = config.explain(ctx) if config.is_named(ctx) else None
    if explained is not None and not as_json:
        _show_settings(explained)
    found = []
    for check in _CHECKS:
        for result in check(wanted):
            found.append(result)
            if not as_json:
                _show(result)
    problems = sum(result.verdict == "problem" for result in found)
    if as_json:
        members = {} if explained is None else {"config": explained}
        say_json({"ok": not problems, **members, "checks": [asdict(one) for one in found]})
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
        say(("· ", "yellow"), f"{name} is no setting and has no effect")
    say()


def _show(check: Check) -> None:
    mark, style = _MARKS[check.verdict]
    say((f"{mark} ", style), (f"{check.name:<13}", "bold"), check.detail)
    if check.remedy:
        say(" " * 15, ("→ ", style), check.remedy)


def _python(_: Wanted) -> Iterator[Check]:
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < _OLDEST:
        yield Check("python", "problem", detail, "use Python 3.11 or newer")
    else:
        yield Check("python", "ok", detail)


def _platform(_: Wanted) -> Iterator[Check]:
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if proctable.LINUX:
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
    yield _amount("disk", free, f"free beside {root}", few=0.2, little=5.0)
    try:
        slot.claim()
    except SlotOwned as error:
        yield Check("slot", "note", error.message)
        return
    except OrchestratorError as error:
        yield Check("slot", "problem", error.message, "mend the folder")
        return
    left = sorted(process.pid for process in slot.inhabitants())
    slot.release()
    if left:
        detail = f"{wanted.slot!r} is free, but a dead owner left {left}"
        yield Check("slot", "note", detail, "the next start ends them")
    else:
        yield Check("slot", "ok", f"{wanted.slot!r} is free and empty")


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
    if proctable.identify(os.getpid()) is not None and proctable.boot_id():
        yield Check("proc", "ok", "the process table can be read")
    else:
        yield Check("proc", "problem", "the process table cannot be read", "mount /proc")


def _memory(_: Wanted) -> Iterator[Check]:
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        yield Check("memory", "note", "cannot be told")
    else:
        yield _amount("memory", kib * 1024, "available", few=0.25, little=2.0)


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
    for tool in ("nvidia-smi", "rocm-smi"):
        if found := shutil.which(tool):
            yield Check("gpu", "ok", f"{found} is there to ask")
            return
    yield Check("gpu", "note", "no nvidia-smi or rocm-smi: models run on the CPU")


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


_CHECKS: Final[tuple[Callable[[Wanted], Iterator[Check]], ...]] = (
    *(_python, _platform, _server, _embedded, _slot, _kernel, _memory, _gpu, _port),
)
