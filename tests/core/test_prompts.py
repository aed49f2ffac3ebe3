"""Whose prompts a kill saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.machine.commands import Kill
from orchestrator.machine.context import Policy
from orchestrator.settings.help_text import Catalogue, FlagHelp
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import Target
from tests.kit.machine.run import A, B, H, Run
from tests.kit.machine.world import files, target

KEEP = Policy(keeps_prompts=True)
HELP = Catalogue((FlagHelp(("--slot-save-path",), "PATH"),))


def able(model: str = A, help_: Catalogue | None = HELP, **options: Any) -> Target:
    """Return a target whose server can save prompts."""
    wanted = target(LoadRequest.from_dict({"model_path": model, **options}))
    return replace(wanted, server=replace(wanted.server, catalogue=help_))


def healthy(policy: Policy = KEEP, wanted: Target | None = None) -> Run:
    run = Run(policy)
    run.load_target(wanted or able(), run.ticket())
    return run.go(H)


def saved(run: Run) -> list[Target | None]:
    return [kill.saves for kill in run.commands_of(Kill)]


def test_a_load_of_another_model_saves_the_prompts_of_the_running_one() -> None:
    run = healthy()
    running = run.running.target
    run.load(B)
    assert saved(run) == [running]


def test_nothing_is_saved_unless_it_is_asked_for() -> None:
    run = healthy(Policy())
    run.load(B)
    assert saved(run) == [None]


@pytest.mark.parametrize("how", ["unload", "shutdown", "crash", "hang"])
def test_nothing_is_saved_where_no_load_follows_or_the_server_is_gone(how: str) -> None:
    run = healthy()
    getattr(run, how)()
    assert saved(run) == [None]


def test_nothing_is_saved_for_a_load_that_was_cancelled_while_the_server_drained() -> None:
    run = healthy()
    lease = run.lease()
    run.load(B)
    run.cancel(generation=2)
    assert saved(run.release(lease)) == [None]


@pytest.mark.parametrize(
    "wanted",
    [
        able(help_=None),
        able(help_=Catalogue((FlagHelp(("--parallel",)),))),
        able(kind="embedding"),
        replace(able(), model=replace(files(A), projector=files(A).weights[0])),
    ],
    ids=["unknown flags", "no such flag", "no chat server", "projector"],
)
def test_nothing_is_saved_where_the_server_cannot(wanted: Target) -> None:
    run = healthy(wanted=wanted)
    run.load(B)
    assert saved(run) == [None]
