"""The plan of a load: what it is compared with, and the names of local paths in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import Busy, OrchestratorError
from orchestrator.machine.context import Policy
from orchestrator.machine.plan import Plan, plan_load
from orchestrator.settings.files import HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import Target
from tests.kit.machine.run import A, B, C, D, Run, healthy, in_flight
from tests.kit.machine.world import files, target


def wanted(model: str, **options: Any) -> Target:
    return target(LoadRequest.from_dict({"model_path": model, **options}))


def plan_of(run: Run, load: Target) -> Plan:
    """Return the plan, which changes nothing."""
    before = run.ctx
    plan = plan_load(run.state, run.ctx, load, at=run.now).plan
    assert run.ctx == before
    return plan


def changes(plan: Plan) -> list[tuple[str, object, object]]:
    return [(reason.field, reason.running, reason.requested) for reason in plan.reload_reasons]


def test_first_load_has_nothing_to_be_compared_with() -> None:
    plan = plan_of(Run(), wanted(A))
    assert (plan.action, plan.reload_reasons) == ("load", [])


@pytest.mark.parametrize("waiting", [[], [1024], [1024, 2048], [1024, 2048, 4096]])
@pytest.mark.parametrize("is_running", [False, True])
def test_queued_load_is_compared_with_the_load_before_it(
    is_running: bool, waiting: list[int]
) -> None:
    run = healthy(max_seq_length=256) if is_running else Run()
    for length in waiting:
        run.load(A, max_seq_length=length, on_busy="queue")
    plan = plan_of(run, wanted(A, max_seq_length=512, on_busy="queue"))
    last = [256, *waiting][-1]
    if is_running or waiting:
        assert (plan.action, changes(plan)) == ("reload", [("max_seq_length", last, 512)])
    else:
        assert (plan.action, changes(plan)) == ("load", [])


def test_load_that_supersedes_the_only_load_has_nothing_to_be_compared_with() -> None:
    run, _ = in_flight(D)
    assert plan_of(run, wanted(B)).action == "load"


def test_plan_of_what_runs_is_its_command_line() -> None:
    run = healthy(chat_template_override="{{ x }}")
    plan = plan_of(run, wanted(A, chat_template_override="{{ x }}"))
    assert (plan.action, plan.reload_reasons, plan.note) == ("none", [], None)
    at = plan.argv.index("--chat-template-file")
    assert plan.argv[at + 1] == "<chat template>", "the file is written at the start"
    assert "--chat-template-file" not in plan_of(run, wanted(A)).argv


def test_plan_keeps_the_commit_that_runs() -> None:
    run = Run()
    run.load("o/B")
    run.resolved(1, "o/B").promote().settle()
    moved = ModelFiles((), None, "V", HubModel("o/B", commit="d" * 40))
    newer = replace(wanted("o/B"), model=moved)
    plan = plan_load(run.state, run.ctx, newer, kept=files("o/B")).plan
    assert (plan.action, plan.reload_reasons) == ("none", [])
    assert changes(plan_of(run, newer)) == [("revision", "c" * 40, "d" * 40)]


def test_plan_as_json_has_a_note_only_if_there_is_one() -> None:
    plan = plan_of(healthy(max_seq_length=256), wanted(A, max_seq_length=512))
    assert plan.as_dict() == {
        "action": "reload",
        "reload_reasons": [{"field": "max_seq_length", "running": 256, "requested": 512}],
        "argv": plan.argv,
    }
    noted = replace(plan, note="a remark")
    assert noted.as_dict() == {**plan.as_dict(), "note": "a remark"}


def test_plan_names_the_paths_of_both_models() -> None:
    """Over HTTP the paths are replaced by these names."""
    ours = replace(wanted(A), model=replace(files(A), names=(("/m/a", "a.gguf"),)))
    theirs = replace(wanted(B), model=replace(files(B), names=(("/m/b", "b.gguf"),)))
    run = Run()
    assert plan_of(run, ours).names == (("/m/a", "a.gguf"),)
    run.load_target(ours, run.ticket())
    run.settle()
    assert {*plan_of(run, theirs).names} == {("/m/a", "a.gguf"), ("/m/b", "b.gguf")}
    assert plan_of(run, ours).names == (("/m/a", "a.gguf"),)


def test_plan_of_a_load_that_would_join_is_that_load() -> None:
    run, _ = in_flight(D, llama_extra_args=["--seed", "7"])
    run.load(B, on_busy="queue")
    joined = plan_of(run, wanted(B, on_busy="queue"))
    assert (joined.action, joined.reload_reasons) == ("none", [])
    assert "--seed" not in joined.argv
    inherited = plan_of(in_flight(D, llama_extra_args=["--seed", "7"])[0], wanted(A))
    assert inherited.action == "none"
    assert inherited.argv[-2:] == ["--seed", "7"]


def test_plan_of_a_load_that_would_be_refused_is_its_error() -> None:
    run, _ = in_flight(D)
    with pytest.raises(Busy) as refused:
        plan_of(run, wanted(C, on_busy="reject"))
    assert refused.value.problem == run.problem(run.load(C, on_busy="reject"))
    full = Run(Policy(max_looking=0))
    with pytest.raises(Busy) as full_error:
        plan_of(full, wanted(A))
    assert full_error.value.field == "model_path"
    run.cancel("x")
    with pytest.raises(OrchestratorError) as cancelled:
        plan_of(run, wanted(C, load_request_id="x"))
    assert cancelled.value.category == "cancelled"
    run.now = 61.0
    assert plan_of(run, wanted(C, load_request_id="x")).action == "load"
