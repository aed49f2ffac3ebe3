"""`demo`: everything on two tiny models it makes itself, with the process table as the witness.

It ends with 1 when ever more than one server was alive, or one is left, or a step went wrong. Its
slot, state folder and models are its own and are gone afterwards.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import click

from orchestrator.cli import logs, options
from orchestrator.cli.output import Failure, Part, say, say_json, state_line
from orchestrator.demo.timeline import Moment, Timeline
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.demo.witness import Witness
from orchestrator.errors import Cancelled, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.server.binaries import find_server
from orchestrator.server.slot import Slot

_T = TypeVar("_T")

_SLOT: Final = "demo"
_DEADLINE_S: Final = 120.0
_SHOWN: Final = 40  # characters of the answer
_REQUEST: Final[dict[str, Any]] = {
    "messages": [{"role": "user", "content": "Hello! Who are you?"}],
    "max_tokens": 24,
    "seed": 42,
}


@dataclass(slots=True)
class Summary:
    """What it comes to."""

    servers_alive_at_once_max: int = 0
    servers_left: int = 0
    servers_started: int = 0
    looks_at_process_table: int = 0
    loads: int = 0
    already_loaded: int = 0
    superseded: int = 0
    cancelled: int = 0
    answered_tokens: int = 0
    duration_s: float = 0.0
    unexpected: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        one_at_a_time = self.servers_alive_at_once_max == 1 and self.servers_left == 0
        return one_at_a_time and not self.unexpected


@click.command()
@click.option("--llama-server", default="auto", metavar="auto|embedded|PATH", show_default=True)
@options.json_option()
def demo(*, llama_server: str, as_json: bool) -> int:
    """Show everything on a tiny model, in a few seconds."""
    logs.configure("warning", "console")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave tidily
    try:
        with tempfile.TemporaryDirectory(prefix="llama-orchestrator-demo-") as folder:
            return _Demo(Path(folder), llama_server, as_json=as_json).run()
    except OrchestratorError as error:
        raise Failure(error.problem.as_dict(), as_json=as_json) from error
    except ImportError as error:
        members = {"category": "missing", "title": "A package is missing", "detail": str(error)}
        raise Failure(members, as_json=as_json) from error


class _Demo:
    """One run. `say` is silent when the result is printed as JSON."""

    def __init__(self, folder: Path, llama_server: str, *, as_json: bool) -> None:
        self._as_json = as_json
        self._models = [  # what this needs brings a server with it, too
            str(write_tiny_model(folder / f"{name}.gguf", seed=seed))
            for seed, name in enumerate(("left", "right"))
        ]
        self._binary = find_server(llama_server)
        self._orch = Orchestrator(llama_server=llama_server, slot=_SLOT, state_dir=folder)
        self._token = Slot(_SLOT, folder).token
        self._began_at = time.time()
        self._summary = Summary()
        self._steps: list[dict[str, Any]] = []

    def run(self) -> int:
        self._say()
        kind = "the embedded llama.cpp" if self._binary.kind == "embedded" else "llama-server"
        self._say(
            ("llama-orchestrator demo", "bold"),
            (f"   two tiny models of random weights, {kind}", "dim"),
        )
        with Witness(self._token) as witness:
            with ThreadPoolExecutor(2) as pool, self._orch as orch:
                self._pool = pool
                self._timeline = Timeline(orch, began_at=self._began_at, tell=self._tell)
                for step in (
                    *(self._load, self._ask, self._apply_twice),
                    *(self._cancel, self._load_again, self._unload),
                ):
                    step()
            self._timeline.ended()
            self._summary.servers_left = witness.look()
        self._sum_up(witness)
        return 0 if self._summary.is_good else 1

    # -------------------------------------------------------------------------------- the steps

    def _load(self) -> None:
        self._title("Load a model")
        outcome = self._orch.load(self._models[0], deadline_s=_DEADLINE_S)
        self._loaded(outcome)

    def _ask(self) -> None:
        self._title("Ask it something")
        question = _REQUEST["messages"][0]["content"]
        self._say("  → POST /v1/chat/completions  ", (f"“{question}”", "bold"))
        with self._orch.lease() as server:
            took_ms, (status, answer) = _timed(lambda: _post(server.base_url, _REQUEST))
        if status != http.client.OK:
            self._unexpected(f"the chat request was answered with {status}: {answer}")
            return
        text = answer["choices"][0]["message"]["content"]
        tokens = int(answer["usage"]["completion_tokens"])
        self._summary.answered_tokens = tokens
        self._steps[-1] |= {"request": _REQUEST, "answer": text, "tokens": tokens, "ms": took_ms}
        self._say("  ← ", (f"“{text[:_SHOWN]}…”", "bold"), ("  noise, as its weights are", "dim"))
        self._say((f"    {tokens} tokens in {took_ms:,.0f} ms", "dim"))

    def _apply_twice(self) -> None:
        """The accident this project grew out of: it used to leave two servers."""
        self._title("Press Apply twice, with different settings")
        clicks = [(self._models[0], 512), (self._models[1], 1024)]
        mark = self._timeline.caught_up()
        answers = []
        for model, context in clicks:
            answers.append(self._pool.submit(self._apply, model, context))
            self._timeline.reached(State.KILLING, after=mark, timeout_s=_DEADLINE_S)
        settled = [self._settled(answer) for answer in answers]
        self._timeline.caught_up()
        for number, ((model, context), result) in enumerate(zip(clicks, settled, strict=True), 1):
            name = f"{Path(model).name}, context {context}"
            self._result(f"click {number}: {name}", result)
        self._steps[-1]["outcomes"] = [_told(result) for result in settled]

    def _cancel(self) -> None:
        self._title("Change your mind while it loads")
        mark = self._timeline.caught_up()
        answer = self._pool.submit(
            self._orch.load, self._models[0], load_request_id="demo", deadline_s=_DEADLINE_S
        )
        self._timeline.reached(State.SPAWNING, after=mark, timeout_s=_DEADLINE_S)
        began = time.perf_counter()
        self._orch.cancel("demo")
        result = self._settled(answer)
        took_ms = (time.perf_counter() - began) * 1000
        self._timeline.caught_up()
        self._result(f"cancel, settled in {took_ms:,.0f} ms", result)
        self._steps[-1] |= {"outcome": _told(result), "ms": took_ms}

    def _load_again(self) -> None:
        self._title("Load it again, and once more")
        first = self._orch.load(self._models[0], deadline_s=_DEADLINE_S)
        self._loaded(first)
        took_ms, second = _timed(lambda: self._orch.load(self._models[0], deadline_s=_DEADLINE_S))
        same = "the same pid" if second.pid == first.pid else f"another pid, {second.pid}"
        if second.status != "already_loaded" or second.pid != first.pid:
            self._unexpected(f"the same load again was answered with {second.status}, {same}")
        self._summary.already_loaded += second.status == "already_loaded"
        self._say(("  ✓ ", "green"), second.status, (f"  {same}, {took_ms:.1f} ms", "dim"))
        self._steps[-1] |= {"again": _told(second), "ms": took_ms}

    def _unload(self) -> None:
        self._title("Unload")
        answer = self._orch.unload()
        self._timeline.caught_up()
        self._say(("  ✓ ", "green"), answer.status, ("  the slot is verified empty", "dim"))
        self._steps[-1]["outcome"] = answer.as_dict()

    # ------------------------------------------------------------------------------- helpers

    def _apply(self, model: str, context: int) -> LoadOutcome:
        return self._orch.load(model, max_seq_length=context, deadline_s=_DEADLINE_S)

    def _settled(self, answer: Future[LoadOutcome]) -> LoadOutcome | OrchestratorError:
        """Return what became of a load, and count it."""
        try:
            outcome = answer.result()
        except Superseded as error:
            self._summary.superseded += 1
            return error
        except Cancelled as error:
            self._summary.cancelled += 1
            return error
        self._summary.loads += 1
        return outcome

    def _loaded(self, outcome: LoadOutcome) -> None:
        self._timeline.caught_up()
        self._summary.loads += 1
        self._steps[-1]["outcome"] = outcome.as_dict()
        self._result(Path(outcome.model_path).name, outcome)

    # ------------------------------------------------------------------------------- output

    def _say(self, *parts: Part) -> None:
        if not self._as_json:
            say(*parts)

    def _title(self, title: str) -> None:
        self._timeline.caught_up()
        self._steps.append({"step": title})
        self._say()
        self._say((f"{len(self._steps)}  {title}", "bold cyan"))

    def _tell(self, moment: Moment) -> None:
        self._say(*state_line(moment.ms, moment.state, moment.pid))

    def _result(self, what: str, result: LoadOutcome | OrchestratorError) -> None:
        if isinstance(result, LoadOutcome):
            total_ms = result.timings_s.total * 1000
            detail = f"  pid {result.pid}, context {result.context_length}, {total_ms:,.0f} ms"
            self._say(("  ✓ ", "green"), what, ("  loaded", "green"), (detail, "dim"))
        else:
            self._say(("  ✗ ", "yellow"), what, (f"  {result.category}", "yellow"))

    def _unexpected(self, what: str) -> None:
        self._summary.unexpected.append(what)
        self._say(("  ✗ ", "bold red"), what)

    def _sum_up(self, witness: Witness) -> None:
        summary = self._summary
        summary.servers_alive_at_once_max = witness.most
        in_events = {moment.pid for moment in self._timeline.moments if moment.pid is not None}
        summary.servers_started = len(in_events | witness.pids)
        summary.looks_at_process_table = witness.looks
        summary.duration_s = round(time.time() - self._began_at, 3)
        if self._as_json:
            timeline = [asdict(moment) for moment in self._timeline.moments]
            members = {"ok": summary.is_good, "server": self._binary.kind, "timeline": timeline}
            say_json(members | {"steps": self._steps, "summary": asdict(summary)})
            return
        style = "bold green" if summary.is_good else "bold red"
        self._say()
        self._say(
            (f"Servers alive at once: {witness.most} at most", style),
            f" · {summary.servers_started} started, ",
            (f"{summary.servers_left} left", style),
            (f" · {witness.looks:,} looks at the process table", "dim"),
        )
        counts = ("loads", "superseded", "cancelled", "already_loaded")
        told = [f"{getattr(summary, name)} {name.replace('_', ' ')}" for name in counts]
        self._say((" · ".join([*told, f"{summary.duration_s:.1f} s"]), "dim"))


def _told(result: LoadOutcome | OrchestratorError) -> dict[str, Any]:
    return result.as_dict() if isinstance(result, LoadOutcome) else result.problem.as_dict()


def _timed(work: Callable[[], _T]) -> tuple[float, _T]:
    """Return how long it took, in ms, and its result."""
    began = time.perf_counter()
    result = work()
    return (time.perf_counter() - began) * 1000, result


def _post(base_url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    where = urlsplit(base_url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_DEADLINE_S)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
