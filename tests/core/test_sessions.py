"""Several loads in a row: a plan is what the load then does, and args stay with their source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.tokens import Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, Loaded, Spawn
from orchestrator.machine.facts import BecameReady, Fact, ServerFacts
from orchestrator.machine.plan import Plan, plan_load
from orchestrator.settings.argv import build_argv
from orchestrator.settings.drafting import explicit_mode
from orchestrator.settings.fields import strip_shadowed
from orchestrator.settings.target import Source, Target, differences, shadowing_fields
from tests.kit.machine.run import Run
from tests.kit.settings import FIELDS, flat, local, repeatable, target, written

fewer = settings(repeatable, max_examples=60)


class Session(Run):
    """A machine that records what it accepted and spawned; its servers report 2048 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted: list[Accept] = []
        self.spawned_targets: list[Target] = []

    def do(self, fact: Fact) -> Self:
        super().do(fact)
        self.accepted += self.commands_of(Accept)
        self.spawned_targets += [command.target for command in self.commands_of(Spawn)]
        return self

    def request(self, wanted: Target) -> Ticket:
        ticket = self.ticket()
        return self.load_target(wanted, ticket)

    def ready(self, *, alive: bool = True) -> Self:
        server = ServerFacts("http://127.0.0.1:1", context_length=2048)
        return self.do(BecameReady(self.effect, self.now, server, alive))

    def advance(self, *, succeeds: bool = True) -> bool:
        """End the effect in flight and return True, or return False if there is none."""
        if self.ctx.effect is None:
            return False
        if self.ctx.effect.kind == "probe" and not succeeds:
            self.fail()
        else:
            self._succeed()
        return True

    def finish(self, *, succeeds: bool = True) -> None:
        while self.advance(succeeds=succeeds):
            pass


def shown_argv(wanted: Target) -> list[str]:
    shown = "<chat template>" if wanted.request.chat_template_override else None
    return list(build_argv(wanted, template_file=shown))


class Load(NamedTuple):
    """One load of a session, and whether its server becomes healthy."""

    source: Source
    values: dict[str, Any]
    args: tuple[str, ...] | None
    succeeds: bool

    def target(self) -> Target:
        model, variant, kind = self.source
        files = local(model, variant=variant)
        return target(
            model=files, model_path=model, kind=kind, llama_extra_args=self.args, **self.values
        )


SOURCES: list[Source] = [
    ("a", "Q4_K_M", "chat"),
    ("a", "Q4_K_M", "chat"),  # twice as often
    ("a", "Q8_0", "chat"),
    ("b", "Q4_K_M", "chat"),
    ("a", "Q4_K_M", "embedding"),
]
LOADS = st.builds(
    Load,
    st.sampled_from(SOURCES),
    st.just({}) | FIELDS | st.just({"force_reload": True}),
    st.none() | st.lists(written(), max_size=3).map(flat),
    st.sampled_from([True, True, False]),
)


@fewer
@given(st.lists(LOADS, min_size=2, max_size=8))
def test_a_plan_is_what_the_load_then_does_and_args_stay_with_their_source(
    loads: list[Load],
) -> None:
    """B37, B40, B41. Inheritance is modelled by a dictionary that only a success updates."""
    session = Session()
    committed: dict[Source, tuple[str, ...]] = {}
    running: Target | None = None
    for load in loads:
        wanted = load.target()
        expected = load.args
        if expected is None:
            kept = committed.get(load.source, ())
            fields = shadowing_fields(wanted.request)
            if wanted.request.speculative_type == explicit_mode(kept):
                fields -= {"speculative_type"}  # the reported mode, posted back
            expected = strip_shadowed(kept, fields)
        explicit = replace(wanted, request=replace(wanted.request, llama_extra_args=expected))
        is_same = running is not None and not differences(running, explicit)
        plan = plan_load(session.state, session.ctx, wanted).plan
        assert (plan.action == "none") == (is_same and not wanted.request.force_reload)
        before = len(session.spawned_targets)
        ticket = session.request(wanted)
        session.finish(succeeds=load.succeeds)
        answer = session.answers[ticket]

        if plan.action == "none":
            assert running is not None
            assert isinstance(answer, Loaded)
            assert answer.already
            assert len(session.spawned_targets) == before
            assert shown_argv(running) == plan.argv
            assert running.extra_args == expected
            continue
        assert plan.action == ("load" if running is None else "reload")
        assert len(session.spawned_targets) == before + 1
        started = session.spawned_targets[-1]
        assert started.extra_args == expected
        assert shown_argv(started) == plan.argv
        if running is not None:
            forced = ["force_reload"] if wanted.request.force_reload else []
            differing = [reason.field for reason in differences(running, started)]
            assert [reason.field for reason in plan.reload_reasons] == differing + forced
            assert plan.reload_reasons
        running = started if load.succeeds else None
        if load.succeeds:
            assert isinstance(answer, Loaded)
            assert list(answer.reload_reasons) == plan.reload_reasons
            committed[load.source] = expected
        else:
            assert isinstance(answer, Problem)


