"""Random use of `serve --models` by 16 clients while servers, keepers and the service are killed.

`soak` runs it and returns a report; `python -m tests.kit.process.pool_soak 5000` prints it. There
is room for two of the four models. The service keeps its servers: the next one adopts them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import operator
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.command import Running
from tests.kit.fake_hub import Hub, Repo
from tests.kit.process.servers import servers_of
from tests.kit.process.support import Background, keepers_of, pinned, until, watched

CLIENTS: Final = 16
ROOM: Final = 2
FILES: Final = ("red", "green", "blue")
HUB: Final = "far"
NAMES: Final = (*FILES, HUB)
DRAIN_S: Final = 60.0  # longer than any answer
_KILL_EVERY_S: Final = 1.5
_PIECES: Final = (8, 64, 200)
EXPECTED: Final = {
    "cancelled": "an unload, a cancel or a cut came first",
    "server_start_failed": "it was killed while it loaded",
    "server_exited": "it was killed",
    "bad_gateway": "it was killed in the middle of an answer",
    "lost": "the service was killed",
    "not_loaded": "an unload came between the load and the request",
    "superseded": "a load of the changed entry came",
    "unavailable": "its keeper was killed as it started the server",
}


@dataclass(slots=True)
class Blame:
    """What was done on purpose, and may have ended an answer.

    Attributes:
        answers: Set unless the service is away.
    """

    _done: list[tuple[float, str | None]] = field(default_factory=list)  # when it had ended
    _begun: list[str | None] = field(default_factory=list)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    answers: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.answers.set()

    @contextlib.contextmanager
    def of(self, model: str | None) -> Iterator[None]:
        """While it is done; None: it may hit any model."""
        with self._guard:
            self._begun.append(model)
        try:
            yield
        finally:
            with self._guard:
                self._begun.remove(model)
                self._done.append((time.monotonic(), model))

    def has(self, model: str, since: float) -> bool:
        with self._guard:
            hits = [hit for at, hit in self._done if at >= since] + self._begun
            return not self.answers.is_set() or model in hits or None in hits

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """While nobody answers."""
        with self.of(None):
            self.answers.clear()
            try:
                yield
            finally:
                self.answers.set()


class Service:
    """`serve --models` in a process of its own, again and again."""

    def __init__(self, folder: Path, server: str, endpoint: str) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.file = folder / "models.toml"
        self.lives = 0
        self.adopted = 0
        self._server = server
        self._env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
        self._env["TMPDIR"] = str(folder / "tmp")
        for name in ("state", "tmp", "hf"):
            (folder / name).mkdir(mode=0o700)
        for number, name in enumerate(FILES):
            write_tiny_model(folder / f"{name}.gguf", seed=number)
        self.write(1024)
        self.start()

    def write(self, context: int) -> None:
        """Replace the catalogue; another context of one model changes that entry."""
        room = 'memory = "250 MiB"\ncache_ram_mib = 100\nmin_resident_s = 0.5\nmax_wait_s = 2\n'
        entries = {name: f'model_path = "{self.folder / name}.gguf"\n' for name in FILES}
        entries[HUB] = 'model_path = "org/far"\n'
        entries["red"] += f"max_seq_length = {context}\n"
        tables = (
            f'[models.{name}]\nmemory = "104 MiB"\nllama_extra_args = ["-t", "1"]\n{entry}'
            for name, entry in entries.items()
        )
        temporary = self.folder / f"{threading.get_ident()}.toml"
        temporary.write_text(f"[pool]\n{room}" + "".join(tables))
        temporary.replace(self.file)

    def start(self) -> None:
        """Start it; a predecessor that was killed has left its servers."""
        given: tuple[str, ...] = ("serve", "--json", "--models", str(self.file), "--port", "0")
        given += ("--state-dir", str(self.state_dir), "--llama-server", self._server)
        given += ("--on-host-exit", "keep", "--drain-timeout", f"{DRAIN_S:g}", "--kill-grace", "2")
        self.running = Running(*given, **self._env)
        self.url: str = self.running.json_line()["url"]
        self.lives += 1
        for name in NAMES:
            loaded = self.asked("GET", f"/api/models/{name}/status").json()["loaded"]
            self.adopted += bool(loaded and loaded.get("adopted"))

    def kill(self) -> None:
        self.running.process.kill()
        self.running.close()

    @property
    def pid(self) -> int:
        return self.running.process.pid

    def asked(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return httpx.request(method, self.url + path, json=body, timeout=120, trust_env=False)

    def held(self) -> Held:
        process = psutil.Process(self.pid)
        files = sum(1 for folder in ("state", "tmp") for _ in (self.folder / folder).rglob("*"))
        return Held(
            process.num_fds(), process.num_threads(), files, process.memory_info().rss >> 10
        )


@dataclass(frozen=True, slots=True)
class Held:
    """What the service holds at rest."""

    descriptors: int
    threads: int
    files: int
    resident_kib: int

    def is_within(self, most: Held) -> bool:
        """Whether there is no more of what can be counted."""
        mine = (self.descriptors, self.threads, self.files)
        return all(map(operator.le, mine, (most.descriptors, most.threads, most.files)))


class Failed(Exception):
    """An answer that is an error."""


class Client:
    """One client's share of the operations."""

    def __init__(self, service: Service, blame: Blame, seed: int) -> None:
        self.service, self.blame = service, blame
        self.dice = random.Random(seed)
        self.answers: collections.Counter[str] = collections.Counter()
        self.operations = (
            *((self.chat, 30), (self.stream, 30), (self.load, 8), (self.unload, 4), (self.cut, 3)),
            *(
                (self.cancel, 4),
                (self.plan, 4),
                (self.prefetch, 3),
                (self.reread, 4),
                (self.read, 10),
            ),
        )

    def run(self, count: int, mean_pause_s: float) -> None:
        calls, weights = zip(*self.operations, strict=True)
        pause = threading.Event()
        for call in self.dice.choices(calls, weights, k=count):
            pause.wait(self.dice.expovariate(1 / mean_pause_s))
            self.blame.answers.wait()
            begun, name = time.monotonic(), self.dice.choice(NAMES)
            try:
                call(name)
                answer = call.__name__
            except httpx.TransportError as error:
                if not self.blame.has(name, begun):
                    raise AssertionError(f"{call.__name__} {name}: {error!r}") from error
                answer = "lost"
            except Failed as error:
                answer = str(error)
            self.answers[answer] += 1

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.service.asked(method, path, body)
        is_json = "json" in answer.headers.get("content-type", "")
        found: Any = answer.json() if is_json else answer.text
        if answer.is_success:
            return found
        category = found.get("category") or found.get("error", {}).get("code")
        if category not in EXPECTED:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
        raise Failed(category)

    def question(self, name: str, **more: Any) -> dict[str, Any]:
        return {"model": name, "messages": [{"role": "user", "content": "hello"}], **more}

    def chat(self, name: str) -> None:
        found = self.ask("POST", "/v1/chat/completions", self.question(name, max_tokens=4))
        assert found["model"] == name

    def stream(self, name: str) -> None:
        begun = time.monotonic()
        body = self.question(name, max_tokens=self.dice.choice(_PIECES), stream=True)
        url = self.service.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
            text = answer.read().decode()
        if not answer.is_success:
            category = json.loads(text)["error"]["code"]
            assert category in EXPECTED, text
            raise Failed(category)
        if "data: [DONE]" not in text:
            assert self.blame.has(name, begun), f"a stream of {name} was cut: {text[-500:]}"
            raise Failed("server_exited")

    def load(self, name: str) -> None:
        self.ask("POST", f"/api/models/{name}/load", {"force_reload": self.dice.random() < 0.3})

    def prefetch(self, _: str) -> None:
        self.ask("POST", f"/api/models/{HUB}/load", {"prefetch": True})

    def unload(self, name: str) -> None:
        self.ask("POST", f"/api/models/{name}/unload")

    def cut(self, name: str) -> None:
        with self.blame.of(name):
            self.ask("POST", f"/api/models/{name}/unload", {"cut": True})

    def cancel(self, name: str) -> None:
        self.ask("POST", f"/api/models/{name}/cancel")

    def plan(self, name: str) -> None:
        self.ask("POST", f"/api/models/{name}/plan")

    def reread(self, _: str) -> None:
        self.service.write(self.dice.choice([1024, 2048]))
        self.ask("POST", "/api/catalogue")

    def read(self, name: str) -> None:
        [budget] = self.ask("GET", "/api/models")["budget"]
        assert budget["reserved_mib"] <= budget["total_mib"]
        self.ask("GET", f"/api/models/{name}/logs")
        self.ask("GET", "/metrics")


