"""The cost of the orchestrator compared with the bare process, measured in the same run.

`make bench` prints a table and, with `--json FILE`, writes the figures. Bare and orchestrated runs
alternate, so that a machine that slows down slows down both; quote the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from starlette.types import Message

from orchestrator import Cancelled, Orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.http.activity.activity import Activity, Asked
from orchestrator.server.ladder import TERM_AGAIN_S

_ANSWER = {
    "choices": [{"message": {"content": "word " * 100}}],
    "usage": {"completion_tokens": 100, "prompt_tokens": 20},
    "timings": {"cache_n": 8, "prompt_n": 12, "predicted_n": 100, "predicted_per_second": 41.5},
}


@dataclass
class Figures:
    """Named figures, each with its unit and its goal."""

    rows: list[tuple[str, float, str, str]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        self.rows.append((name, value, unit, goal))
        print(f"{name:<58} {value:>10.3f} {unit:<6} {goal}", flush=True)

    def write(self, path: Path | None) -> None:
        """Write them as JSON, if a path is given."""
        if path is not None:
            members = {
                name: {"value": v, "unit": u, "goal": goal} for name, v, u, goal in self.rows
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(members, indent=2) + "\n")


def bare_start(server: str, model: str, context: int) -> tuple[subprocess.Popen[bytes], float]:
    """Spawn, poll /health every millisecond, and return the process and the seconds it took."""
    port = free_port()
    started = time.perf_counter()
    argv = [server, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-c", str(context)]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until_ready(process, port)
    return process, time.perf_counter() - started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Poll /health every millisecond until it is 200."""
    while not _is_ready(port):
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} has ended")
        time.sleep(0.001)


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


def bare_stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM and wait; repeat it, because a server that starts to listen may lose it."""
    end = os.pidfd_open(process.pid)
    try:
        process.send_signal(signal.SIGTERM)
        while not select.select([end], [], [], TERM_AGAIN_S)[0]:
            process.send_signal(signal.SIGTERM)
    finally:
        os.close(end)
    process.wait()


def milliseconds(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return (time.perf_counter() - started) * 1000


def swaps_and_loads(server: str, models: list[str], rounds: int, figures: Figures) -> None:
    bare_swap, our_swap, bare_load, our_load, kills = [], [], [], [], []
    with orchestrator(server) as orch:
        orch.load(models[0], max_seq_length=512)
        orch.unload()
        for turn in range(rounds):
            process, seconds = bare_start(server, models[0], 512)
            bare_load.append(seconds * 1000)
            started = time.perf_counter()
            bare_stop(process)
            process, _ = bare_start(server, models[1], 512)
            bare_swap.append((time.perf_counter() - started) * 1000)
            bare_stop(process)
            a, b = models[turn % 2], models[(turn + 1) % 2]
            our_load.append(milliseconds(lambda a=a: orch.load(a, max_seq_length=512)))  # type: ignore[misc]
            our_swap.append(milliseconds(lambda b=b: orch.load(b, max_seq_length=512)))  # type: ignore[misc]
            kills.append(milliseconds(orch.unload))
    med = statistics.median
    figures.add("bare load: spawn to first 200, median", med(bare_load), "ms")
    figures.add("load from Idle, median", med(our_load), "ms")
    figures.add("load from Idle / bare", med(our_load) / med(bare_load), "x", "<= 1.25")
    figures.add("bare swap: TERM, wait, spawn, first 200, median", med(bare_swap), "ms")
    figures.add("swap A to B, Healthy to Healthy, median", med(our_swap), "ms")
    figures.add("swap / bare", med(our_swap) / med(bare_swap), "x", "<= 1.25")
    figures.add("unload, median", med(kills), "ms")


def already_loaded_and_status(server: str, model: str, figures: Figures) -> None:
    with orchestrator(server) as orch:
        orch.load(model, max_seq_length=512)
        again = [milliseconds(lambda: orch.load(model, max_seq_length=512)) for _ in range(200)]
        figures.add("already_loaded, median", statistics.median(again), "ms", "< 5")
        settings: dict[str, Any] = {"cache_type_kv": "q8_0", "n_parallel": 2}
        planned = [milliseconds(lambda: orch.plan(model, **settings)) for _ in range(200)]
        figures.add("plan() of a reload, median", statistics.median(planned), "ms", "< 1")
        rounds = 5000
        spent = milliseconds(lambda: [orch.status() for _ in range(rounds)])
        figures.add("status()", spent * 1000 / rounds, "us", "< 50")
        me = psutil.Process()
        before, started = sum(me.cpu_times()[:2]), time.perf_counter()
        threading.Event().wait(5.0)
        busy = sum(me.cpu_times()[:2]) - before
        share = busy / (time.perf_counter() - started) * 100
        figures.add("CPU of a Healthy orchestrator at rest", share, "%", "< 0.1")


def exits(server: str, model: str, rounds: int, figures: Figures) -> None:
    noticed = []
    with orchestrator(server) as orch:
        for _ in range(rounds):
            pid = orch.load(model, max_seq_length=512).pid
            events = orch.events(after=0)
            last = orch._owner.events.last_id  # type: ignore[union-attr]
            events = orch.events(after=last)
            started = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            next(events)
            noticed.append((time.perf_counter() - started) * 1000)
            while orch.status().state != "Idle":
                next(events)
    figures.add("exit of a healthy child noticed, median", statistics.median(noticed), "ms", "< 20")
    figures.add("exit of a healthy child noticed, worst", max(noticed), "ms", "< 20")


def cancels(server: str, model: str, rounds: int, figures: Figures) -> None:
    """Cancel in every state of a load; settled = the load's caller has its answer."""
    for state in ("Killing", "Downloading", "Spawning", "WaitingHealth"):
        settled = [_cancel_in(server, model, state) for _ in range(rounds)]
        times = sorted(s for s in settled if s is not None)
        if times:
            p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
            figures.add(f"cancel after entering {state}, p99 of {len(times)}", p99, "ms", "< 250")


