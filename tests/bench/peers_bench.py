"""Answers of one token beside the peers, by turns: the bare server, the pass-through, the router
that llama-server has itself, and llama-swap where `LLAMA_SWAP` names its binary.

`wrk` (Debian has it) makes the load. Prints a table; `--json FILE` writes the figures, and `--plot
DIR` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.demo.tiny_model import write_tiny_model
from tests.bench.bench import free_port, until_ready
from tests.bench.passthrough_bench import FLAGS, SHORT, Service
from tests.bench.scale_bench import draw

CONNECTIONS: Final = (1, 16, 64)
ROUNDS: Final = 3
MODEL: Final = "tiny"
HEADER: Final = f"{'':24} connections  per second   of bare    p50 ms    p99 ms"

# Latencies are in microseconds; the last line is ours.
SCRIPT: Final = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
%s
wrk.body = '%s'
done = function(summary, latency)
  print(string.format("rate %%f p50 %%f p99 %%f errors %%d",
    summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.status + summary.errors.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the same model."""

    name: str
    url: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    rate: float
    p50_ms: float
    p99_ms: float


@contextlib.contextmanager
def started(*command: str, port: int) -> Iterator[str]:
    """Run a peer until the end of the block; it answers `/health` first."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as peer:
        try:
            until_ready(peer, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            peer.terminate()


@contextlib.contextmanager
def ways(server: str, folder: Path) -> Iterator[list[Way]]:
    """Start everybody with the same model and the same flags."""
    models = folder / "models"
    models.mkdir()
    model = write_tiny_model(models / f"{MODEL}.gguf")
    with contextlib.ExitStack() as stack:
        service = Service(server, str(model), str(folder / "state"))
        stack.callback(service.close)
        found = [Way("bare", service.direct, service.key), Way("llama-orchestrator", service.url)]
        port = free_port()
        command = [server, "--host", "127.0.0.1", "--port", str(port), "--models-dir", str(models)]
        router = stack.enter_context(started(*command, *FLAGS, port=port))
        found.append(Way("llama-server's router", router))
        if (swap := os.environ.get("LLAMA_SWAP")) is not None:
            port = free_port()
            config = folder / "llama-swap.yaml"
            runs = f"{server} --port ${{PORT}} -m {model} {' '.join(FLAGS)}"
            config.write_text(json.dumps({"models": {MODEL: {"cmd": runs}}}))
            listen = f"127.0.0.1:{port}"
            command = [swap, "--config", str(config), "--listen", listen]
            found.append(Way("llama-swap", stack.enter_context(started(*command, port=port))))
        yield found


def measure(way: Way, connections: int, seconds: int, folder: Path) -> Sample:
    """Send requests as fast as they are answered."""
    key = f'wrk.headers["Authorization"] = "Bearer {way.key}"' if way.key else ""
    script = folder / "script.lua"
    script.write_text(SCRIPT % (key, json.dumps({"model": MODEL, **SHORT})))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s"]
    command += ["-s", str(script)]
    command.append(f"{way.url}/v1/completions")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^rate (\S+) p50 (\S+) p99 (\S+) errors (\d+)$", said, re.MULTILINE)
    if found is None or found[4] != "0":
        raise SystemExit(f"{way.name}: {said}")
    return Sample(float(found[1]), float(found[2]) / 1000, float(found[3]) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    server = os.environ.get("LLAMA_SERVER_PATH")
    if server is None or shutil.which("wrk") is None:
        raise SystemExit("set LLAMA_SERVER_PATH, and install wrk")
    samples: dict[tuple[str, int], list[Sample]] = {}
    with tempfile.TemporaryDirectory() as name, ways(server, Path(name)) as found:
        for way in found:
            measure(way, 4, 1, Path(name))  # the peers load the model with the first request
        for _ in range(ROUNDS):
            for connections in CONNECTIONS:
                for way in found:
                    sample = measure(way, connections, chosen.seconds, Path(name))
                    samples.setdefault((way.name, connections), []).append(sample)
    names = list(dict.fromkeys(name for name, _ in samples))
    figures: dict[str, dict[str, float]] = {}
    print(HEADER)
    for connections in CONNECTIONS:
        bare = statistics.median(s.rate for s in samples["bare", connections])
        for name in names:
            taken = samples[name, connections]
            rate = statistics.median(s.rate for s in taken)
            p50 = statistics.median(s.p50_ms for s in taken)
            p99 = statistics.median(s.p99_ms for s in taken)
            figures[f"{name}, {connections}"] = {"rate": rate, "p50_ms": p50, "p99_ms": p99}
            ratio = rate / bare
            print(f"{name:24}{connections:12}{rate:12.0f}{ratio:10.2f}{p50:10.2f}{p99:10.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    if chosen.plot:
        series = {n: {c: figures[f"{n}, {c}"]["rate"] for c in CONNECTIONS} for n in names}
        what = "Answers of one token a second"
        draw(chosen.plot, "bench-peers", what, "connections", "", series)


if __name__ == "__main__":
    main()
