"""llama.cpp's own HTTP server from the `xllamacpp` wheel, with llama-server's flags.

Runs as a child process, by `python -m orchestrator.embedded -m MODEL --port 0 ...` or by the path
of this file, and imports nothing else of this package but its flags. Refusals have exit status 1,
and come before the library is imported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __package__:
    from orchestrator.server.embedded_flags import (
        BY_NAME,
        Flag,
        assign,
        usage,
        usage_of,
        words,
    )
else:  # by its path: importing the package takes longer than starting the server
    table = ModuleType("embedded_flags")
    SourceFileLoader(table.__name__, f"{__file__[:-3]}_flags.py").exec_module(table)
    BY_NAME, assign, words = table.BY_NAME, table.assign, table.words
    usage, usage_of = table.usage, table.usage_of

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Refused(Exception):
    """The server cannot be started; the text is what llama-server would print."""


def version() -> str:
    """Return what --version prints, without importing the library."""
    import platform
    from importlib import metadata

    try:
        release = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        release = "not installed"
    machine = platform.machine()
    return f"version: {release} (xllamacpp)\nbuilt for {sys.platform} {machine}\n"


def devices() -> str:
    """Return what --list-devices prints: every device but the processor itself."""
    found = [one for one in _library().get_device_info() if not one["type"].name.endswith("_CPU")]
    lines = [
        f"  {one['name']}: {one['description']} ({one['memory_total'] >> 20} MiB, "
        f"{one['memory_free'] >> 20} MiB free)"
        for one in found
    ]
    return "\n".join(("Available devices:", *(lines or ["  (none)"]), ""))


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        hint = 'pip install "llama-orchestrator[embedded]"'
        message = f"error: the embedded server needs xllamacpp: {hint} ({error})"
        raise Refused(message) from error
    return xllamacpp


def parse(argv: Sequence[str]) -> list[tuple[Flag, Any]]:
    """Return the flags of a command line in order, each with its value.

    Raises:
        Refused: A flag is unknown, its value is missing or wrong, or there is no model.
    """
    given: list[tuple[Flag, Any]] = []
    words = iter(argv)
    for word in words:
        name = word.replace("_", "-") if word.startswith("--") else word
        if (flag := BY_NAME.get(name)) is None:
            raise Refused(f"error: invalid argument: {name}")
        try:
            given.append((flag, flag.value_of(name, words)))
        except ValueError as error:
            raise Refused(
                f'error while handling argument "{name}": {error}\n\nusage:\n{usage_of(flag)}\n\n\n'
                "to show complete usage, run with -h"
            ) from error
        if flag.into in {"version", "list-devices"}:
            return given
    if not any(
        flag.into == "help" or (flag.into == "model.path" and value) for flag, value in given
    ):
        raise Refused("error: --model is required: this server has no router mode")
    return given


def main(argv: list[str] | None = None) -> int:
    """Run the server until it is stopped; a stop ends the process without returning.

    Args:
        argv: Flags without the program name; `sys.argv` when None.

    Returns:
        The exit status of a process that never served: 0 for --help, --version and --list-devices,
        else 1.
    """
    if path := os.environ.pop("LLAMA_ORCHESTRATOR_IMPORT_PATH", None):
        sys.path[:] = json.loads(path)  # where the orchestrator imports from
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        requested = {flag.into for flag, _ in given}
        if "version" in requested:
            sys.stderr.write(version())
        elif "help" in requested:
            sys.stdout.write(usage())
        elif "list-devices" in requested:
            sys.stdout.write(devices())
        else:
            _serve(given)
    except Refused as refusal:
        sys.stderr.write(f"{refusal}\n")
        return 1
    return 0


def _serve(given: list[tuple[Flag, Any]]) -> NoReturn:
    # The library holds the GIL while it loads the model, so no Python handler would run.
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    xllamacpp = _library()
    try:
        params = _params(xllamacpp.CommonParams(), given)
        _server = xllamacpp.Server(params)  # referenced, because its destructor shuts it down
    except (RuntimeError, ValueError) as error:
        raise Refused(f"error: {error}") from error
    except (AttributeError, LookupError) as error:
        message = f"error: this version of xllamacpp lacks something: {error}"
        raise Refused(message) from error
    _wait_for_stop()
    # llama.cpp's own shutdown loses a stop that comes before its loop runs, waits for open
    # connections and streams, and holds the GIL, so nothing could interrupt it.
    os._exit(0)


def _params(params: Any, given: list[tuple[Flag, Any]]) -> Any:
    """Set llama-server's defaults where they differ from the library's, then the flags."""
    params.n_parallel, params.port = -1, 8080
    params.ui, params.cors_origins = False, "localhost"
    params.api_keys = words(os.environ.get("LLAMA_API_KEY", ""))
    for flag, value in given:
        if isinstance(flag.into, str):
            assign(params, flag.into, value)
        else:
            flag.into(params, value)
    if params.cpuparams_batch.n_threads < 0:
        params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    return params


def _wait_for_stop() -> None:
    """Return at the first SIGTERM or SIGINT; a Ctrl-Break of Windows ends the process itself."""
    if sys.platform == "win32":
        while True:
            time.sleep(3600.0)
    wakeup, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    for signum in _STOP_SIGNALS:
        signal.signal(signum, lambda *_: None)
    os.read(wakeup, 1)


if __name__ == "__main__":
    raise SystemExit(main())
