"""What is logged: one line for each transition, bound to its load, and never a secret."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator import OrchestratorError
from tests.kit.shell.facade import House

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture
def log(failures: list[Any], house: House) -> Iterator[list[Any]]:
    """Everything that is logged."""
    structlog.reset_defaults()
    with capture_logs() as entries:
        yield entries


def of(entries: list[Any], event: str) -> list[Any]:
    return [entry for entry in entries if entry["event"] == event]


def test_one_line_for_each_transition_bound_to_its_load(log: list[Any], house: House) -> None:
    with house.sync() as orch:
        orch.load("A")
        orch.load("B")
        orch.load("B")
        orch.unload()
    told = [(e.data["source"], e.data["dest"]) for e in house.events.since(0)]
    lines = of(log, "lifecycle.transitioned")
    assert [(line["source"], line["dest"]) for line in lines] == told
    for line in lines:
        assert line["log_level"] == "info"
        assert {"trigger", "generation", "model", "pid", "after_ms"} <= line.keys()
    assert [line["generation"] for line in lines] == [1] * 5 + [2] * 9
    assert [line["model"] for line in lines] == ["A"] * 5 + ["B"] * 6 + [None] * 3
    assert [line["pid"] for line in lines[3:5]] == [101, 101]


def test_accepted_joined_and_fenced_are_told(
    log: list[Any], house: House, pool: ThreadPoolExecutor
) -> None:
    house.open_gates = frozenset()
    with house.sync() as orch:
        first = pool.submit(orch.load, "A", deadline_s=5)
        house.effects.wait_for("kill")
        second = pool.submit(orch.load, "A", deadline_s=5)
        house.until_callers(2)
        house.effects.open()
        assert first.result().generation == second.result().generation == 1
        house.pass_time(6)
    accepted = of(log, "load.accepted")
    assert [(a["generation"], a["joined"]) for a in accepted] == [(1, False), (1, True)]
    assert [line["trigger"] for line in of(log, "completion.fenced")] == ["deadline_expired"]
    assert not [entry for entry in log if entry["log_level"] == "error"]


def test_no_secret_is_logged_whatever_happens(
    log: list[Any], house: House, pool: ThreadPoolExecutor
) -> None:
    """Not in a line, not in a status, not in an event, not in an error, not in its traceback."""

    def refuse(effect: object, _: object) -> None:
        if type(effect).__name__ == "Probe":
            raise RuntimeError(f"no probe for {effect}")

    with house.sync() as orch:
        outcome = orch.load("A", hf_token=SECRET)
        house.effects.watch = refuse
        with pytest.raises(OrchestratorError) as error:
            orch.load("B", hf_token=SECRET)
        owner = house.owner
        nonsense: Any = type("Nonsense", (), {"trigger": "load", "target": owner.snapshot})()
        owner.post(nonsense)
        house.catch_up()
        with pytest.raises(PermissionError):
            orch.load("unreadable", hf_token=SECRET)
        shown = [outcome, orch.status(), orch.plan("A", hf_token=SECRET), error.value]
        shown += [outcome.as_dict(), orch.status().as_dict(), error.value.problem.as_dict()]
        shown += [owner.snapshot, *(e.as_dict() for e in owner.events.since(0)), *log]
    assert {entry["event"] for entry in log} >= {"owner.failed", "effect.failed", "load.accepted"}
    for what in shown:
        assert SECRET not in repr(what)
        assert SECRET not in str(what)


def test_no_secret_is_logged_by_a_console_that_shows_local_variables(
    house: House, failures: list[Any]
) -> None:
    """structlog's own default with `rich` installed prints the locals of every frame."""
    written = io.StringIO()
    structlog.reset_defaults()
    structlog.configure(
        processors=[structlog.dev.ConsoleRenderer(colors=False)],
        logger_factory=structlog.PrintLoggerFactory(written),
    )

    def refuse(*_: object) -> None:
        raise RuntimeError("it cannot begin")

    with house.sync() as orch:
        orch.start()
        house.effects.watch = refuse
        with pytest.raises(OrchestratorError):
            orch.load("A", hf_token=SECRET)
        nonsense: Any = type("Nonsense", (), {"trigger": "load"})()
        house.owner.post(nonsense)
        house.catch_up()
        house.effects.watch = lambda *_: None
    assert "it cannot begin" in written.getvalue()
    assert "owner.failed" in written.getvalue()
    assert SECRET not in written.getvalue()
