"""The variants of a Hub repo, as a panel lists them before anything is downloaded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.errors import (
    Busy,
    HubUnreachable,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
    ShuttingDown,
)
from orchestrator.http import create_app
from orchestrator.models.hub import download
from orchestrator.models.listings import MAX_AT_ONCE
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.http import PREFIX, serving
from tests.kit.models import MODEL
from tests.kit.process.support import Background, until


@pytest.fixture
def orch(state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orchestrator:
        yield orchestrator


def fetchers() -> int:
    """How many processes speak to the Hub for us."""
    found = 0
    for child in psutil.Process(os.getpid()).children():
        try:
            found += any(word.endswith("fetcher.py") for word in child.cmdline())
        except psutil.Error:  # gone meanwhile
            continue
    return found


def test_a_repo_is_listed_with_sizes_and_what_is_here_already(
    orch: Orchestrator, gguf_repo: Repo, gguf_files: dict[str, Content]
) -> None:
    """Projectors, drafts and matrices are no variants; all parts and the projector count."""

    def size(*names: str) -> int:
        paths = (gguf_files[name] for name in names)
        return sum(path.stat().st_size for path in paths if isinstance(path, Path))

    split = [name for name in gguf_files if name.startswith("BF16/")]
    found = {v.gguf_variant: v for v in orch.variants(MODEL).variants}
    assert list(found) == ["UD-Q4_K_XL", "Q4_K_M", "Q8_0", "BF16"]
    assert [v.is_default for v in found.values()] == [True, False, False, False]
    projector = "mmproj-F16.gguf"
    assert found["Q8_0"].size_bytes == size("Qwen3-0.6B-Q8_0.gguf", projector)
    assert found["BF16"].size_bytes == size(*split, projector)
    assert not any(v.is_cached for v in found.values())
    fetched = orch.prefetch(MODEL, gguf_variant="Q8_0")
    assert fetched.size_bytes == found["Q8_0"].size_bytes
    here = [v.gguf_variant for v in orch.variants(MODEL.upper()).variants if v.is_cached]
    assert here == ["Q8_0"]
    assert orch.status().generation == 0, "to list is no load"


def test_without_the_hub_what_is_here_is_listed(
    orch: Orchestrator, gguf_repo: Repo, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a load would: offline, or when there is no answer in time; else the error says so."""
    monkeypatch.setattr(download, "LISTING_S", 0.3)
    hub.fail(hang=True, path="/api/models")
    with pytest.raises(HubUnreachable, match="did not answer within"):
        orch.variants(MODEL)
    hub.clear()
    monkeypatch.setattr(download, "LISTING_S", 20.0)
    orch.prefetch(MODEL, gguf_variant="BF16")
    monkeypatch.setattr(download, "LISTING_S", 0.3)
    hub.fail(hang=True, path="/api/models")
    (one,) = orch.variants(MODEL).variants
    assert (one.gguf_variant, one.is_default, one.is_cached) == ("BF16", True, True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert orch.variants(MODEL).variants == [one]
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set"):
        orch.variants("org/other")
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("model", "settings", "error", "field"),
    [
        ("org/none", {}, ModelNotFound, "model_path"),
        ("org/Empty", {}, ModelNotFound, "model_path"),
        ("org/name:Q8_0", {"gguf_variant": "Q4_0"}, InvalidRequest, "gguf_variant"),
    ],
)
def test_errors_are_those_of_a_load(
    orch: Orchestrator,
    hub: Hub,
    model: str,
    settings: dict[str, Any],
    error: type[OrchestratorError],
    field: str,
) -> None:
    hub.add(Repo("org/Empty", {"mmproj-F16.gguf": b"x"}))
    with pytest.raises(error) as caught:
        orch.variants(model, **settings)
    assert caught.value.problem.field == field


def test_a_listing_that_nobody_waits_for_is_ended(
    hub: Hub, gguf_repo: Repo, state_dir: Path
) -> None:
    """Its process is gone, and with it whatever it waited for."""
    hub.fail(hang=True, path="/api/models")

    async def main() -> None:
        async with AsyncOrchestrator(llama_server="embedded", state_dir=state_dir) as orch:
            listing = asyncio.ensure_future(orch.variants(MODEL))
            await asyncio.to_thread(until, fetchers, "it asks the Hub")
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
            await asyncio.to_thread(until, lambda: not fetchers(), "its process ends")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_client_that_goes_away_ends_its_listing(
    hub: Hub, gguf_repo: Repo, state_dir: Path
) -> None:
    hub.fail(hang=True, path="/api/models")
    with serving(create_app(llama_server="embedded", state_dir=state_dir)) as client:
        with (
            httpx.Client(base_url=client.base_url, timeout=0.5, trust_env=False) as impatient,
            pytest.raises(httpx.ReadTimeout),
        ):
            impatient.post(PREFIX + "/variants", json={"model_path": MODEL})
        until(lambda: not fetchers(), "the listing ends")
        assert client.get(PREFIX + "/status").json()["state"] == "Idle"


def test_a_close_ends_the_listings_and_says_so(hub: Hub, gguf_repo: Repo, state_dir: Path) -> None:
    hub.fail(hang=True, path="/api/models")
    orch = Orchestrator(llama_server="embedded", state_dir=state_dir)
    waiting = Background(orch.variants, MODEL)
    until(fetchers, "it asks the Hub")
    orch.close()
    assert not fetchers()
    assert isinstance(waiting.error(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        orch.variants(MODEL)


def test_so_many_listings_run_at_once_and_no_more(
    hub: Hub, gguf_repo: Repo, orch: Orchestrator
) -> None:
    hub.fail(hang=True, path="/api/models")
    waiting = [Background(orch.variants, MODEL) for _ in range(MAX_AT_ONCE)]
    until(lambda: fetchers() == MAX_AT_ONCE, "all are under way")
    with pytest.raises(Busy, match="ask again"):
        orch.variants(MODEL)
    orch.close()
    assert all(isinstance(one.error(), ShuttingDown) for one in waiting)
