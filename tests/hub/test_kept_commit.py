"""B75: what was resolved stays resolved, while `main` moves on the Hub."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestrator import LoadRequest, Orchestrator, RestartPolicy
from orchestrator.demo import tiny_model
from orchestrator.errors import ServerStartFailed
from tests.kit.fake_hub import Hub, Repo
from tests.kit.models import TINY
from tests.kit.process.support import until

pytestmark = pytest.mark.external


def move_main(repo: Repo, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Push other weights, and return the new commit."""
    path = tiny_model.write_tiny_model(tmp_path_factory.mktemp("moved") / "new.gguf", seed=99)
    return repo.push({"tiny-Q4_K_M.gguf": path})


def test_apply_of_another_field_keeps_the_commit_that_runs(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = orch.load(TINY)
    newer = move_main(tiny_repo, tmp_path_factory)
    plan = orch.plan(TINY, n_parallel=2)
    assert [reason.field for reason in plan.reload_reasons] == ["n_parallel"]
    assert plan.note is not None
    assert newer in plan.note
    assert plan.as_dict()["note"] == plan.note
    asked = len(hub.seen("/api/models"))
    plan = orch.plan(TINY)
    assert (plan.action, plan.note is not None) == ("none", True)
    assert len(hub.seen("/api/models")) == asked, "an answer is used for a minute"
    hub.stop()  # what is known is not asked again
    changed = orch.load(TINY, n_parallel=2)
    assert (changed.status, changed.revision, changed.note) == ("loaded", first.revision, None)
    assert [reason.field for reason in changed.reload_reasons] == ["n_parallel"]
    assert orch.load(TINY, n_parallel=2).status == "already_loaded"


@pytest.mark.parametrize("how", [{"force_reload": True}, {"revision": "main"}])
def test_moved_main_is_taken_on_request_and_is_the_reason(
    orch: Orchestrator,
    tiny_repo: Repo,
    tmp_path_factory: pytest.TempPathFactory,
    how: dict[str, object],
) -> None:
    first = orch.load(TINY)
    newer = move_main(tiny_repo, tmp_path_factory)
    moved = orch.load(LoadRequest.from_dict({"model_path": TINY, **how}))
    assert moved.revision == newer
    reason = next(r for r in moved.reload_reasons if r.field == "revision")
    assert (reason.running, reason.requested) == (first.revision, newer)


def test_after_an_unload_main_is_asked_anew(
    orch: Orchestrator, tiny_repo: Repo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    orch.load(TINY)
    newer = move_main(tiny_repo, tmp_path_factory)
    orch.unload()
    assert orch.load(TINY).revision == newer


def test_restart_after_a_crash_takes_the_commit_that_ran_and_needs_no_hub(
    llama_server: str,
    state_dir: Path,
    tiny_repo: Repo,
    hub: Hub,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Orchestrator(
        llama_server=llama_server, state_dir=state_dir, restart=RestartPolicy(backoff_s=0.01)
    ) as orch:
        first = orch.load(TINY)
        newer = move_main(tiny_repo, tmp_path_factory)
        assert orch.prefetch(TINY).revision == newer, "the cache has the newer one too"
        hub.stop()
        os.kill(first.pid, signal.SIGKILL)
        until(
            lambda: (now := orch.status().loaded) and now.pid != first.pid, "the restarted server"
        )
        loaded = orch.status().loaded
        assert loaded is not None
        assert loaded.revision == first.revision


def test_restored_model_has_the_commit_that_ran(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = orch.load(TINY)
    move_main(tiny_repo, tmp_path_factory)
    orch.prefetch(TINY)
    hub.stop()
    with pytest.raises(ServerStartFailed) as caught:
        orch.load(TINY, llama_extra_args=["--seed", "bogus"], restore_previous=True)
    assert caught.value.problem.restored is not None
    assert caught.value.problem.restored.problem is None
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.revision == first.revision
