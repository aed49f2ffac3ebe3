"""How long other clients wait for `/status` while one client without a key attacks `serve`.

`python -m tests.bench.attack_bench` prints a table; `--json FILE` writes the figures. The attacker
is a process of its own that sends as fast as it can, so on two cores it takes one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.bench import Figures, milliseconds

SECONDS = 8.0
PAUSE_S = 0.005
KEY = "bench"
DESCRIPTORS = 1024
SILENT = 1200
CHUNK = b"x" * 16_384
Address = tuple[str, int]


def quiet(_: Address) -> None:
    """Nobody attacks."""
    signal.pause()


def send(address: Address, start: bytes, more: bytes) -> None:
    """Send a beginning, and more until the connection ends."""
    with contextlib.suppress(OSError), socket.create_connection(address) as connection:
        connection.sendall(start)
        while True:
            connection.sendall(more)


def endless_heads(address: Address) -> None:
    while True:
        send(address, b"GET / HTTP/1.1\r\n", b"x: " + CHUNK + b"\r\n")


def endless_targets(address: Address) -> None:
    while True:
        send(address, b"GET /", CHUNK)


def endless_bodies(address: Address) -> None:
    head = b"POST /api/inference/load HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Authorization: Bearer %s\r\nContent-Type: application/json\r\n" % KEY.encode()
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        send(address, head, b"4000\r\n" + CHUNK + b"\r\n")


def small_pieces(address: Address) -> None:
    """A head byte by byte."""
    while True:
        send(address, b"GET / HTTP/1.1\r\nx: ", b"x")


def silent_connections(address: Address, begin: bytes = b"") -> None:
    """More than the server has descriptors, a hundred each second."""
    kept = []
    while True:
        with contextlib.suppress(OSError):
            kept.append(socket.create_connection(address))
            kept[-1].sendall(begin)
        time.sleep(0.01)
        if len(kept) > SILENT:
            kept.pop(0).close()


def slow_heads(address: Address) -> None:
    """The same, and each begins a request that it does not end."""
    silent_connections(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n")


def reconnects(address: Address) -> None:
    """Connections without end, as fast as they can be opened."""
    kept = []
    while True:
        with contextlib.suppress(OSError):
            kept.append(socket.create_connection(address))
        if len(kept) > SILENT:
            kept.pop(0).close()


def wrong_keys(address: Address) -> None:
    """Requests on one connection, each refused."""
    request = b"GET /api/inference/status HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: no\r\n\r\n"
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address) as connection:
            while True:
                connection.sendall(request)
                connection.recv(65536)


ATTACKS: tuple[Callable[[Address], None], ...] = (
    quiet,
    endless_heads,
    endless_targets,
    endless_bodies,
    small_pieces,
    silent_connections,
    slow_heads,
    reconnects,
    wrong_keys,
)


@contextlib.contextmanager
def serving() -> Iterator[Address]:
    """Run `serve` with few descriptors; yield its address."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "--port", "0"]
        process = subprocess.Popen(
            [*command, "--state-dir", state, "--llama-server", "embedded", "--log-level", "error"],
            env={**os.environ, "LLAMA_ORCHESTRATOR_API_KEY": KEY},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS,) * 2),
        )
        assert process.stdout is not None
        url = next(line for line in process.stdout if "API" in line).split()[1]
        try:
            yield "127.0.0.1", int(url.split(":")[2].split("/")[0])
        finally:
            process.terminate()
            process.wait()


def waits(address: Address) -> tuple[list[float], list[float]]:
    """Return how many milliseconds requests took, on new connections and on a kept one."""
    new, kept = [], []
    connection = http.client.HTTPConnection(*address, timeout=30)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        kept.append(milliseconds(lambda: ask(connection)))
        other = http.client.HTTPConnection(*address, timeout=30)
        new.append(milliseconds(lambda: ask(other)))  # noqa: B023 (called here)
        other.close()
        time.sleep(PAUSE_S)
    return sorted(new), sorted(kept)


def ask(connection: http.client.HTTPConnection) -> None:
    """Ask for the status, again if an idle connection had to make room for another one."""
    try:
        connection.request("GET", "/api/inference/status", headers={"X-Api-Key": KEY})
        assert connection.getresponse().read()
    except ConnectionError:
        connection.close()
        ask(connection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    figures = Figures()
    given = parser.parse_args()
    for attack in ATTACKS:
        with serving() as address:
            attacker = multiprocessing.Process(target=attack, args=(address,), daemon=True)
            attacker.start()
            for kind, took in zip(("new", "kept"), waits(address), strict=True):
                name = f"{attack.__name__.replace('_', ' ')}, {kind} connection"
                figures.add(f"{name}: p50", took[len(took) // 2], "ms")
                goal = "" if attack is reconnects and kind == "new" else "< 50"
                figures.add(f"{name}: p99", took[len(took) * 99 // 100], "ms", goal)
            attacker.kill()
            attacker.join()
    figures.write(given.json)


if __name__ == "__main__":
    main()
