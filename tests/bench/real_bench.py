"""What users feel with the small real model, by turns with the bare process.

Loads and swaps in one process, the first token after a swap over HTTP, tokens a second direct and
through the service, and a conversation that comes back after another model. `make real-model`
fetches the model. Prints a table; `--json FILE` writes the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from orchestrator import Orchestrator
from orchestrator.demo import real_model
from orchestrator.demo.tiny_model import write_tiny_model
from tests.bench.bench import Figures, bare_start, bare_stop, milliseconds, orchestrator
from tests.bench.passthrough_bench import Service

ROUNDS: Final = 5
CONTEXT: Final = 4096
TOKENS: Final = 128
TALK: Final = "The lighthouse keeper wrote in his log every night about the ships that passed. "


def post(url: str, path: str, body: dict[str, Any], key: str | None = None) -> Any:
    """Send a request on a connection of its own, and return the answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    read = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{url}{path}: {answer.status} {read}")
    return read


def asked(text: str, tokens: int) -> dict[str, Any]:
    return {"prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def loads(server: str, real: str, other: str, figures: Figures) -> None:
    """To the real model from nothing, and from another one, until /health is 200, or Healthy."""
    bare_load, our_load, bare_swap, our_swap = [], [], [], []
    with orchestrator(server) as orch:
        orch.load(other, max_seq_length=CONTEXT)
        for _ in range(2 * ROUNDS):
            orch.unload()
            process, seconds = bare_start(server, real, CONTEXT)
            bare_load.append(seconds * 1000)
            bare_stop(process)
            our_load.append(milliseconds(lambda: orch.load(real, max_seq_length=CONTEXT)))
            orch.unload()
            old, _ = bare_start(server, other, CONTEXT)
            started = time.perf_counter()
            bare_stop(old)
            process, _ = bare_start(server, real, CONTEXT)
            bare_swap.append((time.perf_counter() - started) * 1000)
            bare_stop(process)
            orch.load(other, max_seq_length=CONTEXT)
            our_swap.append(milliseconds(lambda: orch.load(real, max_seq_length=CONTEXT)))
    for name, bare, ours in (("load", bare_load, our_load), ("swap", bare_swap, our_swap)):
        figures.add(f"bare {name}, median", statistics.median(bare), "ms")
        figures.add(f"{name}, median", statistics.median(ours), "ms")
        ratio = statistics.median(ours) / statistics.median(bare)
        figures.add(f"{name} / bare", ratio, "x", "<= 1.10")


def swaps(service: Service, server: str, real: str, tiny: str, figures: Figures) -> None:
    """From the tiny model to the real one, until its first token."""
    bare, ours = [], []
    load = "/api/inference/load"
    for _ in range(ROUNDS):
        old, _ = bare_start(server, tiny, CONTEXT)
        started = time.perf_counter()
        bare_stop(old)
        new, _ = bare_start(server, real, CONTEXT)
        argv = psutil.Process(new.pid).cmdline()
        port = argv[argv.index("--port") + 1]
        post(f"http://127.0.0.1:{port}", "/v1/completions", asked("Hello", 1))
        bare.append(time.perf_counter() - started)
        bare_stop(new)
        post(service.url, load, {"model_path": tiny, "max_seq_length": CONTEXT})
        started = time.perf_counter()
        post(service.url, load, {"model_path": real, "max_seq_length": CONTEXT})
        post(service.url, "/v1/completions", asked("Hello", 1))
        ours.append(time.perf_counter() - started)
    figures.add("bare swap and the first token, median", statistics.median(bare) * 1000, "ms")
    figures.add("swap and the first token over HTTP, median", statistics.median(ours) * 1000, "ms")
    ratio = statistics.median(ours) / statistics.median(bare)
    figures.add("ratio", ratio, "x", "<= 1.30")


def tokens(service: Service, figures: Figures) -> None:
    rates: dict[str, list[float]] = {"direct": [], "through the service": []}
    service.direct = service._loaded()
    for _ in range(ROUNDS):
        for name, url, key in (
            ("direct", service.direct, service.key),
            ("through the service", service.url, None),
        ):
            started = time.perf_counter()
            post(url, "/v1/completions", asked("Once upon a time", TOKENS), key)
            rates[name].append(TOKENS / (time.perf_counter() - started))
    for name, rate in rates.items():
        figures.add(f"tokens a second, {name}", statistics.median(rate), "per s")


def conversations(server: str, real: str, tiny: str, figures: Figures) -> None:
    """A, B, A: the same prompt again, without and with `keep_prompts`."""
    whole = {}
    for keeps in (False, True):
        with (
            tempfile.TemporaryDirectory() as folder,
            Orchestrator(llama_server=server, state_dir=folder, keep_prompts=keeps) as orch,
        ):
            for last in (False, True):
                orch.load(real, max_seq_length=CONTEXT)
                with orch.lease() as leased:
                    started = time.perf_counter()
                    url, key = leased.base_url, leased.api_key
                    answer = post(url, "/completion", {"prompt": TALK * 75, "n_predict": 1}, key)
                    took = time.perf_counter() - started
                if not last:
                    orch.load(tiny, max_seq_length=CONTEXT)
        timings = answer["timings"]
        whole[keeps] = took
        name = "with keep_prompts" if keeps else "without"
        count = timings["cache_n"] + timings["prompt_n"]
        figures.add(f"A, B, A: prompt tokens not computed anew, {name}", timings["cache_n"], "")
        figures.add(f"A, B, A: of {count}, first token after, {name}", took * 1000, "ms")
    gain = whole[False] / whole[True]
    figures.add("A, B, A: sooner by", gain, "x", ">= 5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    server, real = os.environ.get("LLAMA_SERVER_PATH"), real_model.cached()
    if server is None or real is None:
        raise SystemExit("set LLAMA_SERVER_PATH, and run make real-model")
    figures = Figures()
    with tempfile.TemporaryDirectory() as name:
        tiny = str(write_tiny_model(Path(name) / "tiny.gguf"))
        loads(server, str(real), tiny, figures)
        service = Service(server, tiny, name)
        try:
            swaps(service, server, str(real), tiny, figures)
            tokens(service, figures)
        finally:
            service.close()
        conversations(server, str(real), tiny, figures)
    figures.write(chosen.json)


if __name__ == "__main__":
    main()
