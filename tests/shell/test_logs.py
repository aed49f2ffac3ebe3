"""Logging: one line for each transition, with the generation of its load, and no secrets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator import OrchestratorError
from tests.kit.shell.harness import Harness

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture
def log(failures: list[Any], harness: Harness) -> Iterator[list[Any]]:
    """Everything that is logged."""
    structlog.reset_defaults()
    with capture_logs() as entries:
        yield entries


def of(entries: list[Any], event: str) -> list[Any]:
    return [entry for entry in entries if entry["event"] == event]


def test_each_transition_is_one_log_line(log: list[Any], harness: Harness) -> None:
    with harness.sync() as orch:
        orch.load("A")
        orch.load("B")
        orch.load("B")
        orch.unload()
    transitions = [(e.data["source"], e.data["dest"]) for e in harness.events.since(0)]
    lines = of(log, "lifecycle.transitioned")
    assert [(line["source"], line["dest"]) for line in lines] == transitions
    for line in lines:
        assert line["log_level"] == "info"
        assert {"trigger", "generation", "model", "pid", "after_ms"} <= line.keys()
    assert [line["generation"] for line in lines] == [1] * 5 + [2] * 9
    assert [line["model"] for line in lines] == ["A"] * 5 + ["B"] * 6 + [None] * 3
    assert [line["pid"] for line in lines[3:5]] == [101, 101]


def test_accepted_joined_and_stale_are_logged(
    log: list[Any], harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        first = pool.submit(orch.load, "A", deadline_s=5)
        harness.effects.wait_for("kill")
        second = pool.submit(orch.load, "A", deadline_s=5)
        harness.until_callers(2)
        harness.effects.open()
        assert first.result().generation == second.result().generation == 1
        harness.pass_time(6)
    accepted = of(log, "load.accepted")
    assert [(a["generation"], a["joined"]) for a in accepted] == [(1, False), (1, True)]
    assert [line["trigger"] for line in of(log, "completion.fenced")] == ["deadline_expired"]
    assert not [entry for entry in log if entry["log_level"] == "error"]


def test_no_secret_in_logs_errors_events_or_status(
    log: list[Any], harness: Harness, pool: ThreadPoolExecutor
) -> None:

    def refuse(effect: object, _: object) -> None:
        if type(effect).__name__ == "Probe":
            raise RuntimeError(f"no probe for {effect}")

    with harness.sync() as orch:
        outcome = orch.load("A", hf_token=SECRET)
        harness.effects.watch = refuse
        with pytest.raises(OrchestratorError) as error:
            orch.load("B", hf_token=SECRET)
        owner = harness.owner
        nonsense: Any = type("Nonsense", (), {"trigger": "load", "target": owner.snapshot})()
        owner.post(nonsense)
        harness.catch_up()
        with pytest.raises(PermissionError):
            orch.load("unreadable", hf_token=SECRET)
        shown = [outcome, orch.status(), orch.plan("A", hf_token=SECRET), error.value]
        shown += [outcome.as_dict(), orch.status().as_dict(), error.value.problem.as_dict()]
        shown += [owner.snapshot, *(e.as_dict() for e in owner.events.since(0)), *log]
    assert {entry["event"] for entry in log} >= {"owner.failed", "effect.failed", "load.accepted"}
    for what in shown:
        assert SECRET not in repr(what)
        assert SECRET not in str(what)


def test_no_secret_in_a_traceback_with_local_variables(
    harness: Harness, failures: list[Any]
) -> None:
    """structlog's default prints the locals of every frame if `rich` is installed."""
    written = io.StringIO()
    structlog.reset_defaults()
    structlog.configure(
        processors=[structlog.dev.ConsoleRenderer(colors=False)],
        logger_factory=structlog.PrintLoggerFactory(written),
    )

    def refuse(*_: object) -> None:
        raise RuntimeError("it cannot begin")

    with harness.sync() as orch:
        orch.start()
        harness.effects.watch = refuse
        with pytest.raises(OrchestratorError):
            orch.load("A", hf_token=SECRET)
        nonsense: Any = type("Nonsense", (), {"trigger": "load"})()
        harness.owner.post(nonsense)
        harness.catch_up()
        harness.effects.watch = lambda *_: None
    assert "it cannot begin" in written.getvalue()
    assert "owner.failed" in written.getvalue()
    assert SECRET not in written.getvalue()
