"""Metrics, counted on real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import AsyncOrchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import Problem
from orchestrator.http.metrics import Metrics
from orchestrator.machine.facts import Emptied, Exit, Exited, Fact, NotReady
from orchestrator.machine.states import State
from orchestrator.runtime.snapshot import Snapshot, StepReport
from tests.kit.http import PREFIX, Gate, Serve, is_at_gate, until
from tests.kit.machine.run import Run
from tests.kit.process.support import Background

LOAD = PREFIX + "/load"
Key = tuple[str, tuple[tuple[str, str], ...]]


def scrape(client: httpx.Client) -> dict[Key, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("llama_orchestrator_"), tuple(sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: dict[Key, float], name: str, **labels: Any) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def test_loads_reloads_and_exits_are_counted_once(serve: Serve, tiny_model: str) -> None:
    """Each load by its outcome, each exit by its cause."""
    with serve() as client:
        body = {"model_path": tiny_model}
        assert client.post(LOAD, json=body).json()["status"] == "loaded"
        assert client.post(LOAD, json=body).json()["status"] == "already_loaded"
        client.post(LOAD, json={**body, "max_seq_length": 512})
        bogus = {**body, "llama_extra_args": ["--seed", "bogus"]}
        assert client.post(LOAD, json=bogus).status_code == 424
        pid = client.post(LOAD, json=body).json()["pid"]
        os.kill(pid, signal.SIGKILL)
        until(client, lambda status: status["last_exit"] and status["state"] == "Idle")
        found = scrape(client)
    assert value(found, "loads_total", outcome="loaded") == 3
    assert value(found, "loads_total", outcome="already_loaded") == 1
    assert value(found, "loads_total", outcome="server_start_failed") == 1
    assert value(found, "reloads_total", field="max_seq_length") == 1
    assert value(found, "server_exits_total", how="stopped") == 2
    assert value(found, "server_exits_total", how="exit") == 1  # it refused the flag
    assert value(found, "server_exits_total", how="signal") == 1
    assert value(found, "generation") == 4
    for phase, times in (("spawn", 4), ("health", 4), ("download", 4)):
        assert value(found, "phase_seconds_count", phase=phase) == times, phase
        assert value(found, "phase_seconds_sum", phase=phase) > 0
    assert value(found, "phase_seconds_bucket", phase="health", le="+Inf") == 4


@pytest.mark.parametrize("is_exit_first", [True, False])
@pytest.mark.parametrize("found_dead", [True, False])
def test_exit_during_start_is_counted_once_whichever_fact_is_first(
    is_exit_first: bool, found_dead: bool
) -> None:
    """Two threads notice the same exit; a server that stalls is stopped by us."""
    metrics = Metrics(AsyncOrchestrator())
    run = Run()

    def do(fact: Fact) -> None:
        before = Snapshot(run.state, run.ctx, 0.0, 0.0)
        after = Snapshot(run.do(fact).state, run.ctx, 0.0, 0.0)
        metrics._count_step(StepReport(fact, before, after, tuple(run.commands)))

    run.load("A")
    run.go(State.WAITING_HEALTH)
    child, at = run.ctx.child, 1.0
    assert child is not None
    category = "server_start_failed" if found_dead else "stalled"
    not_ready = NotReady(child.generation, at, Problem(category, "it failed"))
    exited = Exited(child.generation, at, Exit(child.pid, 1))
    by_itself = found_dead or is_exit_first
    for fact in (exited, not_ready) if is_exit_first else (not_ready, exited):
        do(fact)
    do(Emptied(run.effect, at, Exit(child.pid, 1)))
    text = metrics.render().decode()
    assert ('exits_total{how="exit"} 1.0' in text) is by_itself
    assert ('exits_total{how="stopped"} 1.0' in text) is not by_itself


def test_failures_and_exits_begin_with_zero() -> None:
    """`increase()` does not see the first one of a series that begins with 1."""
    text = Metrics(AsyncOrchestrator()).render().decode()
    assert 'llama_orchestrator_loads_total{outcome="server_start_failed"} 0.0' in text
    for how in ("stopped", "exit", "signal", "unknown"):
        assert f'llama_orchestrator_server_exits_total{{how="{how}"}} 0.0' in text


def test_state_and_time_in_states_are_reported(serve: Serve, tiny_model: str) -> None:
    """One state is 1, and only its time increases."""
    with serve() as client:
        before = scrape(client)
        assert [value(before, "state", state=state) for state in State] == [1, 0, 0, 0, 0, 0]
        client.post(LOAD, json={"model_path": tiny_model})
        first, second = scrape(client), scrape(client)
        assert [value(first, "state", state=state) for state in State] == [0, 0, 0, 0, 0, 1]
    spent = [
        [value(found, "state_seconds_total", state=state) for state in State]
        for found in (first, second)
    ]
    assert min(spent[0]) > 0
    assert spent[1][:5] == spent[0][:5]
    assert spent[1][5] > spent[0][5]


def test_held_requests_and_leases_are_reported(serve: Serve, gate: Gate, tmp_path: Path) -> None:
    """A stream that is too long for any buffer holds its lease to the end."""
    model = write_tiny_model(tmp_path / "long.gguf", context_length=1 << 17)
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": str(model)})
        until(client, is_at_gate)
        held = Background(client.get, "/v1/models")
        until(client, lambda _: value(scrape(client), "held_requests") == 1)
        assert value(scrape(client), "leases") == 0
        gate.open()
        held.result()
        endless = {"prompt": "a", "max_tokens": 1_000_000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=endless) as stream:
            chunks = stream.iter_raw()  # a variable: the stream is closed with its iterator
            next(chunks)
            found = scrape(client)
            assert (value(found, "leases"), value(found, "held_requests")) == (1, 0)
        until(client, lambda _: value(scrape(client), "leases") == 0)


def test_scrapes_and_queries_do_not_postpone_idle_unload(serve: Serve, tiny_model: str) -> None:
    """B66: a metrics scrape kept the server loaded."""
    with serve(idle_ttl_s=0.3) as client:
        client.post(LOAD, json={"model_path": tiny_model})

        def is_idle(status: dict[str, Any]) -> bool:
            for path in ("/metrics", "/readyz", "/healthz", PREFIX + "/load-progress"):
                client.get(path)
            return bool(status["state"] == "Idle")

        assert "idle_expired" in " ".join(until(client, is_idle)["story"])
