"""Loads of Hub models, with the real llama-server: downloaded, cancelled, prefetched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import LoadRequest, Orchestrator, State
from orchestrator.errors import Cancelled, HubError, OrchestratorError, Superseded
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.models import TINY
from tests.kit.process.support import Background, until, until_state

pytestmark = pytest.mark.external

OTHER = "org/Other-GGUF"


def test_hub_model_is_already_loaded_in_every_spelling(orch: Orchestrator, tiny_repo: Repo) -> None:
    """Its identity is the repo without case, the resolved variant and the resolved commit."""
    plan = orch.plan(TINY)
    assert (plan.action, plan.argv[2]) == ("load", f"<{TINY}>")
    first = orch.load(TINY, llama_extra_args=["--seed", "7"])
    assert (first.status, first.gguf_variant) == ("loaded", "Q4_K_M")
    assert (first.model_path, first.revision, first.note) == (TINY, tiny_repo.commit, None)
    assert first.timings_s.download is not None
    for spelling in (
        {"model_path": TINY},
        {"model_path": TINY.upper()},
        {"model_path": f"{TINY}:q4_k_m"},
        {"model_path": TINY, "gguf_variant": "Q4_K_M"},
        {"model_path": TINY, "revision": tiny_repo.commit},
    ):
        begun = time.monotonic()
        again = orch.load(LoadRequest.from_dict(spelling))
        assert (again.status, again.pid) == ("already_loaded", first.pid), spelling
        assert time.monotonic() - begun < 0.25
        assert again.llama_extra_args == ["--seed", "7"]
    other = orch.load(TINY, gguf_variant="Q8_0")
    assert [reason.field for reason in other.reload_reasons] == ["gguf_variant", "llama_extra_args"]
    assert other.llama_extra_args == [], "args of one variant were inherited by another"
    back = orch.load(f"{TINY}:Q4_K_M")
    assert back.llama_extra_args == ["--seed", "7"]


def test_extra_args_are_inherited_by_the_resolved_variant(
    orch: Orchestrator, tiny_repo: Repo
) -> None:
    """Also if the first load did not name it (B40)."""
    orch.load(TINY, llama_extra_args=["--seed", "7"])
    orch.unload(TINY.upper())
    assert orch.status().state is State.IDLE
    again = orch.load(TINY, gguf_variant="q4_k_m")
    assert again.llama_extra_args == ["--seed", "7"]


@pytest.mark.parametrize("status", [None, 403])
def test_cached_model_is_loaded_with_a_note_if_the_hub_is_unreachable_or_refuses(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, status: int | None
) -> None:
    """Neither refused nor downloaded again (B58, B76)."""
    orch.load(TINY)
    orch.unload()
    if status is None:
        hub.stop()
    else:
        hub.fail(status=status)
    again = orch.load(TINY)
    assert again.status == "loaded"
    assert again.note is not None
    assert "cached revision" in again.note
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.note == again.note
    with pytest.raises(HubError) as caught:
        orch.load(TINY, gguf_variant="Q8_0")
    assert caught.value.problem.status == (status or 502)


def test_cancel_ends_a_download_at_once_and_the_next_load_continues_it(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    """B20: the cancel waited for the whole download, and the server was started after it."""
    stall = hub.fail(stall_after=4 << 20, path="/cdn/", times=1)
    load = Background(orch.load, TINY, gguf_variant="F16", load_request_id="x")
    hub.wait_for(lambda: stall.held)
    until(lambda: (orch.progress().bytes_done or 0) >= 3 << 20, "progress")
    shown = orch.progress()
    assert shown.phase == "downloading"
    assert shown.bytes_total is not None
    assert 0 < (shown.fraction or 0) < 1
    begun = time.monotonic()
    assert orch.cancel("x")
    assert time.monotonic() - begun < 1.0
    assert isinstance(load.error(), Cancelled)
    assert orch.status().state is State.IDLE
    hub.clear()
    outcome = orch.load(TINY, gguf_variant="F16")
    assert outcome.status == "loaded"
    (request,) = hub.seen("/cdn/", "GET")
    assert request.range is not None, "it started again"


def test_unload_and_newer_load_end_a_download(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    stall = hub.fail(hang=True, path="/api/models")
    first = Background(orch.load, TINY)
    hub.wait_for(lambda: stall.held)
    assert orch.unload(TINY).status == "unloaded"
    assert isinstance(first.error(), Cancelled)
    second = Background(orch.load, TINY)
    until(lambda: orch.status().loading, "the load")
    stall.remove()
    third = orch.load(TINY, gguf_variant="Q8_0")
    assert isinstance(second.error(), Superseded) or second.result().status == "loaded"
    assert third.gguf_variant == "Q8_0"


def test_loads_of_the_same_model_share_one_download(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/", times=1)
    first = Background(orch.load, TINY)
    hub.wait_for(lambda: hold.held)
    second = Background(orch.load, TINY.lower())
    until(lambda: (s := orch.status().loading) and s.callers == 2, "the second caller")
    hold.release()
    assert first.result().generation == second.result().generation
    assert len(hub.seen("/cdn/", "GET")) == 1


# ------------------------------------------------------------------------------------ prefetch


def test_prefetch_leaves_the_running_model_alone_and_fills_the_cache(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    first = orch.load(TINY)
    hold = hub.fail(hang=True, path="/cdn/", times=1)
    fetching = Background(orch.prefetch, TINY, gguf_variant="Q8_0")
    hub.wait_for(lambda: hold.held)
    (shown,) = orch.status().prefetching
    assert (shown.model_path, shown.gguf_variant) == (TINY, "Q8_0")
    assert (orch.status().state, orch.load(TINY).pid) == (State.HEALTHY, first.pid)
    hold.release()
    outcome = fetching.result()
    assert (outcome.gguf_variant, outcome.revision) == ("Q8_0", tiny_repo.commit)
    assert orch.status().prefetching == ()
    hub.clear()
    orch.load(TINY, gguf_variant="Q8_0")
    assert not hub.seen("/cdn/", "GET")


def test_failed_load_with_prefetch_leaves_the_running_model_alone(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub
) -> None:
    first = orch.load(TINY)
    hub.fail(status=403, path="/cdn/")
    with pytest.raises(HubError):  # it retries for a part of the stall timeout
        orch.load(TINY, gguf_variant="Q8_0", prefetch=True, stall_timeout_s=6)
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.pid == first.pid
    hub.clear()
    second = orch.load(TINY, gguf_variant="Q8_0", prefetch=True)
    assert (second.status, second.gguf_variant) == ("loaded", "Q8_0")


@pytest.mark.parametrize("end", ["cancel", "unload", "newer load", "close"])
def test_load_with_prefetch_can_be_ended(
    orch: Orchestrator, tiny_repo: Repo, hub: Hub, end: str
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, TINY, gguf_variant="Q8_0", prefetch=True, load_request_id="x")
    hub.wait_for(lambda: hold.held)
    begun = time.monotonic()
    if end == "cancel":
        assert orch.cancel("x")
    elif end == "unload":
        orch.unload()
    elif end == "close":
        orch.close()
    else:
        newer = Background(orch.load, TINY, gguf_variant="Q4_K_M")
    assert type(load.error()).__name__ == {
        "newer load": "Superseded",
        "close": "ShuttingDown",
    }.get(end, "Cancelled")
    assert time.monotonic() - begun < 1.0
    assert orch.status().prefetching == ()
    if end == "newer load":
        hold.remove()
        assert newer.result().gguf_variant == "Q4_K_M"


def test_two_orchestrators_share_the_download_of_one_model(
    llama_server: str, tmp_path: Path, tiny_repo: Repo, hub: Hub
) -> None:
    """Two slots on one host have one cache (B59)."""
    hold = hub.fail(stall_after=2 << 20, path="/cdn/", times=1)
    with (
        Orchestrator(llama_server=llama_server, state_dir=tmp_path / "one") as one,
        Orchestrator(llama_server=llama_server, state_dir=tmp_path / "two") as two,
    ):
        first = Background(one.load, TINY, gguf_variant="F16")
        hub.wait_for(lambda: hold.held)
        second = Background(two.load, TINY, gguf_variant="F16")
        until_state(two, State.DOWNLOADING)
        until(lambda: (two.progress().bytes_done or 0) > 0, "the bytes of the other")
        hold.release()
        outcomes = first.result(), second.result()
        assert [outcome.status for outcome in outcomes] == ["loaded", "loaded"]
        assert outcomes[0].pid != outcomes[1].pid
    assert len(hub.seen("/cdn/", "GET")) == 1


@pytest.mark.parametrize(
    ("about", "fault", "category"),
    [
        ({"private": True}, {}, "model_not_found"),
        ({"gated": True}, {}, "hub_gated"),
        ({}, {"status": 401, "path": "/api/models"}, "hub_unauthorized"),
        ({}, {"status": 429, "path": "/api/models", "retry_after_s": 60}, "hub_rate_limited"),
        ({}, {"status": 500, "path": "/api/models"}, "hub_unreachable"),
        ({}, {"reset_after": 0, "path": "/cdn/"}, "hub_unreachable"),
        ({}, {"hang": True, "path": "/cdn/"}, None),
        ({}, {"flip_at": 9, "path": "/cdn/"}, "hub_corrupt"),
    ],
)
def test_failed_download_keeps_the_inherited_args_of_the_previous_model(
    orch: Orchestrator,
    tiny_repo: Repo,
    hub: Hub,
    tiny_files: dict[str, Content],
    about: dict[str, Any],
    fault: dict[str, Any],
    category: str | None,
) -> None:
    """What can be checked beforehand fails while the previous model runs; a download that fails
    later ends in Idle.
    """
    first = orch.load(TINY, llama_extra_args=["--seed", "7"])
    hub.add(Repo(OTHER, {"other-F16.gguf": tiny_files["tiny-F16.gguf"]}, **about))
    if fault:
        hub.fail(**fault)
    with pytest.raises(OrchestratorError) as caught:
        orch.load(OTHER, stall_timeout_s=5, llama_extra_args=["--seed", "8"])
    hung = {"hub_unreachable", "stalled"}  # the last try or the stall timeout, whichever is first
    assert caught.value.problem.category in ({category} if category else hung)
    status = orch.status()
    if fault.get("path") == "/cdn/":
        assert (status.state, status.loaded) == (State.IDLE, None)
    else:
        assert status.loaded is not None
        assert status.loaded.pid == first.pid
    hub.clear()
    back = orch.load(TINY)
    stayed = "loaded" if status.loaded is None else "already_loaded"
    assert (back.status, back.llama_extra_args) == (stayed, ["--seed", "7"])
