"""Restarts after a crash, and restores after a failed load, on real processes.

Where possible a real llama-server is killed; the fake one crashes by itself, and repeatedly.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import Orchestrator, RestartPolicy, State
from orchestrator.errors import InvalidRequest, ServerStartFailed
from orchestrator.http import create_app
from tests.kit.http import PREFIX, serving
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    is_running,
    key_of,
    kill,
    transitions,
    until,
)

AT_ONCE = RestartPolicy(backoff_s=0.01, backoff_max_s=0.02, limit=2, cool_down_s=600)


@pytest.fixture
def real(llama_server: str, state_dir: Path) -> Iterator[Callable[..., Orchestrator]]:
    """Make an orchestrator over the real llama-server."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            Orchestrator(llama_server=llama_server, state_dir=state_dir, **settings)
        )


def until_healthy(orch: Orchestrator, generation: int) -> Any:
    def loaded() -> Any:
        found = orch.status().loaded
        return found if found is not None and found.generation == generation else None

    return until(loaded, f"generation {generation} is Healthy")


@pytest.mark.external
def test_a_killed_server_is_restarted_with_its_settings(
    real: Callable[..., Orchestrator], tiny_model: str
) -> None:
    """The settings are read from the new server itself."""
    orch = real(restart=AT_ONCE)
    before = orch.load(tiny_model, max_seq_length=512, llama_extra_args=["--seed", "7"])
    kill(before.pid)
    after = until_healthy(orch, 2)
    assert after.pid != before.pid
    assert not is_running(before.pid)
    assert after.llama_extra_args == ["--seed", "7"]
    with httpx.Client(base_url=after.base_url, trust_env=False) as server:
        server.headers.update(key_of(after.pid))
        assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == 512
    status = orch.status()
    assert status.last_exit is not None
    assert (status.last_exit.pid, status.last_exit.returncode) == (before.pid, -9)
    assert status.last_error is not None
    assert status.last_error.category == "server_exited"
    again = orch.load(tiny_model, max_seq_length=512)
    assert (again.status, again.pid) == ("already_loaded", after.pid)


@pytest.mark.external
def test_a_lease_waits_for_the_restart(real: Callable[..., Orchestrator], tiny_model: str) -> None:
    """A request that arrives while the server is down is passed to the new one."""
    orch = real(restart=RestartPolicy(backoff_s=0.2))
    before = orch.load(tiny_model)
    kill(before.pid)
    until(lambda: orch.status().state is not State.HEALTHY, "the exit is noticed")
    with orch.lease() as server:
        assert (server.generation, is_running(server.pid)) == (2, True)


@pytest.mark.external
def test_a_failed_replacement_restores_the_previous_model(
    real: Callable[..., Orchestrator], tiny_model: str, other_model: str
) -> None:
    """Both outcomes are reported."""
    orch = real()
    before = orch.load(tiny_model, max_seq_length=512)
    with pytest.raises(ServerStartFailed) as caught:
        orch.load(other_model, llama_extra_args=["--seed", "bogus"], restore_previous=True)
    error = caught.value
    assert (error.generation, error.field) == (2, "llama_extra_args")
    assert error.restored is not None
    assert (error.restored.generation, error.restored.problem) == (3, None)
    assert str(error.restored) in "".join(traceback.format_exception(error))
    loaded = orch.status().loaded
    assert loaded is not None
    assert (loaded.model_path, loaded.generation) == (tiny_model, 3)
    assert loaded.requested_context_length == 512
    assert loaded.pid != before.pid
    assert is_running(loaded.pid)
    last_error = orch.status().last_error
    assert last_error is not None
    assert (last_error.generation, last_error.restored) == (2, error.restored)
    again = orch.load(tiny_model, max_seq_length=512)
    assert (again.status, again.generation) == ("already_loaded", 3)


