"""Hub models under the orchestrator: downloaded, loaded for real, cancelled, prefetched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import LoadRequest, Orchestrator, State
from orchestrator.demo import tiny_model
from orchestrator.errors import (
    Cancelled,
    HubError,
    HubUnreachable,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
    Superseded,
)
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.process.support import Background, until, until_state

pytestmark = pytest.mark.external

NAME = "org/Tiny-GGUF"
OTHER = "org/Other-GGUF"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """Two variants small enough to load at once, and one that takes its time to arrive."""
    top = tmp_path_factory.mktemp("models")
    big = tiny_model.write_tiny_model(top / "big.gguf", seed=3, padding_bytes=8 << 20)
    return {
        "tiny-Q4_K_M.gguf": tiny_model.write_tiny_model(top / "a.gguf", seed=1),
        "tiny-Q8_0.gguf": tiny_model.write_tiny_model(top / "b.gguf", seed=2),
        "tiny-F16.gguf": big,
        "README.md": b"# tiny\n",
    }


@pytest.fixture
def repo(hub: Hub, models: dict[str, Content]) -> Repo:
    return hub.add(Repo(NAME, models))


@pytest.fixture
def orch(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


def test_a_hub_model_is_downloaded_and_loaded_and_then_the_same_in_every_spelling(
    orch: Orchestrator, repo: Repo
) -> None:
    """Identity of a Hub model: repo without case, resolved variant, resolved commit."""
    plan = orch.plan(NAME)
    assert (plan.action, plan.argv[2]) == ("load", f"<{NAME}>")
    first = orch.load(NAME, llama_extra_args=["--seed", "7"])
    assert (first.status, first.gguf_variant) == ("loaded", "Q4_K_M")
    assert (first.model_path, first.revision, first.note) == (NAME, repo.commit, None)
    assert first.timings_s.download is not None
    for spelling in (
        {"model_path": NAME},
        {"model_path": NAME.upper()},
        {"model_path": f"{NAME}:q4_k_m"},
        {"model_path": NAME, "gguf_variant": "Q4_K_M"},
        {"model_path": NAME, "revision": repo.commit},
    ):
        begun = time.monotonic()
        again = orch.load(LoadRequest.from_dict(spelling))
        assert (again.status, again.pid) == ("already_loaded", first.pid), spelling
        assert time.monotonic() - begun < 0.25
        assert again.llama_extra_args == ["--seed", "7"]
    other = orch.load(NAME, gguf_variant="Q8_0")
    assert [reason.field for reason in other.reload_reasons] == ["gguf_variant", "llama_extra_args"]
    assert other.llama_extra_args == [], "flags of one variant never reach another"
    back = orch.load(f"{NAME}:Q4_K_M")
    assert back.llama_extra_args == ["--seed", "7"]


def test_a_first_load_inherits_by_the_variant_that_was_found(
    orch: Orchestrator, repo: Repo, hub: Hub, tmp_path: Path
) -> None:
    """B40: args are kept by the resolved variant, also when nobody knew it at first."""
    orch.load(NAME, llama_extra_args=["--seed", "7"])
    orch.unload(NAME.upper())
    assert orch.status().state is State.IDLE
    again = orch.load(NAME, gguf_variant="q4_k_m")
    assert again.llama_extra_args == ["--seed", "7"]


def test_an_unreachable_hub_costs_nothing_that_is_cached_and_the_status_says_so(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    """B58: refused offline, or downloaded again."""
    orch.load(NAME)
    orch.unload()
    hub.stop()
    again = orch.load(NAME)
    assert again.status == "loaded"
    assert again.note is not None
    assert "cached revision" in again.note
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.note == again.note
    with pytest.raises(HubUnreachable) as caught:
        orch.load(NAME, gguf_variant="Q8_0")
    assert caught.value.problem.status == 502


def test_a_cancel_during_the_download_settles_at_once_and_the_next_load_goes_on(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    """B20: a cancel that waits for the whole download, and then starts the server."""
    stall = hub.fail(stall_after=4 << 20, path="/cdn/", times=1)
    load = Background(orch.load, NAME, gguf_variant="F16", load_request_id="x")
    hub.wait_for(lambda: stall.held)
    until(lambda: (orch.progress().bytes_done or 0) >= 3 << 20, "bytes are shown")
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
    outcome = orch.load(NAME, gguf_variant="F16")
    assert outcome.status == "loaded"
    (asked,) = hub.seen("/cdn/", "GET")
    assert asked.range is not None, "it goes on from the bytes that are there"


def test_an_unload_and_a_newer_load_end_a_download(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    stall = hub.fail(hang=True, path="/api/models")
    first = Background(orch.load, NAME)
    hub.wait_for(lambda: stall.held)
    assert orch.unload(NAME).status == "unloaded"
    assert isinstance(first.error(), Cancelled)
    second = Background(orch.load, NAME)
    until(lambda: orch.status().loading, "it waits for the Hub")
    stall.remove()
    third = orch.load(NAME, gguf_variant="Q8_0")
    assert isinstance(second.error(), Superseded) or second.result().status == "loaded"
    assert third.gguf_variant == "Q8_0"


def test_two_loads_of_one_model_share_one_download(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/", times=1)
    first = Background(orch.load, NAME)
    hub.wait_for(lambda: hold.held)
    second = Background(orch.load, NAME.lower())
    until(lambda: (s := orch.status().loading) and s.callers == 2, "it joins")
    hold.release()
    assert first.result().generation == second.result().generation
    assert len(hub.seen("/cdn/", "GET")) == 1


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"model_path": "org/none"}, ModelNotFound, "model_path"),
        ({"model_path": NAME, "gguf_variant": "Q2_K"}, ModelNotFound, "gguf_variant"),
        ({"model_path": NAME, "revision": "nope"}, ModelNotFound, "revision"),
        ({"model_path": f"{NAME}:Q8_0", "gguf_variant": "F16"}, InvalidRequest, "gguf_variant"),
        ({"model_path": NAME, "revision": "../x"}, InvalidRequest, "revision"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_that_names_its_field(
    orch: Orchestrator,
    repo: Repo,
    fields: dict[str, Any],
    error: type[OrchestratorError],
    field: str,
) -> None:
    with pytest.raises(error) as caught:
        orch.load(LoadRequest.from_dict(fields))
    assert caught.value.field == field


# ------------------------------------------------------------------------------------ prefetch


def test_a_prefetch_leaves_what_runs_alone_and_the_load_after_it_finds_it_cached(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    first = orch.load(NAME)
    hold = hub.fail(hang=True, path="/cdn/", times=1)
    fetching = Background(orch.prefetch, NAME, gguf_variant="Q8_0")
    hub.wait_for(lambda: hold.held)
    (shown,) = orch.status().prefetching
    assert (shown.model_path, shown.gguf_variant) == (NAME, "Q8_0")
    assert (orch.status().state, orch.load(NAME).pid) == (State.HEALTHY, first.pid)
    hold.release()
    outcome = fetching.result()
    assert (outcome.gguf_variant, outcome.revision) == ("Q8_0", repo.commit)
    assert orch.status().prefetching == ()
    hub.clear()
    orch.load(NAME, gguf_variant="Q8_0")
    assert not hub.seen("/cdn/", "GET")


def test_a_load_that_prefetches_costs_the_running_model_nothing_when_it_fails(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    first = orch.load(NAME)
    hub.fail(status=403, path="/cdn/")
    with pytest.raises(HubError):  # patience is a part of the stall clock
        orch.load(NAME, gguf_variant="Q8_0", prefetch=True, stall_timeout_s=2)
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.pid == first.pid
    hub.clear()
    second = orch.load(NAME, gguf_variant="Q8_0", prefetch=True)
    assert (second.status, second.gguf_variant) == ("loaded", "Q8_0")


@pytest.mark.parametrize("end", ["cancel", "unload", "newer load", "close"])
def test_a_load_that_prefetches_can_be_ended(
    orch: Orchestrator, repo: Repo, hub: Hub, end: str
) -> None:
    """It has its generation from the first moment, and ends like any other load."""
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, NAME, gguf_variant="Q8_0", prefetch=True, load_request_id="x")
    hub.wait_for(lambda: hold.held)
    begun = time.monotonic()
    if end == "cancel":
        assert orch.cancel("x")
    elif end == "unload":
        orch.unload()
    elif end == "close":
        orch.close()
    else:
        newer = Background(orch.load, NAME, gguf_variant="Q4_K_M")
    assert type(load.error()).__name__ == {
        "newer load": "Superseded",
        "close": "ShuttingDown",
    }.get(end, "Cancelled")
    assert time.monotonic() - begun < 1.0
    assert orch.status().prefetching == ()
    if end == "newer load":
        hold.remove()
        assert newer.result().gguf_variant == "Q4_K_M"


def test_two_orchestrators_that_want_one_model_share_its_download_and_both_serve(
    llama_server: str, tmp_path: Path, repo: Repo, hub: Hub
) -> None:
    """B59: two slots on one host, one cache."""
    hold = hub.fail(stall_after=2 << 20, path="/cdn/", times=1)
    with (
        Orchestrator(llama_server=llama_server, state_dir=tmp_path / "one") as one,
        Orchestrator(llama_server=llama_server, state_dir=tmp_path / "two") as two,
    ):
        first = Background(one.load, NAME, gguf_variant="F16")
        hub.wait_for(lambda: hold.held)
        second = Background(two.load, NAME, gguf_variant="F16")
        until_state(two, State.DOWNLOADING)
        until(lambda: (two.progress().bytes_done or 0) > 0, "it sees what the other has")
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
def test_a_load_the_hub_spoils_costs_no_settings_and_the_way_back_is_open(
    orch: Orchestrator,
    repo: Repo,
    hub: Hub,
    models: dict[str, Content],
    about: dict[str, Any],
    fault: dict[str, Any],
    category: str | None,
) -> None:
    """Each failure has its own category. What can be asked beforehand is, while the model that runs
    goes on; a download that breaks off later ends in Idle.
    """
    first = orch.load(NAME, llama_extra_args=["--seed", "7"])
    hub.add(Repo(OTHER, {"other-F16.gguf": models["tiny-F16.gguf"]}, **about))
    if fault:
        hub.fail(**fault)
    with pytest.raises(OrchestratorError) as caught:
        orch.load(OTHER, stall_timeout_s=2, llama_extra_args=["--seed", "8"])
    given_up = {"hub_unreachable", "stalled"}  # the last try, or the clock: whichever is first
    assert caught.value.problem.category in ({category} if category else given_up)
    status = orch.status()
    if fault.get("path") == "/cdn/":
        assert (status.state, status.loaded) == (State.IDLE, None)
    else:
        assert status.loaded is not None
        assert status.loaded.pid == first.pid
    hub.clear()
    back = orch.load(NAME)
    stayed = "loaded" if status.loaded is None else "already_loaded"
    assert (back.status, back.llama_extra_args) == (stayed, ["--seed", "7"])
