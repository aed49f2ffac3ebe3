"""B75: the running model keeps its commit for requests that differ in another field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.base.tokens import Ticket
from orchestrator.machine.commands import Resolve
from orchestrator.machine.facts import LoadRequested
from orchestrator.settings.files import HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import differences, keeps_commit
from tests.kit.machine.run import H, Run
from tests.kit.machine.world import files
from tests.kit.machine.world import target as world_target
from tests.kit.settings import local, on_hub, target

B = "o/B"
MOVED = HubModel(B, commit="d" * 40, is_settled=False)


@pytest.mark.parametrize(
    ("running", "requested", "keeps"),
    [
        ({}, {}, True),
        ({}, {"n_parallel": 2}, True),
        ({}, {"model_path": "ORG/A"}, True),
        ({}, {"gguf_variant": "q4_k_m"}, True),
        ({}, {"model_path": "org/a:Q4_K_M"}, True),
        ({"gguf_variant": "Q4_K_M"}, {"model_path": "org/a:q4_k_m"}, True),
        ({"revision": "main"}, {"revision": "main"}, True),
        ({"gguf_variant": "Q4_K_M"}, {}, False),
        ({}, {"gguf_variant": "Q8_0"}, False),
        ({}, {"model_path": "org/b"}, False),
        ({}, {"model_path": "/models/a.gguf"}, False),
        ({}, {"revision": "main"}, False),
        ({"revision": "main"}, {}, False),
        ({}, {"force_reload": True}, False),
    ],
)
def test_request_for_what_runs_keeps_its_commit(
    running: dict[str, Any], requested: dict[str, Any], keeps: bool
) -> None:
    ours = target(model=on_hub(variant="Q4_K_M"), **{"model_path": "org/a", **running})
    wanted = LoadRequest.from_dict({"model_path": "org/a", **requested})
    assert keeps_commit(ours, wanted) is keeps


def test_local_model_has_no_commit_to_keep() -> None:
    assert not keeps_commit(target(model=local()), LoadRequest(model_path="/models/a.gguf"))


def serving_b() -> Run:
    run = Run()
    run.load(B)
    run.resolved(1, B).promote().settle()
    assert run.state is H
    return run


def apply(run: Run, kept: ModelFiles, **options: Any) -> Ticket:
    """Load B with the answer of a look-up for which `main` has moved."""
    request = LoadRequest.from_dict({"model_path": B, **options})
    wanted = replace(world_target(request), model=ModelFiles((), None, None, MOVED))
    ticket = run.look_up(request, run.ticket())
    run.do(LoadRequested(ticket, wanted, run.now, kept=kept))
    return ticket


def test_apply_of_another_field_asks_no_hub_and_keeps_the_files() -> None:
    run = serving_b()
    apply(run, files(B), n_parallel=2)
    assert run.ctx.job is not None
    assert run.ctx.job.target.model == files(B)
    assert [reason.field for reason in run.ctx.job.reload_reasons] == ["n_parallel"]
    assert run.commands_of(Resolve) == []


def test_apply_without_a_change_is_already_loaded() -> None:
    run = serving_b()
    assert run.category(apply(run, files(B))) == "already"


def test_commit_that_does_not_run_any_more_is_not_kept() -> None:
    """The model was unloaded between the look-up and the load."""
    run = serving_b()
    run.unload()
    run.settle()
    apply(run, files(B))
    (asked,) = run.commands_of(Resolve)
    assert asked.target.model.hub == MOVED


def test_another_commit_than_the_one_looked_up_is_not_kept() -> None:
    """Another load of the repo became Healthy between the look-up and the load."""
    run = serving_b()
    other = replace(files(B), hub=HubModel(B, commit="e" * 40))
    apply(run, other, n_parallel=2)
    assert len(run.commands_of(Resolve)) == 1


def test_forced_reload_asks_for_the_newest() -> None:
    run = serving_b()
    apply(run, files(B), force_reload=True)
    assert len(run.commands_of(Resolve)) == 1


def test_branch_by_name_is_no_difference_once_it_is_settled() -> None:
    running = target(model=on_hub(), model_path="org/a")
    hub = HubModel("org/a", "main", "a" * 40)
    branch = replace(on_hub(), hub=hub)
    unsettled = replace(on_hub(), hub=replace(hub, is_settled=False))
    by_name = target(model=unsettled, model_path="org/a", revision="main")
    assert [reason.field for reason in differences(running, by_name)] == ["revision"]
    settled = replace(by_name, model=branch)
    assert differences(running, settled) == ()