def test_a_failure_and_its_restore_are_reported_over_http(
    fake: Fake, state_dir: Path, model_a: str, model_b: str
) -> None:
    """In one problem document."""
    app = create_app(llama_server=fake.path, server_env=fake.env, state_dir=state_dir)
    fake.behave(by_model={"b.gguf": {"exit_code": 1, "message": "error: no luck"}})
    with serving(app) as client:
        assert client.post(PREFIX + "/load", json={"model_path": model_a}).status_code == 200
        wanted = {"model_path": model_b, "restore_previous": True}
        answer = client.post(PREFIX + "/load", json=wanted)
        assert answer.status_code == 424
        members = answer.json()
        assert members["generation"] == 2
        assert members["restored"] == {
            "status": "loaded",
            "generation": 3,
            "model_path": model_a,
            "gguf_variant": None,
        }
        settled = client.get(PREFIX + "/loads/2").json()
        assert settled["outcome"]["restored"]["generation"] == 3
        assert client.get(PREFIX + "/loads/3").json()["outcome"]["status"] == "loaded"


def test_a_server_that_keeps_crashing_is_not_restarted_for_a_while(
    fake: Fake, state_dir: Path, model_a: str, model_b: str
) -> None:
    """B55: loads of it get 424 with Retry-After, and another model can be loaded."""
    app = create_app(
        llama_server=fake.path, server_env=fake.env, state_dir=state_dir, restart=AT_ONCE
    )
    with serving(app) as client:
        client.post(PREFIX + "/load?wait=false", json={"model_path": model_a})
        killed: set[int] = set()

        def another() -> int | None:
            loaded = client.get(PREFIX + "/status").json()["loaded"]
            return loaded["pid"] if loaded and loaded["pid"] not in killed else None

        for _ in range(3):  # each is Healthy first, because a failed start is handled differently
            pid = until(another, "one more server is Healthy")
            killed.add(pid)
            kill(pid)

        def cooling() -> Any:
            status = client.get(PREFIX + "/status").json()
            recovery = status["recovery"] or {}
            settled = status["state"] == "Idle" and recovery.get("phase") == "cooling_down"
            return status if settled else None

        status = until(cooling, "the cool-down")
        assert status["recovery"]["failures"] == 3
        assert len(fake.entries("start")) == 3, "once as asked, and two restarts"
        refused = client.post(PREFIX + "/load", json={"model_path": model_a})
        assert refused.status_code == 424
        assert refused.json()["category"] == "server_start_failed"
        assert refused.json()["reason"] == "cooling_down"
        assert 590 <= int(refused.headers["Retry-After"]) <= 600
        assert len(fake.entries("start")) == 3
        other = client.post(PREFIX + "/load", json={"model_path": model_b})
        assert other.status_code == 200
        fake.assert_no_overlap()


def test_an_unload_cancels_a_planned_restart(make: Make, fake: Fake, model_a: str) -> None:
    """B16: no server starts by itself after an unload."""
    orch = make(restart=RestartPolicy(backoff_s=0.05))
    outcome = orch.load(model_a)
    kill(outcome.pid)
    until(lambda: orch.status().recovery is not None, "the exit is noticed")
    assert orch.unload(model_a).status == "unloaded"
    assert orch.status().recovery is None
    waited = Background(list, orch.events())
    owner = orch._owner
    assert owner is not None
    until(lambda: not owner._timers, "the timer of the restart has fired")
    orch.close()
    after = [event.data["trigger"] for event in waited.result()]
    assert "restart_due" not in after
    assert len(fake.entries("start")) == 1


def test_a_crash_without_a_restart_policy_starts_nothing(
    make: Make, fake: Fake, model_a: str
) -> None:
    orch = make()
    kill(orch.load(model_a).pid)
    until(lambda: orch.status().state is State.IDLE, "Idle")
    assert orch.status().recovery is None
    orch.close()
    assert "restart_due" not in [event.data["trigger"] for event in transitions(orch)]
    assert len(fake.entries("start")) == 1


@pytest.mark.parametrize(
    ("restart", "field"),
    [
        ("always", "restart"),
        (None, "restart"),
        (True, "restart"),
        (RestartPolicy(limit=0), "restart.limit"),
        (RestartPolicy(limit=True), "restart.limit"),
        (RestartPolicy(backoff_s=-1), "restart.backoff_s"),
        (RestartPolicy(cool_down_s=float("nan")), "restart.cool_down_s"),
        (RestartPolicy(stable_after_s="1"), "restart.stable_after_s"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_restart_policy_is_refused(restart: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Orchestrator(restart=restart)
    assert caught.value.field == field
