"""Any sequence of calls and mishaps on the public API, with real processes underneath.

What is drawn must not depend on who wins a race, so rules have no preconditions: one that makes no
sense at the moment does nothing.
Hypothesis chooses what happens next. It does not shorten what fails: a schedule of real processes
is never the same twice, and a shorter one may pass by luck. A small reference model knows what may
be true: what was asked for last, what every model does when it is started, who waits, who holds a
lease. It never looks inside; the process table and a lock held by the servers are the witnesses.
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
"""Behaviours of which a load that nobody disturbs is answered with success."""

DEADLINE_S = 15.0
IMPATIENT_S = 0.3
OVERTAKEN = frozenset({"superseded", "cancelled", "busy"})
"""What a load may be told because of other calls."""


@dataclass(frozen=True)
class Asked:
    """A load, and how its model was to behave."""

    model: str
    context: int
    behaviour: str
    fields: dict[str, Any]

    @property
    def target(self) -> tuple[str, int]:
        return self.model, self.context


@dataclass
class Believed:
    """What has to be true at rest.

    Attributes:
        running: What the last load that was answered with success asked for; None where nothing
            can be running; "unknown" while others may still change it.
    """

    generation: int = 0
    running: tuple[str, int] | str | None = None
    pid: int = 0
    waiting: list[tuple[Asked, Background]] = field(default_factory=list)

    @property
    def is_at_rest(self) -> bool:
        return not self.waiting


class Calls(RuleBasedStateMachine):
    """One orchestrator over the fake server, and everything that callers may do with it."""

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
        self.believed = Believed()
        self.leases: list[contextlib.ExitStack] = []
        self.ids = itertools.count()
        self.is_over = False

    # ------------------------------------------------------------------------------- what is asked

    def asked(
        self, model: str, context: int, on_busy: str, *, force: bool, restore: bool, pinned: bool
    ) -> Asked:
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
        return Asked(model, context, behaviour, fields)

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
        asked = self.asked(model, context, on_busy, force=force, restore=restore, pinned=pinned)
        believed, alone = self.believed, self.believed.is_at_rest
        call = Background(self.orch.load, str(self.home / model), **asked.fields)
        error = call.error()
        if error is not None:
            self.check_refusal(asked, error, alone=alone)
            believed.running = None if alone and not restore else "unknown"
            self.settle()
            return
        outcome: LoadOutcome = call.result()
        self.check_outcome(asked, outcome)
        if alone and believed.running == asked.target and not force:
            assert (outcome.status, outcome.pid) == ("already_loaded", believed.pid)
        elif alone and believed.running != "unknown":
            assert outcome.status == "loaded"
        assert outcome.status == "loaded" or not (alone and force)
        believed.running, believed.pid = asked.target, outcome.pid
        if not alone:
            believed.running = "unknown"

    @rule(**loads)
    def load_and_go_on(
        self, model: str, context: int, on_busy: str, force: bool, restore: bool, pinned: bool
    ) -> None:
        asked = self.asked(model, context, on_busy, force=force, restore=restore, pinned=pinned)
        call = Background(self.orch.load, str(self.home / model), **asked.fields)
        self.believed.waiting.append((asked, call))
        self.believed.running = "unknown"

    @rule()
    def settle(self) -> None:
        """Wait until everybody has been answered, each once and with something that can be."""
        for asked, call in self.believed.waiting:
            error = call.error()
            if error is None:
                self.check_outcome(asked, call.result(), still=False)
            else:
                self.check_refusal(asked, error, alone=False)
        self.believed.waiting.clear()

    def check_outcome(self, asked: Asked, outcome: LoadOutcome, *, still: bool = True) -> None:
        # what runs already is not started, whatever its next start would do
        assert outcome.status == "already_loaded" or asked.behaviour in STARTS
        assert Path(outcome.model_path).name == asked.model
        assert outcome.requested_context_length == asked.context
        assert outcome.status in ("loaded", "already_loaded")
        assert outcome.generation <= self.orch.status().generation
        if still and self.believed.is_at_rest:
            assert is_running(outcome.pid)

    def check_refusal(self, asked: Asked, error: BaseException, *, alone: bool) -> None:
        assert isinstance(error, OrchestratorError), error
        may_be = {"failing": {"server_start_failed"}}.get(asked.behaviour, {"deadline"})
        may_be = set() if asked.behaviour in STARTS else may_be
        if not alone:
            may_be = may_be | OVERTAKEN | ({"shutting_down"} if self.is_over else {"deadline"})
        assert error.problem.category in may_be, (asked, error)

    # --------------------------------------------------------------------------- the other calls

    @rule()
    def unload(self) -> None:
        self.orch.unload()
        if self.believed.is_at_rest:
            assert nothing_left(self.state_dir, self.fake)
            assert self.orch.status().state is State.IDLE
            self.believed.running = None

    @rule(model=st.sampled_from(MODELS))
    def unload_what_is_not_there(self, model: str) -> None:
        believed = self.believed
        if believed.is_at_rest and believed.running not in ("unknown", None):
            if model == believed.running[0]:
                return
            answer = self.orch.unload(str(self.home / model))
            assert answer.status == "not_loaded"
            assert is_running(believed.pid)

    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        """Of a load in flight, or of nothing: what is resident stays."""
        waiting = [asked.fields["load_request_id"] for asked, _ in self.believed.waiting]
        request_id = dict(enumerate(waiting)).get(which, f"never-seen-{next(self.ids)}")
        cancelled = self.orch.cancel(request_id)
        assert not cancelled or request_id in waiting
        self.resident_is_untouched()

    @rule()
    def cancel_the_newest_generation(self) -> None:
        cancelled = self.orch.cancel(generation=self.orch.status().generation)
        assert not (cancelled and self.believed.is_at_rest)
        self.resident_is_untouched()

    def resident_is_untouched(self) -> None:
        believed = self.believed
        if believed.is_at_rest and believed.running not in ("unknown", None):
            assert is_running(believed.pid)
            loaded = self.orch.status().loaded
            assert loaded is not None
            assert loaded.pid == believed.pid

    @rule()
    def lease(self) -> None:
        if len(self.leases) == 2:
            return
        believed, stack = self.believed, contextlib.ExitStack()
        call = Background(stack.enter_context, self.orch.lease())
        error = call.error()
        if error is None:
            assert not believed.is_at_rest or is_running(call.result().pid)
            self.leases.append(stack)
        else:
            assert isinstance(error, OrchestratorError)
            assert error.problem.category != "internal"
            assert not believed.is_at_rest or believed.running in (None, "unknown")

    @rule()
    def release(self) -> None:
        if self.leases:
            self.leases.pop().close()

    @rule(model=st.sampled_from(MODELS), context=st.sampled_from([0, 512]))
    def plan(self, model: str, context: int) -> None:
        """It says what a load would do, and does nothing."""
        before = self.orch.status().generation
        planned = self.orch.plan(str(self.home / model), max_seq_length=context)
        believed = self.believed
        if believed.is_at_rest and believed.running != "unknown":
            action = "load" if believed.running is None else "reload"
            action = "none" if believed.running == (model, context) else action
            assert planned.action == action
            assert self.orch.status().generation == before

    # --------------------------------------------------------------------------------- mishaps

    @rule(model=st.sampled_from(MODELS), behaviour=st.sampled_from(sorted(BEHAVIOURS)))
    def the_next_start_of_it_is(self, model: str, behaviour: str) -> None:
        if self.believed.is_at_rest:  # or nobody could say how those that wait will find it
            self.behaves[model] = behaviour
            self.fake.behave(by_model={name: BEHAVIOURS[b] for name, b in self.behaves.items()})

    @rule(signum=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))
    def the_server_crashes(self, signum: int) -> None:
        believed = self.believed
        if believed.running in (None, "unknown"):
            return
        loaded = self.orch.status().loaded
        assert loaded is not None
        assert loaded.pid == believed.pid, "a signal must not reach somebody else"
        os.kill(believed.pid, signum)
        until(lambda: self.orch.status().state is State.IDLE, "the crash is noticed", DEADLINE_S)
        status = self.orch.status()
        assert status.loaded is None
        assert status.last_exit is not None
        assert (status.last_exit.pid, status.last_exit.returncode) == (believed.pid, -signum)
        believed.running = None

    # ------------------------------------------------------------------------------- always true

    @invariant()
    def at_most_one_server_lives(self) -> None:
        self.fake.assert_never_two()
        living = self.fake.living()
        roots = {int(note["root"]) for note in self.fake.notes() if note.pid in living}
        assert len(roots) <= 1, roots

    @invariant()
    def what_is_loaded_lives(self) -> None:
        """Or its end is noticed in a moment."""

        def lives_or_is_not_loaded() -> bool:
            loaded = self.orch.status().loaded
            return loaded is None or is_running(loaded.pid)

        until(lives_or_is_not_loaded, "a corpse is not loaded any more", 5)

    @invariant()
    def generations_never_decrease(self) -> None:
        """Of what was accepted; `status` tells that of what runs, which may be an older one."""
        newest = self.orch.history(1)
        generation = newest[0].generation if newest else 0
        assert generation >= self.believed.generation
        self.believed.generation = generation

    @invariant()
    def at_rest_is_idle_or_healthy(self) -> None:
        if self.believed.is_at_rest:
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
            for pid in self.fake.living():
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
