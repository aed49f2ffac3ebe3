"""Hub models on disk: the real client in a real child process, against the fake hub."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir

from orchestrator.base import launch
from orchestrator.base.tokens import CancelReason, CancelToken, Generation
from orchestrator.errors import (
    Cancelled,
    DiskFull,
    HubCorrupt,
    HubUnreachable,
    InvalidModel,
    OrchestratorError,
)
from orchestrator.models.hub import cache
from orchestrator.models.hub import download as hub_models
from orchestrator.models.hub.fetch_process import FetchProgress
from tests.kit import fake_hub
from tests.kit.downloads import (
    BIG,
    BIG_FILE,
    FILE,
    PARTIAL,
    Download,
    add_partial,
    assert_whole,
    blob_of,
    content,
    fetch,
    fetchers,
    flip_byte,
    look_up,
    requested,
    root_of,
)
from tests.kit.models import MODEL
from tests.kit.sentences import assert_sentence

pytestmark = pytest.mark.usefixtures("hub")


def fetch_with_client(hub: fake_hub.Hub, revision: str | None = None) -> Path:
    """Have huggingface_hub fetch the file, as another tool would, and return its path."""
    return Path(hf_hub_download(MODEL, FILE, revision=revision, endpoint=hub.endpoint))


# ------------------------------------------------------------------------- what a download leaves


def test_model_is_fetched_whole_and_found_by_the_client(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    """The cache is shared, and needs no request."""
    progress = FetchProgress()
    files = fetch(records, progress, gguf_variant="Q8_0")
    assert files.variant == "Q8_0"
    assert files.hub is not None
    assert files.hub.commit == gguf_repo.commit
    fetched = Path(files.weights[0].path)
    assert fetched.read_bytes() == content(gguf_files, FILE)
    hub.stop()
    assert hf_hub_download(MODEL, FILE, local_files_only=True) == files.weights[0].path
    assert not scan_cache_dir(cache.directory()).warnings
    assert progress.bytes_done == progress.bytes_total == files.size_bytes
    assert not [p for p in os.listdir(fetched.parents[2] / "blobs") if "orchestrator" in p]
    assert (fetched.parents[2] / "refs" / "main").read_text() == gguf_repo.commit


def test_size_of_a_model_is_known_before_it_is_fetched(
    gguf_repo: fake_hub.Repo, gguf_files: dict[str, fake_hub.Content], records: Path
) -> None:
    """Of all that a load would fetch. Once it is here, its files say it."""
    found = requested(records, gguf_variant="Q8_0").resolve(CancelToken(Generation(1)))
    expected = len(content(gguf_files, FILE)) + len(content(gguf_files, "mmproj-F16.gguf"))
    assert (found.is_on_disk, found.listed_bytes) == (False, expected)
    fetched = fetch(records, gguf_variant="Q8_0")
    assert (fetched.size_bytes, fetched.listed_bytes) == (expected, 0)


@pytest.mark.usefixtures("gguf_repo")
def test_projector_is_fetched_unless_one_is_given(records: Path, tmp_path: Path) -> None:
    found = fetch(records, gguf_variant="Q8_0")
    assert found.projector is not None
    assert found.projector.path.endswith("mmproj-F16.gguf")
    given = fetch(records, gguf_variant="Q8_0", mmproj_path=str(tmp_path / "own.gguf"))
    assert given.projector is None


def test_all_parts_of_a_split_model_are_of_one_commit(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    download: Callable[..., Download],
) -> None:
    """Also if the repo is changed between two parts."""
    old = gguf_repo.commit
    hold = hub.fail(path="00001-of", hang=True, times=1)
    one = download(gguf_variant="BF16")
    hub.wait_for(lambda: hold.held)
    first, second = sorted(name for name in gguf_files if "-of-" in name)
    gguf_repo.push({**gguf_files, first: gguf_files[second], second: gguf_files[first]})
    hold.release()
    files = one.files()
    assert files.hub is not None
    assert files.hub.commit == old
    assert len(files.weights) == 2
    assert {Path(file.path).parent.parent.name for file in files.weights} == {old}


def test_spellings_that_differ_in_case_share_one_folder(
    hub: fake_hub.Hub, gguf_repo: fake_hub.Repo, records: Path
) -> None:
    files = fetch(records, model_path=f"{MODEL.lower()}:q8_0")
    assert files.variant == "Q8_0"
    assert files.hub is not None
    assert files.hub.repo == MODEL
    assert [p.name for p in cache.directory().glob("models--*")] == [root_of().name]
    hub.clear()
    for model in (MODEL, MODEL.upper()):
        again = fetch(records, model_path=f"{model}:Q8_0", revision=gguf_repo.commit)
        assert again.weights == files.weights
    assert not hub.requests


def test_renamed_repo_is_cached_by_its_old_name(
    hub: fake_hub.Hub, gguf_files: dict[str, fake_hub.Content], records: Path
) -> None:
    """As huggingface_hub does; otherwise nothing finds it offline."""
    hub.add(fake_hub.Repo("new/name-GGUF", {FILE: gguf_files[FILE]}, aliases=["old/name-GGUF"]))
    files = fetch(records, model_path="old/name-GGUF")
    assert files.hub is not None
    assert files.hub.repo == "old/name-GGUF"
    assert look_up(records, model_path="old/name-GGUF").weights == files.weights


def test_file_names_may_have_any_printable_character(
    hub: fake_hub.Hub, gguf_files: dict[str, fake_hub.Content], records: Path
) -> None:
    name = "a/b c/d+e/Mödel #1 100%25 ?x=y&z 模型-Q8_0.gguf"
    hub.add(fake_hub.Repo("owner/odd", {name: gguf_files[FILE]}))
    files = fetch(records, model_path="owner/odd")
    assert files.weights[0].path.endswith(name)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)


def test_file_outside_of_lfs_is_checked_by_its_git_hash(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake_hub, "is_lfs", lambda *_: False)
    hub.add(fake_hub.Repo("owner/git", {FILE: gguf_files[FILE]}))
    hub.fail(path="/resolve/", flip_at=300_000, times=1)
    files = fetch(records, model_path="owner/git")
    assert len(blob_of(files).name) == 40
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert len(hub.seen("/resolve/", "GET")) == 2


@pytest.mark.parametrize("data", [b"", b"<html>not a model</html>" * 100])
def test_whole_file_that_is_not_a_gguf_is_refused(
    hub: fake_hub.Hub, records: Path, data: bytes
) -> None:
    hub.add(fake_hub.Repo("owner/empty", {"x-Q8_0.gguf": data}))
    with pytest.raises(InvalidModel):
        fetch(records, model_path="owner/empty")


def test_token_that_is_already_set_starts_no_process(
    records: Path, launches: list[tuple[str, ...]], hub: fake_hub.Hub
) -> None:
    token = CancelToken(Generation(1))
    token.set(CancelReason.USER)
    with pytest.raises(Cancelled):
        requested(records).fetch(token, FetchProgress())
    assert not launches
    assert not hub.requests


# ------------------------------------------------------------------------------------ cached first


def test_cached_model_needs_no_network_if_offline_or_pinned(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, ...]],
) -> None:
    first = fetch(records)
    assert first.variant == "UD-Q4_K_XL"
    hub.clear()
    launches.clear()
    assert fetch(records, revision=gguf_repo.commit).weights == first.weights
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    progress = FetchProgress()
    offline = fetch(records, progress)
    assert offline == first
    assert progress.bytes_done == progress.bytes_total == first.size_bytes
    assert not hub.requests
    assert not launches


def test_cached_branch_costs_one_request(
    hub: fake_hub.Hub, gguf_repo: fake_hub.Repo, records: Path
) -> None:
    first = fetch(records)
    hub.clear()
    assert fetch(records) == first
    assert [request.path for request in hub.requests] == [f"/api/models/{gguf_repo.name}"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 401}, "401"),
        ({"status": 403}, "403"),
        ({"status": 404}, "404"),
        ({"status": 500}, "500"),
        ({"status": 429, "retry_after_s": 1}, "too many requests"),
        ({"hang": True}, "2 s"),
        ({"html": True}, "web page"),
        ({"truncate_json": True}, "cannot be used"),
        (None, "cannot be reached"),
    ],
)
@pytest.mark.usefixtures("gguf_repo")
def test_cached_model_is_used_with_a_note_if_the_hub_fails(
    hub: fake_hub.Hub,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any] | None,
    reason: str,
) -> None:
    """In two seconds if it does not answer at all (B58)."""
    first = fetch(records)
    hub.clear()
    if fault != {"hang": True}:
        monkeypatch.setattr(hub_models, "FRESHNESS_S", 20.0)
    if fault is None:
        hub.stop()
    else:
        hub.fail(path="/api/models", **fault)
    started = time.monotonic()
    again = fetch(records)
    assert time.monotonic() - started < hub_models.FRESHNESS_S + 1
    assert again.weights == first.weights
    assert again.hub is not None
    assert again.hub.note is not None
    assert reason in again.hub.note
    if fault is not None:
        assert len(hub.requests) == 1


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    # what became of a repo after it was fetched, and the error without a cached model
    "deleted or private": ({"private": True}, "model_not_found"),
    "gated, with other files": ({"gated": True}, "hub_gated"),
    "without the branch": ({"branches": {}}, "model_not_found"),
    "without the variant": ({}, "model_not_found"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_cached_model_is_used_with_a_note_whatever_became_of_its_repo(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    """It is on this machine, and what the Hub says of it today takes nothing away (B76)."""
    monkeypatch.setattr(hub_models, "FRESHNESS_S", 20.0)  # however long the fetcher takes to start
    revision = "main" if "branch" in case else None
    asked: dict[str, Any] = {"gguf_variant": "Q8_0", "revision": revision}
    first = fetch(records, **asked)
    change, category = CHANGES[case]
    if "files" in case or "variant" in case:
        files = {**gguf_files, FILE: gguf_files["Qwen3-0.6B-Q4_K_M.gguf"]}
        gguf_repo.push({n: f for n, f in files.items() if "files" in case or "-Q" not in n})
    for name, value in change.items():
        setattr(gguf_repo, name, value)
    token = CancelToken(Generation(1))
    for found in (requested(records, **asked).resolve(token), fetch(records, **asked)):
        assert found.weights == first.weights
        assert found.hub is not None
        assert found.hub.note is not None
    with pytest.raises(OrchestratorError) as caught:
        fetch(records, gguf_variant="Q4_K_M", revision=revision)
    assert caught.value.problem.category == category


def test_new_commit_is_fetched_without_the_files_that_are_the_same(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    old = fetch(records, gguf_variant="Q8_0")
    other = gguf_files["Qwen3-0.6B-Q4_K_M.gguf"]
    commit = gguf_repo.push({**gguf_files, FILE: other})
    hub.clear()
    new = fetch(records, gguf_variant="Q8_0")
    assert new.hub is not None
    assert new.hub.commit == commit
    assert Path(new.weights[0].path).read_bytes() == content({FILE: other}, FILE)
    assert not hub.sent("mmproj")
    assert new.projector is not None
    assert blob_of(new).parent == Path(os.path.realpath(new.projector.path)).parent
    assert (root_of() / "refs" / "main").read_text() == commit
    hub.stop()
    assert old.hub is not None
    assert fetch(records, gguf_variant="Q8_0", revision=old.hub.commit).weights == old.weights


def test_old_commit_is_used_if_the_new_one_cannot_be_fetched(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    old = fetch(records, gguf_variant="Q8_0")
    gguf_repo.push({**gguf_files, FILE: gguf_files["Qwen3-0.6B-Q4_K_M.gguf"]})
    hub.fail(path="/resolve/", status=404)
    found = fetch(records, gguf_variant="Q8_0")
    assert found.weights == old.weights
    assert found.hub is not None
    assert found.hub.note is not None
    assert old.hub is not None
    assert (root_of() / "refs" / "main").read_text() == old.hub.commit


@pytest.mark.usefixtures("gguf_repo")
def test_offline_error_lists_what_is_in_the_cache(
    records: Path, monkeypatch: pytest.MonkeyPatch, hub: fake_hub.Hub
) -> None:
    fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf")
    hub.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases: dict[str, dict[str, Any]] = {
        "hub.offline": {"gguf_variant": "Q4_K_M"},
        "hub.offline_nothing": {"model_path": "owner/nothing"},
    }
    for key, fields in cases.items():
        with pytest.raises(HubUnreachable) as caught:
            fetch(records, **fields)
        assert (caught.value.field, caught.value.reason) == ("model_path", "offline")
        assert_sentence(key, caught.value.message)
    assert not hub.requests


def test_preferred_variant_of_a_partly_cached_commit_is_requested(
    hub: fake_hub.Hub, gguf_repo: fake_hub.Repo, records: Path
) -> None:
    """A folder with one variant does not show which one is preferred (B56)."""
    fetch_with_client(hub, gguf_repo.commit)
    assert fetch(records, revision=gguf_repo.commit).variant == "UD-Q4_K_XL"


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.usefixtures("big")
def test_cancelled_download_is_continued_by_the_next(
    hub: fake_hub.Hub, big_file: Path, download: Callable[..., Download]
) -> None:
    stall = hub.fail(stall_after=3 << 20, times=1)
    one = download(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 3 << 20, "3 MiB")
    assert hub.wait_for(lambda: stall.held)
    one.cancel()
    assert not scan_cache_dir(cache.directory()).warnings
    (partial,) = (root_of(BIG) / "blobs").iterdir()
    assert partial.name.endswith(PARTIAL)
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    hub.clear()
    two = download(model_path=BIG)
    assert_whole(two.files(), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == [f"bytes={3 << 20}-"]
    assert min(filter(None, two.bytes_seen)) >= 3 << 20, "what is there counts at once"
    assert two.progress.bytes_done == two.progress.bytes_total == big_file.stat().st_size
    assert two.bytes_seen == sorted(two.bytes_seen)


@pytest.mark.usefixtures("big")
def test_killed_fetcher_is_an_error_and_the_next_download_continues(
    hub: fake_hub.Hub, big_file: Path, download: Callable[..., Download]
) -> None:
    hub.fail(stall_after=1 << 20, times=1)
    one = download(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 1 << 20, "1 MiB")
    (fetcher,) = fetchers()
    fetcher.kill()
    error = one.error()
    assert error.problem.category == "hub_error"
    assert_sentence("hub.fetcher_exited", error.message)
    hub.clear()
    assert_whole(download(model_path=BIG).files(), big_file)
    assert hub.seen(server="cdn")[0].range == f"bytes={1 << 20}-"


@pytest.mark.parametrize("fault", [{"reset_after": 100_000}, {"cut_after": 100_000}])
@pytest.mark.usefixtures("big")
def test_download_continues_after_a_broken_connection(
    hub: fake_hub.Hub, records: Path, big_file: Path, fault: dict[str, Any]
) -> None:
    hub.fail(times=1, **fault)
    assert_whole(fetch(records, model_path=BIG), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == [None, "bytes=100000-"]


@pytest.mark.parametrize(
    ("fault", "requested_again"),
    [
        ({"ignore_range": True}, []),
        ({"shift_range": 5}, [None]),
        ({"status": 416, "path": "/cdn/"}, [None]),
    ],
    ids=["ignored", "shifted", "refused"],
)
@pytest.mark.usefixtures("big")
def test_download_restarts_if_the_range_is_not_honoured(
    hub: fake_hub.Hub,
    records: Path,
    big_file: Path,
    fault: dict[str, Any],
    requested_again: list[None],
) -> None:
    """Bytes must never be appended where they do not belong (B57)."""
    add_partial(big_file, big_file.read_bytes()[: 1 << 20])
    hub.fail(times=1, **fault)
    assert_whole(fetch(records, model_path=BIG), big_file)
    ranges = [request.range for request in hub.seen(server="cdn")]
    assert ranges == [f"bytes={1 << 20}-", *requested_again]


@pytest.mark.usefixtures("big")
def test_partial_file_with_wrong_bytes_is_discarded(
    hub: fake_hub.Hub, records: Path, big_file: Path
) -> None:
    add_partial(big_file, b"\0" * 1000)
    assert_whole(fetch(records, model_path=BIG), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == ["bytes=1000-", None]


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_partial_file_may_be_complete_or_too_long(
    records: Path, big_file: Path, extra: bytes, hub: fake_hub.Hub
) -> None:
    add_partial(big_file, big_file.read_bytes() + extra)
    assert_whole(fetch(records, model_path=BIG), big_file)
    assert len(hub.seen(server="cdn")) == bool(extra)


@pytest.mark.usefixtures("big")
def test_old_partial_files_of_ours_are_removed_and_no_others(records: Path) -> None:
    blobs = root_of(BIG) / "blobs"
    blobs.mkdir(parents=True)
    old, young = blobs / ("0" * 64 + PARTIAL), blobs / ("1" * 64 + PARTIAL)
    busy, theirs = blobs / ("2" * 64 + PARTIAL), blobs / ("3" * 64 + ".abcdef01.incomplete")
    for path in (old, young, busy, theirs):
        path.write_bytes(b"x")
        if path is not young:
            os.utime(path, (0, 0))
    with busy.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetch(records, model_path=BIG)
    assert [path.exists() for path in (old, young, busy, theirs)] == [False, True, True, True]


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.usefixtures("big")
def test_damaged_body_is_fetched_once_more(
    hub: fake_hub.Hub, download: Callable[..., Download], big_file: Path
) -> None:
    hub.fail(flip_at=5_000_000, times=1)
    hub.fail(path="/cdn/", bytes_per_s=32 << 20)
    one = download(model_path=BIG)
    assert_whole(one.files(), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == [None, None]
    assert one.bytes_seen == sorted(one.bytes_seen)


@pytest.mark.usefixtures("big")
def test_body_that_is_damaged_twice_is_refused(hub: fake_hub.Hub, records: Path) -> None:
    fault = hub.fail(flip_at=5_000_000)
    with pytest.raises(HubCorrupt) as caught:
        fetch(records, model_path=BIG)
    assert_sentence("hub.corrupt", caught.value.message)
    assert fault.hits == 2
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    assert not look_up(records, model_path=BIG).is_on_disk


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("header", ["X-Linked-ETag", "Content-Length"])
def test_file_that_is_not_the_listed_one_is_refused_before_its_body(
    hub: fake_hub.Hub, records: Path, header: str
) -> None:
    if header == "Content-Length":
        hub.fail(path="/cdn/", headers={"Content-Length": "1000"}, cut_after=0)
    else:
        hub.fail(path="/resolve/", headers={header: '"' + "0" * 64 + '"'})
    with pytest.raises(HubCorrupt) as caught:
        fetch(records, model_path=BIG)
    assert_sentence("hub.changed", caught.value.message)
    assert len(hub.seen(server="cdn")) == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_file_from_another_tool_is_hashed_once(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    records: Path,
    launches: list[tuple[str, ...]],
    *,
    pinned: bool,
) -> None:
    fields: dict[str, Any] = {"gguf_variant": "Q8_0", "mmproj_path": "/own.gguf"}
    fields |= {"revision": gguf_repo.commit} if pinned else {}
    path = fetch_with_client(hub, fields.get("revision"))
    hub.clear()
    assert fetch(records, **fields).weights[0].path == str(path)
    assert not hub.sent()
    assert len(list(records.glob("*.hashed"))) == 1
    launches.clear()
    fetch(records, **fields)
    assert len(launches) == (0 if pinned else 1)
    assert len(list(records.glob("*.hashed"))) == 1


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_file_from_another_tool_is_replaced(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    damage: str,
    *,
    pinned: bool,
) -> None:
    """huggingface_hub hashes nothing, and would use it."""
    revision = gguf_repo.commit if pinned else None
    blob = Path(os.path.realpath(fetch_with_client(hub, revision)))
    if damage == "flipped":
        flip_byte(blob)
    else:
        os.truncate(blob, 300_000)
    hub.clear()
    files = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf", revision=revision)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert hub.sent(FILE) == len(content(gguf_files, FILE))
    assert not list(blob.parent.glob("*.orchestrator.*")), "it is removed once it is replaced"


@pytest.mark.usefixtures("gguf_repo")
def test_damaged_file_is_set_aside_while_offline(
    hub: fake_hub.Hub, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it was hashed: with another time or size it is hashed again."""
    files = fetch(records, gguf_variant="Q8_0")
    flip_byte(blob_of(files))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubCorrupt) as caught:
        fetch(records, gguf_variant="Q8_0")
    assert_sentence("hub.corrupt_offline", caught.value.message)
    assert not look_up(records, gguf_variant="Q8_0").is_on_disk
    assert [p.suffix for p in (root_of() / "blobs").glob("*.orchestrator.*")] == [".corrupt"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.clear()
    assert fetch(records, gguf_variant="Q8_0").is_on_disk
    assert hub.sent("mmproj") == 0


def test_broken_link_is_replaced(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    link = fetch_with_client(hub)
    link.unlink()
    link.symlink_to("../../blobs/gone")
    assert not look_up(records, gguf_variant="Q8_0").is_on_disk
    files = fetch(records, gguf_variant="Q8_0")
    assert Path(files.weights[0].path) == link
    assert link.read_bytes() == content(gguf_files, FILE)
    assert gguf_repo.commit in str(link)


@pytest.mark.parametrize("damaged", [False, True])
def test_blob_in_a_shared_store_is_used_and_never_moved(
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    hub: fake_hub.Hub,
    *,
    damaged: bool,
) -> None:
    """With Xet, `blobs/<etag>` is a link to a store whose names are other hashes."""
    link = fetch_with_client(hub, gguf_repo.commit)
    blob = link.parent / os.readlink(link)
    shared = cache.directory() / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    if damaged:
        flip_byte(shared)
    hub.clear()
    pinned = gguf_repo.commit
    files = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf", revision=pinned)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert shared.exists()
    assert blob.is_symlink() is not damaged
    assert bool(hub.sent()) is bool(hub.requests) is damaged


def test_cache_without_links_is_used(
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    hub: fake_hub.Hub,
) -> None:
    """As huggingface_hub makes it where the file system has none."""
    link = fetch_with_client(hub)
    link.resolve().replace(link)
    hub.clear()
    files = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf")
    assert Path(files.weights[0].path) == link
    assert not hub.sent()
    flip_byte(link)
    again = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf")
    assert Path(again.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert gguf_repo.commit in again.weights[0].path


# -------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a volume of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder))
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount the small volume that this needs")
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    yield folder
    subprocess.run(("umount", "-l", str(folder)), check=True)


@pytest.mark.usefixtures("big")
def test_cache_on_a_read_only_volume_is_used(records: Path, small_volume: Path) -> None:
    """The commit of a branch cannot be recorded there, which must not fail the load."""
    first = fetch(records, model_path=BIG)
    (root_of(BIG) / "refs" / "main").write_text("0" * 40)
    subprocess.run(("mount", "-o", "remount,ro", str(small_volume)), check=True)
    assert fetch(records, model_path=BIG).weights == first.weights


@pytest.mark.usefixtures("big")
def test_model_that_does_not_fit_is_refused_before_the_first_byte(
    hub: fake_hub.Hub, records: Path, big_file: Path, small_volume: Path
) -> None:
    """No smaller variant replaces it (B56); bytes that are there need not fit again."""
    size, free = big_file.stat().st_size, 4 << 20
    (small_volume / "filler").write_bytes(bytes((12 << 20) - free))
    with pytest.raises(DiskFull) as caught:
        fetch(records, model_path=BIG)
    assert f"{size} bytes" in caught.value.message
    assert f"{free // 4096 * 4096 - 4096 * 5}"[:2] in caught.value.message
    assert not hub.seen("/resolve/")
    (small_volume / "filler").unlink()
    partial = next(iter(hub._repos[BIG.lower()].commits.values()))[BIG_FILE].sha256 + PARTIAL
    (root_of(BIG) / "blobs").mkdir(parents=True)
    (root_of(BIG) / "blobs" / partial).write_bytes(big_file.read_bytes()[: 6 << 20])
    (small_volume / "filler").write_bytes(bytes(3 << 20))
    assert_whole(fetch(records, model_path=BIG), big_file)


@pytest.mark.usefixtures("big")
def test_download_continues_after_the_disk_was_full(
    hub: fake_hub.Hub, big_file: Path, small_volume: Path, download: Callable[..., Download]
) -> None:
    hold = hub.fail(stall_after=1 << 20, times=1)
    one = download(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 1 << 20, "1 MiB")
    (small_volume / "filler").write_bytes(bytes(8 << 20))
    hold.release()
    error = one.error()
    assert isinstance(error, DiskFull)
    assert "needs" in error.message
    assert "free" in error.message
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    (small_volume / "filler").unlink()
    hub.clear()
    assert_whole(download(model_path=BIG).files(), big_file)
    (request,) = hub.seen(server="cdn")
    assert request.range is not None
    assert int(request.range[6:-1]) >= 1 << 20


# ------------------------------------------------------------------------------ too large for HTTP


@pytest.mark.usefixtures("big")
def test_file_too_large_for_http_is_fetched_by_the_library_and_hashed(
    hub: fake_hub.Hub,
    big_file: Path,
    tmp_path: Path,
    download: Callable[..., Download],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over 50 GB the Hub serves by Xet only; here the limit is lower and Xet is off."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys\n"
        "from huggingface_hub import constants\n"
        "constants.MAX_HTTP_DOWNLOAD_SIZE = 1 << 20\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1 << 18\n"
        "import huggingface_hub.file_download\n"
        "get = huggingface_hub.file_download.http_get\n"
        "def unlimited(*args, **more):\n"
        "    constants.MAX_HTTP_DOWNLOAD_SIZE = 1 << 50\n"
        "    return get(*args, **more)\n"
        "huggingface_hub.file_download.http_get = unlimited\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(launch, "interpreter", lambda: str(program))
    hub.fail(path="/cdn/", bytes_per_s=8 << 20, times=1)
    one = download(model_path=BIG, stall_timeout_s=5)
    assert_whole(one.files(), big_file)
    assert hub.seen(method="HEAD"), "the library's own way"
    assert any(0 < seen < big_file.stat().st_size for seen in one.bytes_seen), "no progress"
    assert [request.range for request in hub.seen(server="cdn")] == [None]
