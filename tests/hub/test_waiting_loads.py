"""Loads that wait for the Hub: they keep the order of calls, and leave the running model alone.

That model runs until the Hub has answered, and with `prefetch` until the files are there.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import LoadRequest, Orchestrator, State
from orchestrator.demo import tiny_model
from orchestrator.errors import Cancelled, HubError, ModelNotFound, OrchestratorError, Superseded
from tests.kit.fake_hub import Blob, Content, Hub, Repo
from tests.kit.models import TINY
from tests.kit.process.support import Background, until

pytestmark = pytest.mark.external

OTHER = "org/Other-GGUF"


def running_pid(orch: Orchestrator) -> int:
    """Return the pid of the server, which must be Healthy."""
    status = orch.status()
    assert status.state is State.HEALTHY
    assert status.loaded is not None
    return status.loaded.pid


def test_load_with_prefetch_has_its_generation_at_once(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    """`submit` returns it; the state stays, and the phase is `downloading`."""
    pid = orch.load(TINY).pid
    hold = hub.fail(hang=True, path="/cdn/")
    generation = orch.submit(TINY, gguf_variant="Q8_0", prefetch=True)
    hub.wait_for(lambda: hold.held)
    status = orch.status()
    assert status.loading is not None
    assert (status.loading.generation, status.loading.phase) == (generation, "downloading")
    assert (status.loading.gguf_variant, status.prefetching) == ("Q8_0", ())
    assert running_pid(orch) == pid
    assert orch.progress().phase == "downloading"
    assert orch.outcome(generation) is None
    hold.remove()
    until(lambda: orch.outcome(generation) is not None, "the outcome")
    assert running_pid(orch) != pid


def test_cancel_before_a_load_with_prefetch_wins_however_long_the_download(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    """B68: it was compared with the time at which the download ended."""
    assert not orch.cancel("x")
    hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, TINY, prefetch=True, load_request_id="x")
    assert isinstance(load.error(), Cancelled)


def test_older_load_with_a_slow_look_up_never_ends_a_newer_prefetch(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B69: the older load ended the newer one, past the state machine."""
    path = tiny_model.write_tiny_model(tmp_path / "local.gguf", seed=5)
    looking, go_on = threading.Event(), threading.Event()
    look_up = orch._look_ups.find

    def slow(request: LoadRequest, *others: Any) -> Any:
        if request.model_path == str(path):
            looking.set()
            assert go_on.wait(20)
        return look_up(request, *others)

    monkeypatch.setattr(orch._look_ups, "find", slow)
    older = Background(orch.load, str(path))
    assert looking.wait(20)
    hold = hub.fail(hang=True, path="/cdn/")
    newer = Background(orch.load, TINY, prefetch=True)
    hub.wait_for(lambda: hold.held)
    go_on.set()
    assert isinstance(older.error(), Superseded)
    hold.remove()
    assert newer.result().model_path == TINY


@pytest.mark.parametrize("name", [f"{TINY}:Q8_0", TINY.upper(), TINY])
def test_unload_ends_a_load_with_prefetch_by_any_name_of_its_model(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, name: str
) -> None:
    """B70: the facade and the machine compared names in different ways."""
    pid = orch.load(TINY).pid
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, TINY, gguf_variant="Q8_0", prefetch=True)
    hub.wait_for(lambda: hold.held)
    assert orch.unload(name).status == "unloaded"
    assert isinstance(load.error(), Cancelled)
    if ":" in name:
        assert running_pid(orch) == pid, "another variant was unloaded"
    else:
        assert orch.status().state is State.IDLE


def test_unload_of_a_variant_ends_a_load_without_one_that_resolved_to_it(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, TINY, prefetch=True)
    hub.wait_for(lambda: hold.held)
    assert orch.unload(f"{TINY}:Q4_K_M").status == "unloaded"
    assert isinstance(load.error(), Cancelled)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("fields", "category", "field"),
    [
        ({"model_path": "org/none"}, "model_not_found", "model_path"),
        ({"gguf_variant": "Q2_K"}, "model_not_found", "gguf_variant"),
        ({"revision": "nope"}, "model_not_found", "revision"),
        ({"revision": "../x"}, "invalid_request", "revision"),
        ({"model_path": "org/Gated"}, "hub_gated", "hf_token"),
    ],
)
def test_load_that_the_hub_refuses_leaves_the_running_model_alone(
    orch: Orchestrator,
    tiny_repo: Repo,
    hub: Hub,
    tiny_files: dict[str, Content],
    fields: dict[str, str],
    category: str,
    field: str,
    prefetch: bool,
) -> None:
    """B72: the Hub was asked after the running model had been stopped."""
    hub.add(Repo("org/Gated", tiny_files, gated=True))
    pid = orch.load(TINY).pid
    wanted = LoadRequest.from_dict({"model_path": TINY, "prefetch": prefetch, **fields})
    for method in (orch.plan, orch.load):
        with pytest.raises(OrchestratorError) as caught:
            method(wanted)
        assert (caught.value.problem.category, caught.value.field) == (category, field), method
    assert running_pid(orch) == pid
    assert orch.status().loading is None


