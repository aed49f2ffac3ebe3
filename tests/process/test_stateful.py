"""Any sequence of calls and faults on the public API, with real processes.

Hypothesis chooses the steps. Rules have no preconditions, because the outcome of a race must not
change what is drawn next: a rule that does not apply does nothing. Failures are not shrunk, because
a schedule of real processes cannot be repeated. A small reference model (`Expected`) knows which
answers are possible; it is compared with the public API, the process table and a lock that the
servers hold.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from orchestrator import LoadOutcome, Orchestrator, State
from orchestrator.errors import OrchestratorError
from tests.kit.process.support import Background, Fake, is_running, kill, nothing_left, until
from tests.kit.shell.records import only_failures

MODELS = ("a.gguf", "b.gguf", "c.gguf")
BEHAVIOURS: dict[str, dict[str, Any]] = {
    "good": {},
    "slow": {"loading_s": 0.15},
    "stubborn": {"ignore_term": 1},
    "deaf": {"ignore_term": -1},
    "family": {"children": ["group", "daemon!"]},
    "failing": {"exit_code": 1, "message": "error: no"},
    "hanging": {"hang": True},
    "warming": {"loading_s": -1},
}
STARTS = frozenset({"good", "slow", "stubborn", "deaf", "family"})
"""Behaviours with which a load succeeds unless another call interferes."""

DEADLINE_S = 15.0
IMPATIENT_S = 0.3
OVERTAKEN = frozenset({"superseded", "cancelled", "busy"})
"""Errors of a load that other calls cause."""


@dataclass(frozen=True)
class Load:
    """A load, and the behaviour planned for its model."""

    model: str
    context: int
    behaviour: str
    fields: dict[str, Any]

    @property
    def target(self) -> tuple[str, int]:
        return self.model, self.context


@dataclass
class Expected:
    """What has to be true at rest.

    Attributes:
        running: The target of the last load that succeeded; None if no server can be running;
            "unknown" while calls in flight may change it.
    """

    generation: int = 0
    running: tuple[str, int] | str | None = None
    pid: int = 0
    waiting: list[tuple[Load, Background]] = field(default_factory=list)

    @property
    def is_at_rest(self) -> bool:
        return not self.waiting


class Calls(RuleBasedStateMachine):
    """One orchestrator over the fake server, and everything that callers can do with it."""

    directory: ClassVar[Path]
    model: ClassVar[str]

    @initialize()
    def start(self) -> None:
        home = Path(tempfile.mkdtemp(dir=self.directory))
        self.state_dir = home / "state"
        self.state_dir.mkdir(mode=0o700)
        for name in MODELS:
            (home / name).hardlink_to(self.model)
        self.home = home
        self.fake = Fake(home / "fake")
        self.behaves = dict.fromkeys(MODELS, "good")
        self.orch = Orchestrator(
            llama_server=self.fake.path,
            state_dir=self.state_dir,
            server_env=self.fake.env,
            kill_grace_s=0.1,
            drain_timeout_s=0.1,
        )
        self.expected = Expected()
        self.leases: list[contextlib.ExitStack] = []
        self.ids = itertools.count()
        self.is_over = False

    # ------------------------------------------------------------------------------- loads

    def requested(
        self, model: str, context: int, on_busy: str, *, force: bool, restore: bool, pinned: bool
    ) -> Load:
        behaviour = self.behaves[model]
        fields = {
            "max_seq_length": context,
            "on_busy": on_busy,
            "force_reload": force,
            "restore_previous": restore,
            "pinned": pinned,
            "load_request_id": f"id-{next(self.ids)}",
            "deadline_s": DEADLINE_S if behaviour in STARTS else IMPATIENT_S,
        }
        return Load(model, context, behaviour, fields)

    loads: ClassVar[dict[str, Any]] = {
        "model": st.sampled_from(MODELS),
        "context": st.sampled_from([0, 512]),
        "on_busy": st.sampled_from(["supersede", "queue", "reject"]),
        "force": st.booleans(),
        "restore": st.booleans(),
        "pinned": st.booleans(),
    }

    @rule(**loads)
    def load_and_wait(
        self, model: str, context: int, on_busy: str, force: bool, restore: bool, pinned: bool
    ) -> None:
        load = self.requested(model, context, on_busy, force=force, restore=restore, pinned=pinned)
        expected, alone = self.expected, self.expected.is_at_rest
        call = Background(self.orch.load, str(self.home / model), **load.fields)
        error = call.error()
        if error is not None:
            self.check_refusal(load, error, alone=alone)
            expected.running = None if alone and not restore else "unknown"
            self.settle()
            return
        outcome: LoadOutcome = call.result()
        self.check_outcome(load, outcome)
        if alone and expected.running == load.target and not force:
            assert (outcome.status, outcome.pid) == ("already_loaded", expected.pid)
        elif alone and expected.running != "unknown":
            assert outcome.status == "loaded"
        assert outcome.status == "loaded" or not (alone and force)
        expected.running, expected.pid = load.target, outcome.pid
        if not alone:
            expected.running = "unknown"

    @rule(**loads)
    def load_in_the_background(
        self, model: str, context: int, on_busy: str, force: bool, restore: bool, pinned: bool
    ) -> None:
        load = self.requested(model, context, on_busy, force=force, restore=restore, pinned=pinned)
        call = Background(self.orch.load, str(self.home / model), **load.fields)
        self.expected.waiting.append((load, call))
        self.expected.running = "unknown"

    @rule()
    def settle(self) -> None:
        """Wait until every call has been answered with a possible answer."""
        for load, call in self.expected.waiting:
            error = call.error()
            if error is None:
                self.check_outcome(load, call.result(), still=False)
            else:
                self.check_refusal(load, error, alone=False)
        self.expected.waiting.clear()

    def check_outcome(self, load: Load, outcome: LoadOutcome, *, still: bool = True) -> None:
        # a running target is not started again, so the behaviour of its next start is irrelevant
        assert outcome.status == "already_loaded" or load.behaviour in STARTS
        assert Path(outcome.model_path).name == load.model
        assert outcome.requested_context_length == load.context
        assert outcome.status in ("loaded", "already_loaded")
        assert outcome.generation <= self.orch.status().generation
        if still and self.expected.is_at_rest:
            assert is_running(outcome.pid)

    def check_refusal(self, load: Load, error: BaseException, *, alone: bool) -> None:
        assert isinstance(error, OrchestratorError), error
        possible = {"failing": {"server_start_failed"}}.get(load.behaviour, {"deadline"})
        possible = set() if load.behaviour in STARTS else possible
        if not alone:
            possible = possible | OVERTAKEN | ({"shutting_down"} if self.is_over else {"deadline"})
        assert error.problem.category in possible, (load, error)

    # --------------------------------------------------------------------------- the other calls

    @rule()
    def unload(self) -> None:
        self.orch.unload()
        if self.expected.is_at_rest:
            assert nothing_left(self.state_dir, self.fake)
            assert self.orch.status().state is State.IDLE
            self.expected.running = None

    @rule(model=st.sampled_from(MODELS))
    def unload_another_model(self, model: str) -> None:
        expected = self.expected
        if expected.is_at_rest and expected.running not in ("unknown", None):
            if model == expected.running[0]:
                return
            answer = self.orch.unload(str(self.home / model))
            assert answer.status == "not_loaded"
            assert is_running(expected.pid)

    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        """A load in flight, or an unknown id."""
        waiting = [load.fields["load_request_id"] for load, _ in self.expected.waiting]
        request_id = dict(enumerate(waiting)).get(which, f"never-seen-{next(self.ids)}")
        cancelled = self.orch.cancel(request_id)
        assert not cancelled or request_id in waiting
        self.resident_is_untouched()

    @rule()
    def cancel_the_newest_generation(self) -> None:
        cancelled = self.orch.cancel(generation=self.orch.status().generation)
        assert not (cancelled and self.expected.is_at_rest)
        self.resident_is_untouched()

    def resident_is_untouched(self) -> None:
        expected = self.expected
        if expected.is_at_rest and expected.running not in ("unknown", None):
            assert is_running(expected.pid)
            loaded = self.orch.status().loaded
            assert loaded is not None
            assert loaded.pid == expected.pid

    @rule()
    def lease(self) -> None:
        if len(self.leases) == 2:
            return
        expected, stack = self.expected, contextlib.ExitStack()
        call = Background(stack.enter_context, self.orch.lease())
        error = call.error()
        if error is None:
            assert not expected.is_at_rest or is_running(call.result().pid)
            self.leases.append(stack)
        else:
            assert isinstance(error, OrchestratorError)
            assert error.problem.category != "internal"
            assert not expected.is_at_rest or expected.running in (None, "unknown")

    @rule()
    def release(self) -> None:
        if self.leases:
            self.leases.pop().close()

    @rule(model=st.sampled_from(MODELS), context=st.sampled_from([0, 512]))
    def plan(self, model: str, context: int) -> None:
        before = self.orch.status().generation
        planned = self.orch.plan(str(self.home / model), max_seq_length=context)
        expected = self.expected
        if expected.is_at_rest and expected.running != "unknown":
            action = "load" if expected.running is None else "reload"
            action = "none" if expected.running == (model, context) else action
            assert planned.action == action
            assert self.orch.status().generation == before

    # --------------------------------------------------------------------------------- faults

    @rule(model=st.sampled_from(MODELS), behaviour=st.sampled_from(sorted(BEHAVIOURS)))
    def change_the_behaviour(self, model: str, behaviour: str) -> None:
        if self.expected.is_at_rest:  # else it is unknown which behaviour a pending load meets
            self.behaves[model] = behaviour
            self.fake.behave(by_model={name: BEHAVIOURS[b] for name, b in self.behaves.items()})

    @rule(signum=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))
    def crash_the_server(self, signum: int) -> None:
        expected = self.expected
        if expected.running in (None, "unknown"):
            return
        loaded = self.orch.status().loaded
        assert loaded is not None
        assert loaded.pid == expected.pid, "the signal would reach another process"
        os.kill(expected.pid, signum)
        until(lambda: self.orch.status().state is State.IDLE, "the crash", DEADLINE_S)
        status = self.orch.status()
        assert status.loaded is None
        assert status.last_exit is not None
        assert (status.last_exit.pid, status.last_exit.returncode) == (expected.pid, -signum)
        expected.running = None

    # ------------------------------------------------------------------------------- invariants

    @invariant()
    def at_most_one_server_runs(self) -> None:
        self.fake.assert_no_overlap()
        running = self.fake.running()
        roots = {int(entry["root"]) for entry in self.fake.entries() if entry.pid in running}
        assert len(roots) <= 1, roots

    @invariant()
    def a_loaded_server_is_running(self) -> None:
        """Or its exit is about to be noticed."""

        def is_consistent() -> bool:
            loaded = self.orch.status().loaded
            return loaded is None or is_running(loaded.pid)

        until(is_consistent, "the exit", 5)

    @invariant()
    def generations_never_decrease(self) -> None:
        """Of accepted loads; `status` has the one of the running server, which may be older."""
        newest = self.orch.history(1)
        generation = newest[0].generation if newest else 0
        assert generation >= self.expected.generation
        self.expected.generation = generation

    @invariant()
    def at_rest_is_idle_or_healthy(self) -> None:
        if self.expected.is_at_rest:
            until(
                lambda: self.orch.status().state in (State.IDLE, State.HEALTHY), "rest", DEADLINE_S
            )

    def teardown(self) -> None:
        try:
            for lease in self.leases:
                lease.close()
            self.orch.close()
            self.is_over = True
            self.settle()
            assert nothing_left(self.state_dir, self.fake)
        finally:
            for pid in self.fake.running():
                kill(pid)


QUICK = settings(
    max_examples=80,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
DEEP = settings(QUICK, max_examples=400, stateful_step_count=50, derandomize=False)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(DEEP, id="deep", marks=[pytest.mark.deep, pytest.mark.timeout(3600)]),
    ],
)
def test_any_sequence_of_calls_and_faults_keeps_the_promises(
    tmp_path: Path, tiny_model: str, profile: settings
) -> None:
    """The public API with real processes: at most one server, every call answered, none left."""
    machine = type("Calls", (Calls,), {"directory": tmp_path, "model": tiny_model})
    with only_failures() as failures:
        run_state_machine_as_test(machine, settings=profile)
        assert failures == []
