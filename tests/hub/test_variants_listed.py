"""Listing the variants of a Hub repo, as a panel does before anything is downloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
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
from tests.kit.downloads import fetchers
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.http import PREFIX, serving
from tests.kit.models import MODEL
from tests.kit.process.support import Background, until
from tests.kit.sentences import assert_sentence


@pytest.fixture
def orch(state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orchestrator:
        yield orchestrator


def test_variants_have_sizes_and_whether_they_are_cached(
    orch: Orchestrator, gguf_repo: Repo, gguf_files: dict[str, Content]
) -> None:
    """Companion files are not variants; a size includes all parts and the projector."""

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
    assert orch.status().generation == 0, "a listing is not a load"


def test_cached_variants_are_listed_if_the_hub_cannot_be_asked(
    orch: Orchestrator, gguf_repo: Repo, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When offline, and if there is no answer in time; without any it is the error of a load."""
    monkeypatch.setattr(download, "LISTING_S", 0.3)
    hub.fail(hang=True, path="/api/models")
    with pytest.raises(HubUnreachable) as caught:
        orch.variants(MODEL)
    assert_sentence("hub.no_answer", caught.value.message)
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
    with pytest.raises(HubUnreachable) as caught:
        orch.variants("org/other")
    assert caught.value.reason == "offline"
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("model", "settings", "error", "field"),
    [
        ("org/none", {}, ModelNotFound, "model_path"),
        ("org/Empty", {}, ModelNotFound, "model_path"),
        ("org/name:Q8_0", {"gguf_variant": "Q4_0"}, InvalidRequest, "gguf_variant"),
    ],
)
def test_errors_of_a_listing_are_those_of_a_load(
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


def test_cancelled_listing_ends_its_process(hub: Hub, gguf_repo: Repo, state_dir: Path) -> None:
    hub.fail(hang=True, path="/api/models")

    async def main() -> None:
        async with AsyncOrchestrator(llama_server="embedded", state_dir=state_dir) as orch:
            listing = asyncio.ensure_future(orch.variants(MODEL))
            await asyncio.to_thread(until, fetchers, "the request")
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
            await asyncio.to_thread(until, lambda: not fetchers(), "the end of the process")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_client_that_disconnects_ends_its_listing(
    hub: Hub, gguf_repo: Repo, state_dir: Path
) -> None:
    hub.fail(hang=True, path="/api/models")
    with serving(create_app(llama_server="embedded", state_dir=state_dir)) as client:
        with (
            httpx.Client(base_url=client.base_url, timeout=0.5, trust_env=False) as impatient,
            pytest.raises(httpx.ReadTimeout),
        ):
            impatient.post(PREFIX + "/variants", json={"model_path": MODEL})
        until(lambda: not fetchers(), "the end of the listing")
        assert client.get(PREFIX + "/status").json()["state"] == "Idle"


def test_close_ends_listings_with_shutting_down(hub: Hub, gguf_repo: Repo, state_dir: Path) -> None:
    hub.fail(hang=True, path="/api/models")
    orch = Orchestrator(llama_server="embedded", state_dir=state_dir)
    waiting = Background(orch.variants, MODEL)
    until(fetchers, "the request")
    orch.close()
    assert not fetchers()
    assert isinstance(waiting.error(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        orch.variants(MODEL)


def test_number_of_listings_in_flight_is_limited(
    hub: Hub, gguf_repo: Repo, orch: Orchestrator
) -> None:
    hub.fail(hang=True, path="/api/models")
    waiting = [Background(orch.variants, MODEL) for _ in range(MAX_AT_ONCE)]
    until(lambda: len(fetchers()) == MAX_AT_ONCE, "all of them")
    with pytest.raises(Busy) as caught:
        orch.variants(MODEL)
    assert_sentence("listing.busy", caught.value.message)
    orch.close()
    assert all(isinstance(one.error(), ShuttingDown) for one in waiting)
