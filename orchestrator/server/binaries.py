"""Which llama.cpp server to start, an external llama-server or the embedded one, and its `--help`.

`auto` is the first of: LLAMA_SERVER_PATH, llama-server on PATH, the embedded server. It is looked
up at every load, because a binary may be replaced under a running backend. Each binary is asked
once for its flags, and conclusive answers are cached on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

from orchestrator.base import launch, paths
from orchestrator.base.log import event_log
from orchestrator.base.paths import PathNames
from orchestrator.base.private_file import read_file, write_json
from orchestrator.errors import ServerUnavailable, naming
from orchestrator.models.local import identity_of
from orchestrator.server import process_table
from orchestrator.server.environment import inherited_environment
from orchestrator.server.pin import Pin, wait_exited
from orchestrator.settings.files import FileIdentity
from orchestrator.settings.help_text import Catalogue, FlagHelp, parse_help
from orchestrator.settings.target import ServerBinary

_ASK_S: Final = 10.0
_ASK_AGAIN_S: Final = 60.0
_MAX_ANSWER: Final = 1 << 20
_log = event_log("orchestrator.server")

_EMBEDDED_HINT = 'pip install "llama-orchestrator[embedded]"'


def find_server(llama_server: str | os.PathLike[str]) -> ServerBinary:
    """Return the server that a load would start.

    Args:
        llama_server: A path, `"auto"` or `"embedded"`.

    Raises:
        ServerUnavailable: Missing, a folder, or not executable (field `llama_server`).
    """
    choice = os.fspath(llama_server).strip()
    if choice == "embedded":
        return _embedded()
    if choice != "auto":
        return _external(choice, "llama_server")
    if variable := os.environ.get("LLAMA_SERVER_PATH"):
        return _external(variable, "LLAMA_SERVER_PATH")
    if found := shutil.which("llama-server"):
        return _external(found, "PATH")
    if importlib.util.find_spec("xllamacpp") is not None:
        return _embedded()
    raise ServerUnavailable.because(
        "no llama-server: set LLAMA_SERVER_PATH, put llama-server on PATH, or " + _EMBEDDED_HINT,
        field="llama_server",
    )


def _external(choice: str, origin: str) -> ServerBinary:
    names: PathNames = ()
    try:
        path = Path(choice).expanduser()
        problem: str | None = "is not a path"
        if choice and "\0" not in choice:
            names = paths.names_of_own(path, path.name)
            problem = _problem_of(path)
        if problem is None:
            absolute = os.path.abspath(path)
            return ServerBinary("external", (absolute,), identity_of(absolute), names=names)
    except (OSError, RuntimeError) as error:  # too long, or removed meanwhile; no such user
        problem = f"cannot be looked up ({getattr(error, 'strerror', None) or error})"
    message = f"{origin}: {choice[:200]!r} {problem}"
    with naming(names):
        raise ServerUnavailable.because(message, field="llama_server")


def _problem_of(path: Path) -> str | None:
    """Return why a file cannot be executed, as far as that is known without executing it."""
    if not path.exists():
        return "does not exist: install llama.cpp, or give the path of llama-server"
    if path.is_dir():
        return "is a folder: give the llama-server binary inside it"
    if not path.is_file():
        return "is not a regular file: give the llama-server binary"
    if not os.access(path, os.X_OK):
        return "is not executable: chmod +x it, or give the llama-server binary"
    if not os.access(path, os.R_OK):
        return None
    with open(path, "rb") as file:
        head = file.read(256)
    if head.startswith(b"#!"):
        interpreter = os.fsdecode((head[2:].split(b"\n")[0].split() or [b""])[0])
        usable = os.access(interpreter, os.X_OK) and not os.path.isdir(interpreter)
        return None if usable else f"needs the interpreter {interpreter!r}, which is missing"
    if sys.platform == "linux" and not head.startswith((b"\x7fELF", b"MZ")):
        return "is neither an executable nor a script with #!: give the llama-server binary"
    return None


def _embedded() -> ServerBinary:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ServerUnavailable.because(
            f"the embedded server needs xllamacpp: {_EMBEDDED_HINT}", field="llama_server"
        )
    try:
        command = launch.program(Path(__file__).with_name("embedded.py"))
    except launch.NoInterpreter as error:
        raise ServerUnavailable.because(
            f"the embedded server needs a Python interpreter, and {error}: give the path of a "
            "llama-server",
            field="llama_server",
        ) from error
    names = paths.names_of_own(spec.origin, "xllamacpp")
    for path in (command[0], command[-1]):
        names += paths.names_of_own(path, Path(path).name)
    return ServerBinary("embedded", command, identity_of(spec.origin), names=names)


_answers: dict[FileIdentity, Catalogue] = {}
_ask_after: dict[FileIdentity, float] = {}


def ask_catalogue(
    server: ServerBinary, cache: Path, patience_s: float | None = None
) -> Catalogue | None:
    """Return the flags of a binary; None if its answer is inconclusive.

    Runs it once per identity and machine, about 10 ms; after an inconclusive answer at most once a
    minute.

    Args:
        cache: Folder for answers; one that cannot be written costs a run per process.
        patience_s: How long to wait for the answer; None = 10 s.
    """
    found = _known(server.command, server.identity, str(cache))
    if found is not None or time.monotonic() < _ask_after.get(server.identity, 0.0):
        return found
    try:
        returncode, text = run((*server.command, "--help"), server.kind, patience_s)
        found, why = parse_help(text) if returncode == 0 else None, f"exit status {returncode}"
    except (OSError, ValueError) as error:
        why = str(error)
    if found is None:
        _log("warning", "catalogue.inconclusive", server=server.command[0], reason=why)
        _ask_after[server.identity] = time.monotonic() + _ASK_AGAIN_S
        return None
    _answers[server.identity] = found
    flags = {"flags": [asdict(flag) for flag in found.flags]}
    write_json(_file_of(server.command, server.identity, str(cache)), flags)
    return found


def _known(command: tuple[str, ...], identity: FileIdentity, cache: str) -> Catalogue | None:
    if identity in _answers:
        return _answers[identity]
    try:
        members = json.loads(read_file(_file_of(command, identity, cache)))
        flags = tuple(
            FlagHelp(tuple(f["names"]), f["placeholder"], tuple(f["choices"]), f["is_removed"])
            for f in members["flags"]
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return _answers.setdefault(identity, Catalogue(flags))


def _file_of(command: tuple[str, ...], identity: FileIdentity, cache: str) -> Path:
    key = hashlib.sha256(repr((command, identity)).encode()).hexdigest()[:32]
    return Path(cache) / f"help-{key}.json"


def run(command: tuple[str, ...], kind: str, patience_s: float | None = None) -> tuple[int, str]:
    """Run a command in a server's environment for at most `patience_s` (10 s), kill what is left of
    it, and return its exit status and its output.

    The output goes to a file: a grandchild would keep a pipe open.
    """
    with launch.output_file() as output:
        process = launch.popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited_environment(kind),
            start_new_session=True,
        )
        identity = process_table.identify(process.pid)
        pin = Pin.of(identity) if identity is not None else None
        if pin is not None:  # None: it has exited already
            wait_exited([pin], _ASK_S if patience_s is None else patience_s)
            pin.close()
        _end_group(process)
        process.wait()
        output.seek(0)
        return process.returncode, output.read(_MAX_ANSWER).decode("utf-8", "replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
        return
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group is its own
