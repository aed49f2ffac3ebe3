"""Which llama.cpp server to start: an external llama-server, or the embedded one.

`auto` takes the first that exists: LLAMA_SERVER_PATH, llama-server on PATH, the embedded server.
Looked at on every load, because a binary may be replaced under a running backend.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from orchestrator.errors import ServerUnavailable
from orchestrator.models import identity_of
from orchestrator.request import ServerBinary

_EMBEDDED_HINT = 'pip install "llama-orchestrator[embedded]"'


def find_server(llama_server: str | os.PathLike[str]) -> ServerBinary:
    """Return what would be started.

    Args:
        llama_server: A path, `"auto"` or `"embedded"`.

    Raises:
        ServerUnavailable: missing, a folder, or not executable (field `llama_server`).
    """
    choice = os.fspath(llama_server).strip()
    if choice == "embedded":
        return _embedded()
    if choice != "auto":
        return _external(choice, "llama_server")
    if named := os.environ.get("LLAMA_SERVER_PATH"):
        return _external(named, "LLAMA_SERVER_PATH")
    if found := shutil.which("llama-server"):
        return _external(found, "PATH")
    if importlib.util.find_spec("xllamacpp") is not None:
        return _embedded()
    raise ServerUnavailable.because(
        "no llama-server: set LLAMA_SERVER_PATH, put llama-server on PATH, or " + _EMBEDDED_HINT,
        field="llama_server",
    )


def _external(choice: str, origin: str) -> ServerBinary:
    problem = None
    path = Path(choice).expanduser()
    if not choice or "\0" in choice:
        problem = "is not a path"
    elif not path.exists():
        problem = "does not exist"
    elif path.is_dir():
        problem = "is a folder: give the llama-server binary inside it"
    elif not os.access(path, os.X_OK):
        problem = "is not executable: chmod +x it, or give the llama-server binary"
    if problem:
        raise ServerUnavailable.because(f"{origin}: {choice!r} {problem}", field="llama_server")
    absolute = os.path.abspath(path)
    return ServerBinary("external", (absolute,), identity_of(absolute))


def _embedded() -> ServerBinary:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ServerUnavailable.because(
            f"the embedded server needs xllamacpp: {_EMBEDDED_HINT}", field="llama_server"
        )
    script = str(Path(__file__).with_name("embedded.py"))
    # -P: this folder must not come before the standard library (it has an `http` of its own)
    return ServerBinary("embedded", (sys.executable, "-P", script), identity_of(spec.origin))