@fewer
@given(LOADS, LOADS, LOADS, st.integers(1, 4))
def test_a_plan_during_a_load_is_what_a_second_load_then_does(
    first: Load, loading: Load, second: Load, effects: int
) -> None:
    """`none` means joined; anything else is a load of its own."""
    session = Session()
    session.request(first.target())
    session.finish()
    session.request(loading.target())
    for _ in range(effects - 1):
        session.advance()
    is_in_flight = session.ctx.job is not None
    plan = plan_load(session.state, session.ctx, second.target()).plan
    accepted, spawned = len(session.accepted), len(session.spawned_targets)
    ticket = session.request(second.target())
    newest = session.accepted[accepted]
    if is_in_flight:
        assert newest.joined == (plan.action == "none")
    session.finish()
    assert isinstance(session.answers[ticket], Loaded)
    if plan.action == "none":
        assert shown_argv(session.running.target) == plan.argv
    else:
        assert len(session.spawned_targets) > spawned
        assert shown_argv(session.spawned_targets[-1]) == plan.argv
        assert newest.generation == session.ctx.generation


SOME_SOURCES = st.tuples(
    st.sampled_from(["a", "b"]),
    st.sampled_from([None, "Q8_0", "Q4_K_M"]),
    st.sampled_from(["chat", "embedding"]),
)
COMMITTED = st.dictionaries(SOME_SOURCES, st.lists(written(), max_size=3).map(flat))


@repeatable
@given(COMMITTED, COMMITTED, LOADS)
def test_args_of_other_sources_make_no_difference(
    committed: dict[Source, tuple[str, ...]],
    others: dict[Source, tuple[str, ...]],
    load: Load,
) -> None:
    """B40."""
    wanted = load.target()
    ours = {source: args for source, args in committed.items() if source == wanted.source}
    elsewhere = {source: args for source, args in others.items() if source != wanted.source}
    assert wanted.inheriting({**elsewhere, **ours}) == wanted.inheriting(ours)
    if not ours and load.args is None:
        assert wanted.inheriting(elsewhere).extra_args == ()


@pytest.mark.parametrize("requested", [0, 2048, 4096])
@pytest.mark.parametrize("running", [0, 2048, 4096])
def test_the_requested_context_is_compared_never_the_effective_one(
    requested: int, running: int
) -> None:
    """B29: the server reports 2048 in every case, but requesting 2048 differs from Auto."""
    session = Session()
    session.request(target(max_seq_length=running))
    session.finish()
    assert session.running.server.context_length == 2048
    plan = plan_load(session.state, session.ctx, target(max_seq_length=requested)).plan
    assert plan.action == ("none" if requested == running else "reload")
    shown = [(reason.running, reason.requested) for reason in plan.reload_reasons]
    assert shown == ([] if requested == running else [(running, requested)])


def test_a_queued_load_is_compared_with_the_load_before_it() -> None:
    session = Session()
    session.request(target(max_seq_length=512))
    session.request(target(max_seq_length=1024, on_busy="queue"))
    wanted = target(max_seq_length=2048, on_busy="queue")
    plan = plan_load(session.state, session.ctx, wanted).plan
    shown = [reason.as_dict() for reason in plan.reload_reasons]
    assert (plan.action, plan.argv) == ("reload", shown_argv(wanted))
    assert shown == [{"field": "max_seq_length", "running": 1024, "requested": 2048}]
    session.request(wanted)
    joined = plan_load(session.state, session.ctx, wanted).plan
    assert joined == Plan("none", [], plan.argv)
