"""`demo`: the main features on two tiny models, while a witness watches the process table.

It fails if two servers were ever alive at once, if one is left, or if a step went wrong. Its slot,
state folder and models are its own, and are removed at the end.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import click

from orchestrator.cli import logs, options
from orchestrator.cli.client import Remote
from orchestrator.cli.output import Failure, Part, say, say_json, state_line
from orchestrator.demo.observers import Timeline, Witness
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import Cancelled, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.server.binaries import find_server
from orchestrator.server.slot import Slot

_SLOT: Final = "demo"
_DEADLINE_S: Final = 120.0
_SHOWN_CHARACTERS: Final = 40
_REQUEST: Final[dict[str, Any]] = {
    "messages": [{"role": "user", "content": "Hello! Who are you?"}],
    "max_tokens": 24,
    "seed": 42,
}


@click.command(params=[options.JSON])
@click.option("--llama-server", default="auto", metavar="auto|embedded|PATH", show_default=True)
def demo(*, llama_server: str, as_json: bool) -> int:
    """Show the main features on two tiny models, in a few seconds."""
    logs.configure("warning")
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up
    try:
        with tempfile.TemporaryDirectory(prefix="llama-orchestrator-demo-") as folder:
            return _Demo(Path(folder), llama_server, as_json=as_json).run()
    except OrchestratorError as error:
        raise Failure(error.problem.as_dict()) from error
    except ImportError as error:
        problem = {"category": "missing", "title": "A package is missing", "detail": str(error)}
        raise Failure(problem) from error


class _Demo:
    def __init__(self, folder: Path, llama_server: str, *, as_json: bool) -> None:
        self._as_json = as_json
        self._models = [  # first, because the package it needs brings a server too
            str(write_tiny_model(folder / f"{name}.gguf", seed=seed))
            for seed, name in enumerate(("left", "right"))
        ]
        self._binary = find_server(llama_server)
        self._orch = Orchestrator(llama_server=llama_server, slot=_SLOT, state_dir=folder)
        self._token = Slot(_SLOT, folder).token
        self._began_at = time.time()
        self._counts = Counter(loads=0, already_loaded=0, superseded=0, cancelled=0)
        self._tokens = 0
        self._unexpected: list[str] = []
        self._steps: list[dict[str, Any]] = []

    def run(self) -> int:
        server = "the embedded llama.cpp" if self._binary.kind == "embedded" else "llama-server"
        about = f"   two tiny models with random weights, on {server}"
        self._say()
        self._say(("llama-orchestrator demo", "bold"), (about, "dim"))
        with Witness(self._token) as witness:
            with ThreadPoolExecutor(2) as pool, self._orch as orch:
                self._pool = pool
                self._timeline = Timeline(orch, self._began_at, self._say_moment)
                self._load("Load a model")
                self._chat()
                self._apply_twice()
                self._cancel()
                self._load_again()
                self._unload()
            self._timeline.thread.join()  # it ends with the orchestrator
            return 0 if self._sum_up(witness, witness.look()) else 1

    def _load(self, title: str) -> LoadOutcome:
        self._begin(title)
        outcome = self._orch.load(self._models[0], deadline_s=_DEADLINE_S)
        self._counts["loads"] += 1
        self._steps[-1]["outcome"] = self._say_result(Path(outcome.model_path).name, outcome)
        return outcome

    def _chat(self) -> None:
        self._begin("Send it a chat request")
        question = _REQUEST["messages"][0]["content"]
        self._say("  → POST /v1/chat/completions  ", (f"“{question}”", "bold"))
        began = time.perf_counter()
        try:
            with self._orch.lease() as lease:
                server = Remote(lease.base_url, lease.api_key)
                answer = server.post("/v1/chat/completions", _REQUEST, timeout_s=_DEADLINE_S)
        except Failure as error:
            self._fail(f"the chat request failed: {error}")
            return
        took_ms = _ms_since(began)
        text = answer["choices"][0]["message"]["content"]
        tokens = self._tokens = int(answer["usage"]["completion_tokens"])
        self._steps[-1] |= {"request": _REQUEST, "answer": text, "tokens": tokens, "ms": took_ms}
        start = f"“{text[:_SHOWN_CHARACTERS]}…”"
        self._say("  ← ", (start, "bold"), ("  noise: its weights are random", "dim"))
        self._say((f"    {tokens} tokens in {took_ms:,.0f} ms", "dim"))

    def _apply_twice(self) -> None:
        """A user who clicks Apply twice: the accident that used to leave two servers."""
        self._begin("Apply twice, with different settings")
        mark = self._timeline.catch_up()
        clicks = {}
        for number, (model, context) in enumerate(zip(self._models, (512, 1024), strict=True), 1):
            click = f"click {number}: {Path(model).name}, context {context}"
            clicks[click] = self._submit(model, max_seq_length=context)
            self._timeline.wait_for(State.KILLING, after=mark, timeout_s=_DEADLINE_S)
        results = [(click, self._settled(load)) for click, load in clicks.items()]
        self._steps[-1]["outcomes"] = [self._say_result(*result) for result in results]

    def _cancel(self) -> None:
        self._begin("Cancel a load")
        mark = self._timeline.catch_up()
        load = self._submit(self._models[0], load_request_id="demo")
        self._timeline.wait_for(State.SPAWNING, after=mark, timeout_s=_DEADLINE_S)
        began = time.perf_counter()
        self._orch.cancel("demo")
        result = self._settled(load)
        took_ms = _ms_since(began)
        outcome = self._say_result(f"cancel, settled in {took_ms:,.0f} ms", result)
        self._steps[-1] |= {"outcome": outcome, "ms": took_ms}

    def _load_again(self) -> None:
        first = self._load("Load it, and load it again")
        began = time.perf_counter()
        second = self._orch.load(self._models[0], deadline_s=_DEADLINE_S)
        took_ms = _ms_since(began)
        pid = "the same pid" if second.pid == first.pid else f"another pid, {second.pid}"
        if second.status != "already_loaded" or second.pid != first.pid:
            self._fail(f"the second load was answered with {second.status}, {pid}")
        self._counts["already_loaded"] += second.status == "already_loaded"
        self._say(("  ✓ ", "green"), second.status, (f"  {pid}, {took_ms:.1f} ms", "dim"))
        self._steps[-1] |= {"again": second.as_dict(), "ms": took_ms}

    def _unload(self) -> None:
        self._begin("Unload it")
        self._steps[-1]["outcome"] = self._orch.unload().as_dict()
        self._timeline.catch_up()
        self._say(("  ✓ ", "green"), "unloaded", ("  the slot is verified empty", "dim"))

    def _submit(self, model: str, **settings: Any) -> Future[LoadOutcome]:
        return self._pool.submit(self._orch.load, model, deadline_s=_DEADLINE_S, **settings)

    def _settled(self, load: Future[LoadOutcome]) -> LoadOutcome | OrchestratorError:
        """Wait for the result of a load, and count it."""
        try:
            outcome = load.result()
        except (Superseded, Cancelled) as error:
            self._counts[error.category] += 1
            return error
        self._counts["loads"] += 1
        return outcome

    def _begin(self, title: str) -> None:
        self._steps.append({"step": title})
        self._say()
        self._say((f"{len(self._steps)}  {title}", "bold cyan"))

    def _say(self, *parts: Part) -> None:
        if not self._as_json:
            say(*parts)

    def _say_moment(self, moment: dict[str, Any]) -> None:
        self._say(*state_line(moment["ms"], State(moment["state"]), moment["pid"]))

    def _say_result(self, what: str, result: LoadOutcome | OrchestratorError) -> dict[str, Any]:
        """Print the result of a load after its transitions, and return it for JSON."""
        self._timeline.catch_up()
        if isinstance(result, OrchestratorError):
            self._say(("  ✗ ", "yellow"), what, (f"  {result.category}", "yellow"))
            return result.problem.as_dict()
        total_ms = result.timings_s.total * 1000
        detail = f"  pid {result.pid}, context {result.context_length}, {total_ms:,.0f} ms"
        self._say(("  ✓ ", "green"), what, ("  loaded", "green"), (detail, "dim"))
        return result.as_dict()

    def _fail(self, what: str) -> None:
        self._unexpected.append(what)
        self._say(("  ✗ ", "bold red"), what)

    def _sum_up(self, witness: Witness, servers_left: int) -> bool:
        """Print what was observed, and return whether that is as it should be."""
        is_good = witness.most == 1 and servers_left == 0 and not self._unexpected
        moments = self._timeline.moments
        started = len({m["pid"] for m in moments if m["pid"] is not None} | witness.pids)
        duration_s = round(time.time() - self._began_at, 3)
        if self._as_json:
            summary = {
                "servers_alive_at_once_max": witness.most,
                "servers_left": servers_left,
                "servers_started": started,
                "looks_at_process_table": witness.looks,
                **self._counts,
                "answered_tokens": self._tokens,
                "duration_s": duration_s,
                "unexpected": self._unexpected,
            }
            run = {"ok": is_good, "server": self._binary.kind, "timeline": moments}
            say_json({**run, "steps": self._steps, "summary": summary})
            return is_good
        style = "bold green" if is_good else "bold red"
        self._say()
        self._say(
            (f"Servers alive at once: {witness.most} at most", style),
            f" · {started} started, ",
            (f"{servers_left} left", style),
            (f" · {witness.looks:,} looks at the process table", "dim"),
        )
        counts = [f"{count} {name.replace('_', ' ')}" for name, count in self._counts.items()]
        self._say((" · ".join([*counts, f"{duration_s:.1f} s"]), "dim"))
        return is_good


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