def _cancel_in(server: str, model: str, state: str) -> float | None:
    with orchestrator(server) as orch:
        orch.start()
        done: list[float] = []
        won: list[bool] = []

        def load() -> None:
            try:
                orch.load(model, load_request_id="bench", max_seq_length=512)
            except Cancelled:
                won.append(True)
            done.append(time.perf_counter())

        events = orch.events(after=0)
        thread = threading.Thread(target=load)
        thread.start()
        for event in events:
            if event.data["dest"] == state:
                break
        started = time.perf_counter()
        orch.cancel("bench")
        thread.join()
        return (done[0] - started) * 1000 if won else None


_TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
_FOREIGN = 3000
_AT_REST = """
import psutil, tempfile
from orchestrator import Orchestrator
with Orchestrator(llama_server="/bin/true", state_dir=tempfile.mkdtemp()):
    me = psutil.Process()
    while me.children(): pass  # the keeper forks, and is no child of ours then
    [keeper] = [p for p in psutil.process_iter(["cmdline"])
                if f'"host": {me.pid},' in " ".join(p.info["cmdline"] or ())]
    print(me.memory_info().rss, keeper.memory_info().rss)
"""


_HOST = """
import json, os, sys
from orchestrator import Orchestrator
given, model = json.loads(sys.argv[1])
Orchestrator(**given).load(model)
os.kill(os.getpid(), 9)
"""


def adoptions(server: str, folder: str, rounds: int, figures: Figures) -> None:
    """Of a model of 2 GiB, by the next owner after a SIGKILL of the host."""
    model = str(write_tiny_model(Path(folder) / "large.gguf", padding_bytes=2 << 30))
    given: dict[str, Any] = {"llama_server": server, "state_dir": folder, "on_host_exit": "keep"}
    took, read = [], []
    for _ in range(rounds):
        host = [sys.executable, "-c", _HOST, json.dumps([given, model])]
        subprocess.run(host, check=False)
        orch, before = Orchestrator(**given), _read_bytes()
        took.append(milliseconds(orch.start))
        read.append(_read_bytes() - before)
        loaded = orch.status().loaded
        assert loaded is not None
        assert loaded.adopted
        orch.close(keep=False)
    figures.add(
        "adoption of 2 GiB: start to Healthy, median", statistics.median(took), "ms", "< 300"
    )
    figures.add("adoption of 2 GiB: read by the host", statistics.median(read) / 1024, "KiB")


