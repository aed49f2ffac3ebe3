"""The cost of the pass-through: the same requests to the server itself and through `/v1`, in turns.

Three processes: the real llama-server, a host that serves the orchestrator over HTTP, and a client
that only moves bytes over its sockets, so that it adds little to the figures. Prints a table;
`--json FILE` writes the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from orchestrator.demo.tiny_model import write_tiny_model

ROUNDS: Final = 6
FLAGS: Final = ("--parallel", "16", "-t", "1")  # threads that spin would want both cores
SHORT: Final = {"prompt": "a", "max_tokens": 1, "temperature": 0}
STREAMED: Final = "stream of 64"
STREAM: Final = {"prompt": "a", "max_tokens": 64, "temperature": 0, "stream": True}


@dataclass(slots=True)
class Sample:
    """Durations of one kind of request over one route, in seconds."""

    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    took: float = 0.0
    cpu: float = 0.0  # of the host

    @property
    def rate(self) -> float:
        return len(self.whole) / self.took

    def add(self, other: Sample) -> None:
        self.whole += other.whole
        self.first += other.first
        self.took += other.took
        self.cpu += other.cpu


class Connection:
    """One request at a time, on a connection that is reused until the server closes it: when it
    says so, and after a stream, which llama-server ends without `Connection: close`.
    """

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.address = address
        self.request = request
        self.data = b""
        self.sent_at = self.first_at = 0.0
        self.socket = self._connected()

    def _connected(self) -> socket.socket:
        connected = socket.create_connection(self.address)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected

    def send(self) -> None:
        head = self.data[:1000].lower()
        is_closed = b"\r\nconnection: close" in head or b"encoding: chunked" in head
        self.data, self.first_at = b"", 0.0
        self.sent_at = time.perf_counter()
        if is_closed:
            self.socket.close()
            self.socket = self._connected()
        self.socket.sendall(self.request)

    def receive(self) -> bool:
        """Receive what has arrived; True when the response is complete."""
        more = self.socket.recv(1 << 18)
        if not more:
            raise ConnectionError(f"cut after {self.data[:200]!r}")
        self.first_at = self.first_at or time.perf_counter()
        self.data += more
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return False
        lowered = head.lower()
        if not lowered.startswith(b"http/1.1 200"):
            raise ConnectionError((self.data + self.socket.recv(4096)).decode("latin-1"))
        if b"transfer-encoding: chunked" in lowered:
            return body.endswith(b"0\r\n\r\n")
        _, _, length = lowered.partition(b"content-length:")
        return len(body) >= int(length.split(b"\r\n", 1)[0])


def drive(
    base_url: str, body: dict[str, Any], connections: int, seconds: float, service: Service
) -> Sample:
    """Keep this many connections busy for this long, and return the duration of each request."""
    parts = urlsplit(base_url)
    address = (parts.hostname or "", parts.port or 0)
    payload = json.dumps(body).encode()
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        f"Authorization: Bearer {service.key}\r\n\r\n"  # the pass-through takes any
    ).encode() + payload
    sample, cpu = Sample(), service.cpu_s()
    with selectors.DefaultSelector() as selector:
        started = time.perf_counter()
        for _ in range(connections):
            connection = Connection(address, request)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send()
        while selector.get_map():
            for key, _ in selector.select():
                connection = key.data
                if not connection.receive():
                    continue
                now = time.perf_counter()
                sample.whole.append(now - connection.sent_at)
                sample.first.append(connection.first_at - connection.sent_at)
                selector.unregister(connection.socket)
                if now - started < seconds:
                    connection.send()
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                else:
                    connection.socket.close()
        sample.took = time.perf_counter() - started
    sample.cpu = service.cpu_s() - cpu
    return sample


class Service:
    """`llama-orchestrator serve` in a process of its own, with a model loaded."""

    def __init__(self, server: str, model: str, folder: str) -> None:
        program = [sys.executable, "-m", "orchestrator.cli", "run", "-m", model]
        program += ["--llama-server", server, "--port", "0", "--state-dir", folder, "--json"]
        program += FLAGS
        self.process = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.direct = self._loaded()

    def asked(self, path: str, body: bytes | None = None) -> Any:
        """Send a request, bypassing any proxy."""
        headers = {"Content-Type": "application/json"} if body else {}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(urllib.request.Request(self.url + path, body, headers))

    def _loaded(self) -> str:
        while True:
            with self.asked("/api/inference/status") as answer:
                loaded = json.load(answer)["loaded"]
            if loaded:
                self.key = psutil.Process(loaded["pid"]).environ()["LLAMA_API_KEY"]
                return str(loaded["base_url"])

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def status_while_swapping(service: Service, models: list[str], figures: dict[str, float]) -> None:
    """Request the status in a loop while models are swapped, for three seconds."""
    ended = threading.Event()

    def swap() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            body = {"model_path": models[number % 2], "llama_extra_args": ["-t", "1"]}
            with service.asked("/api/inference/load", json.dumps(body).encode()) as answer:
                answer.read()

    thread = threading.Thread(target=swap)
    thread.start()
    took, until = [], time.perf_counter() + 3.0
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc)
    while time.perf_counter() < until:
        started = time.perf_counter()
        connection.request("GET", "/api/inference/status")
        connection.getresponse().read()
        took.append(time.perf_counter() - started)
    ended.set()
    thread.join()
    for at, name in ((0.5, "p50"), (0.99, "p99")):
        figures[f"status while models are swapped, {name} ms"] = quantile(took, at)
        print(f"{'status during swaps':<28} {name + ' ms':<18} {'':>10} {quantile(took, at):10.3f}")


def quantile(values: list[float], at: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(at * (len(ordered) - 1)))] * 1000


def compare(name: str, direct: Sample, through: Sample, figures: dict[str, float]) -> None:
    rows: dict[str, Callable[[Sample], float]] = {
        "p50 ms": lambda s: quantile(s.whole, 0.5),
        "p99 ms": lambda s: quantile(s.whole, 0.99),
        "first byte p50 ms": lambda s: quantile(s.first, 0.5),
        "per second": lambda s: s.rate,
    }
    for what, of in rows.items():
        ours, theirs = of(through), of(direct)
        said = f"{ours / theirs:6.3f} x" if what == "per second" else f"{ours - theirs:+6.3f} ms"
        print(f"{name:<28} {what:<18} {theirs:10.3f} {ours:10.3f}   {said}", flush=True)
        figures[f"{name}, {what}, direct"], figures[f"{name}, {what}, through"] = theirs, ours
    cpu_ms = through.cpu / len(through.whole) * 1000
    print(f"{name:<28} {'CPU of the host ms':<18} {'':>10} {cpu_ms:10.3f}", flush=True)
    figures[f"{name}, CPU of the host, ms a request"] = cpu_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--short", action="store_true", help="only one connection, one token")
    options = parser.parse_args()
    server = os.environ["LLAMA_SERVER_PATH"]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = [str(write_tiny_model(Path(folder) / f"{n}.gguf", seed=n)) for n in range(2)]
        service = Service(server, models[0], folder)
        try:
            print(f"{'':<28} {'':<18} {'direct':>10} {'through':>10}")
            kinds = {"1 token": SHORT} if options.short else {"1 token": SHORT, STREAMED: STREAM}
            for kind, body in kinds.items():
                for connections in (1,) if options.short else (1, 16):
                    samples = {service.direct: Sample(), service.url: Sample()}
                    for way in samples:
                        drive(way, body, connections, 0.3, service)  # warm
                    for number in range(options.rounds):
                        for way in list(samples)[:: 1 if number % 2 else -1]:
                            samples[way].add(
                                drive(way, body, connections, options.seconds, service)
                            )
                    name = f"{kind}, {connections} connection{'s' * (connections > 1)}"
                    compare(name, samples[service.direct], samples[service.url], figures)
            status_while_swapping(service, models, figures)
        finally:
            service.close()
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