def test_unreachable_hub_leaves_the_running_model_alone(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    pid = orch.load(TINY).pid
    hub.stop()
    for method in (orch.load, orch.plan):
        with pytest.raises(HubError) as caught:
            method(TINY, gguf_variant="Q8_0", stall_timeout_s=5)
        assert caught.value.problem.category == "hub_unreachable"
    assert running_pid(orch) == pid


def test_load_that_does_not_fit_on_the_disk_leaves_the_running_model_alone(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, tiny_files: dict[str, Content]
) -> None:
    pid = orch.load(TINY).pid
    huge = Blob(1 << 49, lambda start, length: b"")
    huge.__dict__["sha256"] = "0" * 64  # so that it is never read
    hub.add(Repo(OTHER, {"tiny-Q8_0.gguf": huge}))
    hub.clear()
    with pytest.raises(OrchestratorError) as caught:
        orch.load(OTHER, gguf_variant="Q8_0")
    assert caught.value.problem.category == "disk_full"
    assert running_pid(orch) == pid
    assert not hub.seen("/cdn/", "GET")


def test_hub_is_asked_while_the_running_model_serves(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    pid = orch.load(TINY).pid
    hold = hub.fail(hang=True, path="/api/models")
    load = Background(orch.load, TINY, gguf_variant="Q8_0")
    hub.wait_for(lambda: hold.held)
    with orch.lease() as server:
        assert server.pid == pid
    loading = orch.status().loading
    assert loading is not None
    assert loading.phase == "downloading"
    hold.remove()
    assert load.result().gguf_variant == "Q8_0"


def test_newer_load_joins_a_load_with_prefetch(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    first = Background(orch.load, TINY, prefetch=True)
    hub.wait_for(lambda: hold.held)
    second = Background(orch.load, TINY)
    until(lambda: (s := orch.status().loading) and s.callers == 2, "the second caller")
    hold.remove()
    assert first.result().generation == second.result().generation


def test_prefetch_is_cancelled_by_its_id_even_if_the_cancel_comes_first(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    assert not orch.cancel("early")
    early = Background(orch.prefetch, TINY, load_request_id="early")
    assert isinstance(early.error(), Cancelled)
    late = Background(orch.prefetch, TINY, load_request_id="late")
    hub.wait_for(lambda: hold.held)
    assert orch.cancel("late")
    assert isinstance(late.error(), Cancelled)
    assert orch.status().prefetching == ()


def test_fifth_prefetch_is_busy(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, tiny_files: dict[str, Content]
) -> None:
    """Of any caller; but a call for a model in flight shares its download."""
    hold = hub.fail(hang=True, path="/cdn/")
    for number in range(4):
        hub.add(Repo(f"org/Number-{number}", tiny_files))
    calls = [Background(orch.prefetch, f"org/Number-{number}") for number in range(4)]
    until(lambda: len(orch.status().prefetching) == 4, "all four")
    for method in (orch.prefetch, orch.submit):
        with pytest.raises(OrchestratorError) as caught:
            method(LoadRequest(model_path=TINY, prefetch=method == orch.submit))
        assert caught.value.problem.category == "busy"
    shared = Background(orch.prefetch, "org/Number-1")
    hold.remove()
    for call in (*calls, shared):
        assert call.result().files


def test_missing_file_is_found_before_the_running_model_is_stopped(
    orch: Orchestrator, tiny_repo: Repo, tmp_path: Path
) -> None:
    pid = orch.load(TINY).pid
    with pytest.raises(ModelNotFound):
        orch.load(str(tmp_path / "none.gguf"))
    assert running_pid(orch) == pid
