"""What a running llama-server reports about itself.

`/props` and `/slots` report context, template, sampling, slots and whether drafting is on; the KV
cache's types and the drafting mode are only in the log of a server that `write_server` has made.
"""

from __future__ import annotations

import http.client
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator import LoadOutcome, Orchestrator
from orchestrator.demo.tiny_model import _CHAT_TEMPLATE
from tests.kit.process.support import key_of, until


@dataclass(frozen=True)
class Reported:
    """What a server reports; the defaults are llama.cpp's for the tiny model."""

    model: str
    context: int = 2048
    kv: tuple[str, str] = ("f16", "f16")
    template: str = _CHAT_TEMPLATE
    drafting: tuple[str, ...] = ()
    top_k: int = 40
    seed: int = 0xFFFFFFFF
    slots: int = 4
    vision: bool = False


_KV = re.compile(r"llama_kv_cache: size = .* K \((\w+)\): .* V \((\w+)\): ")
_DRAFTING = re.compile(r"adding speculative implementation '([\w-]+)'")


def reported(orch: Orchestrator) -> Reported:
    """Ask the running server."""
    loaded = orch.status().loaded
    assert loaded is not None
    props, slots = ask(loaded, "/props"), ask(loaded, "/slots")
    defaults = props["default_generation_settings"]
    log = until(lambda: whole_log(orch), "the log up to where the server listens")
    drafting = tuple(_DRAFTING.findall(log))
    [kv] = _KV.findall(log)
    assert {slot["n_ctx"] for slot in slots} == {defaults["n_ctx"]}
    assert {slot["speculative"] for slot in slots} == {bool(drafting)}
    assert len(slots) == props["total_slots"]
    return Reported(
        model=props["model_path"],
        context=defaults["n_ctx"],
        kv=kv,
        template=props["chat_template"],
        drafting=drafting,
        top_k=defaults["params"]["top_k"],
        seed=defaults["params"]["seed"],
        slots=len(slots),
        vision=props["modalities"]["vision"],
    )


def whole_log(orch: Orchestrator) -> str | None:
    """Return its output, once the last line of the start has been drained."""
    log = "\n".join(orch.logs(2000))
    return log if "listening on" in log else None


def ask(server: LoadOutcome, path: str) -> Any:
    parts = urlsplit(server.base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", path, headers={"Connection": "close", **key_of(server.pid)})
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())
    finally:
        connection.close()


def write_server(path: Path, llama_server: str, **environment: str) -> None:
    """Make this server one that uses one thread, and logs its KV cache and its drafting."""
    given = {"LLAMA_ARG_LOG_VERBOSITY": "4", "LLAMA_ARG_THREADS": "1", **environment}
    exports = "".join(f"export {name}={value}\n" for name, value in given.items())
    path.write_text(f'#!/bin/sh\n{exports}exec {shlex.quote(llama_server)} "$@"\n')
    path.chmod(0o755)
