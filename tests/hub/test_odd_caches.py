"""Caches without links or locks, or that cannot be written; mirrors that list names only."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.errors import CacheDirError, HubUnreachable
from orchestrator.models.hub import cache
from orchestrator.models.hub import download as hub_models
from orchestrator.models.hub.fetch_process import FetchProgress
from tests.kit import fake_hub
from tests.kit.downloads import (
    BIG,
    BIG_FILE,
    Download,
    blob_of,
    fetch,
    look_up,
    refuse,
    requested,
    root_of,
)
from tests.kit.sentences import assert_sentence

pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a fetcher takes to start."""
    monkeypatch.setattr(hub_models, "FRESHNESS_S", 20.0)


# Without links


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("why", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, "disabled"])
def test_model_is_fetched_into_a_cache_without_links(
    hub: fake_hub.Hub,
    big_file: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: int | str,
) -> None:
    """In the layout that huggingface_hub has there, without a second copy (B81)."""
    if isinstance(why, str):
        monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    else:
        refuse(monkeypatch, tmp_path, links=why)
    files = fetch(records, model_path=BIG)
    assert not os.path.islink(files.weights[0].path)
    assert Path(files.weights[0].path).read_bytes() == big_file.read_bytes()
    assert not list((root_of(BIG) / "blobs").iterdir())
    assert not scan_cache_dir(cache.directory()).warnings
    hub.clear()
    assert fetch(records, model_path=BIG).weights == files.weights
    assert not hub.seen("/resolve/"), "it is there"
    hub.stop()
    assert hf_hub_download(BIG, BIG_FILE, local_files_only=True) == files.weights[0].path