class Saboteur:
    """Sends SIGKILL to servers, keepers and the service in turn, to any of them."""

    def __init__(self, service: Service, blame: Blame, seed: int, victims: tuple[str, ...]) -> None:
        self._service, self._blame, self._victims = service, blame, victims
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self.killed: collections.Counter[str] = collections.Counter()
        self._work = Background(self._run)

    def stop(self) -> None:
        self._over.set()
        self._work.result(120)

    def _run(self) -> None:
        for victim in itertools.cycle(self._victims):
            is_done = False
            while not is_done:
                if self._over.wait(_KILL_EVERY_S):
                    return
                is_done = getattr(self, victim)()
            self.killed[victim] += 1

    def server(self) -> bool:
        models = self._service.asked("GET", "/api/models").json()["models"]
        alive = [(one["name"], one["pid"]) for one in models if one["pid"] is not None]
        if not alive:
            return False
        name, pid = self._dice.choice(alive)
        with contextlib.suppress(ProcessLookupError), pinned(pid) as fd:
            shown = self._service.asked("GET", f"/api/models/{name}").json()
            if shown["pid"] == pid:
                with self._blame.of(name):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    select.select([fd], [], [])  # until it has ended
                return True
        return False

    def keeper(self) -> bool:
        keepers = keepers_of(self._service.pid)
        if not keepers:
            return False
        keeper = self._dice.choice(keepers)
        with self._blame.of(None), contextlib.suppress(ProcessLookupError, psutil.Error):
            servers = psutil.Process(keeper).children()
            os.kill(keeper, signal.SIGKILL)
            psutil.wait_procs(servers)
        return True

    def service(self) -> bool:
        with self._blame.outage():
            self._service.kill()
            self._service.start()
        return True


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one run."""

    operations: int
    seconds: float
    answers: collections.Counter[str]
    killed: collections.Counter[str]
    lives: int
    adopted: int
    servers: int
    pairs: int
    most: int
    looks: int
    left: int
    warm: Held
    cold: Held

    def __str__(self) -> str:
        def told(counts: collections.Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in counts.most_common())

        grown = {
            name: getattr(self.cold, name) - getattr(self.warm, name) for name in Held.__slots__
        }
        return (
            f"{self.operations} operations from {CLIENTS} clients in {self.seconds:.0f} s, "
            f"{self.servers} servers, {self.lives} services, {self.adopted} adoptions\n"
            f"  {told(self.answers)}\n  killed: {told(self.killed)}\n"
            f"  two of one model: {self.pairs} (in {self.looks} scans of the process table), "
            f"most servers at once: {self.most}, left: {self.left}\n"
            f"  grown since the warm-up of the last service: {grown}"
        )


def soak(
    folder: Path, server: str, operations: int, *, mean_pause_s: float = 0.3, seed: int = 0
) -> Report:
    """Run this many operations: most with every fault, the rest on one service, to see it grow."""
    blame, killed = Blame(), collections.Counter[str]()
    with Hub() as hub:
        hub.add(Repo("org/far", {"far-Q8_0.gguf": write_tiny_model(folder / "f.gguf", seed=9)}))
        service = Service(folder, server, hub.endpoint)
        clients = [Client(service, blame, seed * CLIENTS + n) for n in range(CLIENTS)]

        def run(count: int, *victims: str) -> None:
            saboteur = Saboteur(service, blame, seed, victims)
            try:
                with ThreadPoolExecutor(CLIENTS) as threads:
                    each = [count // CLIENTS] * CLIENTS
                    list(threads.map(Client.run, clients, each, [mean_pause_s] * CLIENTS))
            finally:
                saboteur.stop()
                killed.update(saboteur.killed)

        def at_rest(most: Held | None = None) -> Held:
            """Wait for idle servers, and for what ends a while after its work."""
            for name in NAMES:
                until(functools.partial(is_idle, service, name), f"{name} is at rest", 120)

            def within() -> Held | None:
                held = service.held()
                return held if most is None or held.is_within(most) else None

            return until(within, f"no more than {most}")

        with watched(service.state_dir, folder / "watched.json") as report:
            begun = time.monotonic()
            try:
                run(operations * 3 // 5, "service", "keeper", "server")
                run(operations // 5, "server", "keeper")
                warm = at_rest()
                run(operations // 5, "server", "keeper")
                cold = at_rest(warm)
                seconds = time.monotonic() - begun
                assert service.running.signal(signal.SIGTERM) == 0
            finally:
                service.running.close()
            left = servers_of(service.state_dir)
            seen = report()
    return Report(
        operations,
        seconds,
        sum((client.answers for client in clients), collections.Counter()),
        killed,
        service.lives,
        service.adopted,
        len(seen["seen"]),
        len(seen["pairs"]),
        seen["most"],
        seen["looks"],
        len(left | set(seen["left"])),
        warm,
        cold,
    )


def is_idle(service: Service, name: str) -> bool:
    """Unload a model, and return whether nothing is left of it."""
    service.asked("POST", f"/api/models/{name}/unload")
    shown = service.asked("GET", f"/api/models/{name}").json()
    return bool(shown["state"] == "Idle" and not shown["leases"] and not shown["waiting"])


def main(operations: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), os.environ["LLAMA_SERVER_PATH"], operations))


if __name__ == "__main__":
    main(int(sys.argv[1]))