def _read_bytes() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def activity(figures: Figures) -> None:
    """What it costs to follow a request below `/v1`, and to write it behind; CPU of all threads."""
    answer = json.dumps(_ANSWER).encode()
    piece = b'data: {"choices":[{"delta":{"content":"word"}}],"id":"chatcmpl-0"}\n\n'

    async def ignore(_: Message) -> None:
        pass

    async def asked(pieces: int, kind: bytes, rounds: int) -> float:
        followed = Activity(lambda: Path(folder), dict)
        head: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", kind)],
        }
        async with followed.lifespan():
            before = time.process_time()
            for _ in range(rounds):
                one = Asked(followed, "/v1/chat/completions", None)
                one.got_server("model")
                await one.send(ignore, head)
                for _ in range(pieces):
                    await one.send(ignore, {"type": "http.response.body", "body": piece})
                await one.send(ignore, {"type": "http.response.body", "body": answer})
                one.end()
                await asyncio.sleep(0)
        return (time.process_time() - before) / rounds * 1e6

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(asked(0, b"application/json", 100))
        spent = asyncio.run(asked(0, b"application/json", 3000))
        figures.add("activity of a request", spent, "us", "< 100")
        spent = asyncio.run(asked(64, b"text/event-stream", 500))
        figures.add("activity of a stream of 64 tokens", spent, "us")


def imports(figures: Figures) -> None:
    for statement in ("import orchestrator", "from orchestrator import Orchestrator"):
        code = _TIMED.format(statement)
        runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(7)]
        goal = "< 150" if statement.startswith("import") else ""
        figures.add(f"{statement}, median", statistics.median(runs) * 1000, "ms", goal)
    host, helper = map(int, subprocess.check_output([sys.executable, "-c", _AT_REST]).split())
    figures.add("resident memory of an idle orchestrator", host / 2**20, "MiB", "< 60")
    figures.add("resident memory of its keeper", helper / 2**20, "MiB", "<= 14")


@contextmanager
def orchestrator(server: str) -> Iterator[Orchestrator]:
    with (
        tempfile.TemporaryDirectory() as state,
        Orchestrator(llama_server=server, state_dir=state) as orch,
    ):
        yield orch


def among_others(server: str, models: list[str], rounds: int, figures: Figures) -> None:
    """Swaps and unloads by turns without and with foreign processes that sleep."""
    swaps: list[list[float]] = [[], []]
    unloads: list[list[float]] = [[], []]
    with orchestrator(server) as orch:
        orch.load(models[0])
        for _ in range(2):
            for number, count in enumerate((0, _FOREIGN)):
                with sleeping(count):
                    for turn in range(rounds // 4):
                        model = models[(turn + 1) % 2]
                        swaps[number].append(milliseconds(partial(orch.load, model)))
                    for _ in range(rounds // 4):
                        unloads[number].append(milliseconds(orch.unload))
                        orch.load(models[0])
    for what, (alone, beside) in (("swap", swaps), ("unload", unloads)):
        more = statistics.median(beside) - statistics.median(alone)
        figures.add(f"{what} beside {_FOREIGN} processes, in addition", more, "ms", "< 1")


@contextmanager
def sleeping(count: int) -> Iterator[None]:
    others = [subprocess.Popen(["sleep", "600"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    server = os.environ["LLAMA_SERVER_PATH"]
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        models = [str(Path(folder) / f"{name}.gguf") for name in "ab"]
        for seed, path in enumerate(models):
            write_tiny_model(path, seed=seed)
        imports(figures)
        swaps_and_loads(server, models, chosen.rounds, figures)
        among_others(server, models, chosen.rounds, figures)
        already_loaded_and_status(server, models[0], figures)
        exits(server, models[0], chosen.rounds // 2, figures)
        cancels(server, models[0], chosen.rounds // 2, figures)
        activity(figures)
        adoptions(server, folder, 5, figures)
    figures.write(chosen.json)


if __name__ == "__main__":
    main()