def test_blob_that_another_commit_has_stays_where_links_are_refused(
    hub: fake_hub.Hub,
    big: fake_hub.Repo,
    big_file: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = fetch(records, model_path=BIG)
    big.push({BIG_FILE: big_file, "README.md": b"new"})
    hub.clear()
    refuse(monkeypatch, tmp_path, links=errno.EPERM)
    new = fetch(records, model_path=BIG)
    assert new.weights != old.weights
    for files in (old, new):
        assert Path(files.weights[0].path).read_bytes() == big_file.read_bytes()
    assert not hub.sent(BIG_FILE)


# Without locks


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("why", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_download_without_locks_is_whole_and_continued(
    hub: fake_hub.Hub,
    big_file: Path,
    download: Callable[..., Download],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: int,
) -> None:
    refuse(monkeypatch, tmp_path, locks=why)
    hub.fail(stall_after=3 << 20, times=1)
    one = download(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 3 << 20, "3 MiB")
    one.cancel()
    hub.clear()
    files = download(model_path=BIG).files()
    assert Path(files.weights[0].path).read_bytes() == big_file.read_bytes()
    assert [request.range for request in hub.seen(server="cdn")] == [f"bytes={3 << 20}-"]
    assert list((root_of(BIG) / "blobs").iterdir()) == [blob_of(files)], "nothing of ours is left"


@pytest.mark.usefixtures("big")
def test_two_downloads_without_locks_never_write_one_file(
    hub: fake_hub.Hub,
    big_file: Path,
    download: Callable[..., Download],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has a partial file of its own: what the other sends would be between its bytes (B59)."""
    refuse(monkeypatch, tmp_path, locks=errno.ENOSYS)
    hold = hub.fail(path="/cdn/", stall_after=1 << 20, times=2)
    both = [download(model_path=BIG), download(model_path=BIG)]
    for one in both:
        one.wait_until(lambda p: p.bytes_done >= 1 << 20, "1 MiB")
    assert len(list((root_of(BIG) / "blobs").iterdir())) == 2
    hold.release()
    for one in both:
        assert Path(one.files().weights[0].path).read_bytes() == big_file.read_bytes()


# Read-only


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("has_blobs", [True, False])
def test_whole_model_is_used_from_a_cache_that_cannot_be_written(
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_blobs: bool,
) -> None:
    """Of an image, or another user; never hashed before, and with a ref that is older."""
    files = fetch(records, model_path=BIG)
    path = Path(files.weights[0].path)
    if not has_blobs:
        path.resolve().replace(path)
        (root_of(BIG) / "blobs").rmdir()
    (root_of(BIG) / "refs" / "main").unlink()
    refuse(monkeypatch, tmp_path, writes=errno.EROFS)
    found = fetch(tmp_path / "other records", model_path=BIG)
    assert found.weights[0].path == str(path)
    assert (root_of(BIG) / "blobs").exists() is has_blobs
    assert not (root_of(BIG) / "refs" / "main").exists()
    refuse(monkeypatch, tmp_path)  # nothing
    fetch(tmp_path / "other records", model_path=BIG)
    assert (root_of(BIG) / "refs" / "main").exists(), "where it can be written it is recorded"


@pytest.mark.usefixtures("big")
def test_download_into_a_cache_that_cannot_be_written_is_refused_before_it_starts(
    hub: fake_hub.Hub, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder's name, and before anything is stopped: `plan` asks the same (B81)."""
    cache.directory().mkdir(parents=True)
    refuse(monkeypatch, tmp_path, writes=errno.EROFS)
    model, token = requested(records, model_path=BIG), CancelToken(Generation(1))
    calls = partial(model.resolve, token), partial(model.fetch, token, FetchProgress())
    for call in calls:
        with pytest.raises(CacheDirError) as refused:
            call()
        assert_sentence("cache.read_only", refused.value.message, folder=cache.directory())
    assert not hub.seen("/resolve/")


def test_older_commit_is_used_from_a_cache_that_cannot_be_written(
    big: fake_hub.Repo, big_file: Path, records: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    old = fetch(records, model_path=BIG)
    big.push({BIG_FILE: big_file, "README.md": b"new"})
    refuse(monkeypatch, tmp_path, writes=errno.EROFS)
    found = fetch(records, model_path=BIG)
    assert found.weights == old.weights
    assert found.hub is not None
    assert "cannot be written" in str(found.hub.note)


# Mirrors


@pytest.fixture
def mirror(hub: fake_hub.Hub, gguf_files: dict[str, fake_hub.Content]) -> fake_hub.Repo:
    """A repo whose listing has neither sizes nor hashes."""
    return hub.add(fake_hub.Repo("owner/Mirror", gguf_files, lists_sizes=False))


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize("variant", [None, "BF16"])
def test_model_is_fetched_from_a_mirror_that_lists_names_only(
    hub: fake_hub.Hub, records: Path, variant: str | None
) -> None:
    """Size and hash are asked for each file that is wanted, and no other (B85)."""
    progress = FetchProgress()
    files = fetch(records, progress, model_path="owner/Mirror", gguf_variant=variant)
    assert files.variant == (variant or "UD-Q4_K_XL")
    assert progress.bytes_done == progress.bytes_total == files.size_bytes
    assert all(len(os.path.basename(os.path.realpath(f.path))) == 64 for f in files.weights)
    assert look_up(records, model_path="owner/Mirror", gguf_variant=variant).is_on_disk
    wanted = {os.path.basename(file.path) for file in (*files.weights, files.projector) if file}
    assert {os.path.basename(request.path) for request in hub.seen("/resolve/")} == wanted
    hub.clear()
    again = fetch(records, model_path="owner/Mirror", gguf_variant=variant)
    assert again.weights == files.weights
    assert not hub.seen("/resolve/")


@pytest.mark.usefixtures("mirror")
def test_variants_of_a_mirror_have_a_size_once_they_are_cached(records: Path) -> None:
    model = requested(records, model_path="owner/Mirror")
    listed = model.variants(CancelToken(Generation(1)))
    assert [one.gguf_variant for one in listed] == ["UD-Q4_K_XL", "Q4_K_M", "Q8_0", "BF16"]
    assert [one.size_bytes for one in listed] == [None] * 4
    files = fetch(records, model_path="owner/Mirror:Q8_0")
    listed = model.variants(CancelToken(Generation(1)))
    sizes = {one.gguf_variant: one.size_bytes for one in listed}
    assert sizes["Q8_0"] == files.size_bytes
    assert [one.gguf_variant for one in listed if one.is_cached] == ["Q8_0"]


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize("name", ["X-Linked-ETag", "X-Linked-Size"])
def test_mirror_that_says_neither_size_nor_hash_is_an_error(
    hub: fake_hub.Hub, records: Path, name: str
) -> None:
    """What cannot be checked is not fetched."""
    hub.fail(path="/resolve/", headers={"X-Linked-ETag": None, "X-Linked-Size": None, "ETag": None})
    hub.fail(path="/cdn/", headers={"ETag": None} if "ETag" in name else {"Content-Length": None})
    with pytest.raises(HubUnreachable) as refused:
        fetch(records, model_path="owner/Mirror")
    assert "size or no hash" in refused.value.message


def test_file_in_the_cache_needs_no_listed_size(
    hub: fake_hub.Hub, mirror: fake_hub.Repo, records: Path, tmp_path: Path
) -> None:
    """It was fetched by another tool, or by a run whose records are gone."""
    first = fetch(records, model_path="owner/Mirror:Q8_0")
    shutil.rmtree(records)
    hub.clear()
    again = fetch(tmp_path / "others", model_path="owner/Mirror:Q8_0")
    assert again.weights == first.weights
    assert not hub.seen("/resolve/")
    assert again.hub is not None
    assert again.hub.commit == mirror.commit
