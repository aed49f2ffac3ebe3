"""Hub models on disk: the real client in a real child process, against a hub that speaks its
protocol and fails on demand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir
from structlog.testing import capture_logs

from orchestrator.base import launch
from orchestrator.base.tokens import CancelReason, CancelToken, Generation
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import (
    Cancelled,
    DiskFull,
    HubCorrupt,
    HubError,
    HubUnreachable,
    InvalidModel,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
    Stalled,
)
from orchestrator.models.hub import cache, download, fetch_process
from orchestrator.models.hub.download import Hub
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit import fake_hub
from tests.kit.models import MODEL

FILE = "Qwen3-0.6B-Q8_0.gguf"
BIG = "owner/Big-GGUF"
BIG_FILE = "Big-Q8_0.gguf"
PARTIAL = ".orchestrator.incomplete"
DEADLINE_S = 20.0

pytestmark = pytest.mark.usefixtures("hub")


class Fetching:
    """One fetch in a thread of its own: cancelled, waited for, and ended with its test."""

    def __init__(self, records: Path, **fields: Any) -> None:
        self.request = LoadRequest.from_dict({"model_path": MODEL, **fields})
        self.token = CancelToken(Generation(1))
        self.progress = FetchProgress(on_change=self._on_change)
        self.bytes_seen: list[int] = []
        self._changed = threading.Condition()
        self._records = records
        self._outcome: ModelFiles | OrchestratorError | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Fetching:
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self._outcome = Hub(self._records).fetch(self.request, self.token, self.progress)
        except OrchestratorError as error:
            self._outcome = error

    def _on_change(self) -> None:
        with self._changed:
            self.bytes_seen.append(self.progress.bytes_done)
            self._changed.notify_all()

    def wait_until(self, ask: Callable[[FetchProgress], object], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: ask(self.progress), DEADLINE_S), (
                f"not within {DEADLINE_S:g} s: {what}; it has {self.progress}, {self._outcome}"
            )

    def outcome(self) -> ModelFiles | OrchestratorError:
        self._thread.join(DEADLINE_S)
        assert self._outcome is not None, f"it goes on: {self.progress}"
        return self._outcome

    def files(self) -> ModelFiles:
        outcome = self.outcome()
        if isinstance(outcome, OrchestratorError):
            raise outcome
        return outcome

    def error(self) -> OrchestratorError:
        outcome = self.outcome()
        assert isinstance(outcome, OrchestratorError), outcome
        return outcome

    def cancel(self) -> float:
        """Cancel, and return how long it took to settle, in seconds."""
        started = time.monotonic()
        self.token.set(CancelReason.USER)
        assert isinstance(self.outcome(), Cancelled)
        return time.monotonic() - started


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def fetching(records: Path) -> Iterator[Callable[..., Fetching]]:
    """Start fetches; none of them, and none of their children, outlives the test."""
    started: list[Fetching] = []

    def start(**fields: Any) -> Fetching:
        started.append(Fetching(records, **fields))
        return started[-1].start()

    yield start
    for one in started:
        one.token.set(CancelReason.USER)
        one.outcome()
    assert not children()


@pytest.fixture(scope="session")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 MiB: one that is still under way when somebody looks."""
    path = tmp_path_factory.mktemp("big") / BIG_FILE
    return write_tiny_model(path, padding_bytes=8 << 20)


@pytest.fixture
def big(hub: fake_hub.Hub, big_file: Path) -> fake_hub.Repo:
    return hub.add(fake_hub.Repo(BIG, {BIG_FILE: big_file}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Every child that was started, by its command."""
    commands: list[tuple[str, ...]] = []
    popen = launch.popen

    def counted(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return popen(command, **settings)

    monkeypatch.setattr(launch, "popen", counted)
    return commands


def fetch(records: Path, progress: FetchProgress | None = None, **fields: object) -> ModelFiles:
    request = LoadRequest.from_dict({"model_path": MODEL, **fields})
    token = CancelToken(Generation(1))
    return Hub(records).fetch(request, token, progress or FetchProgress())


def other_tool(hub: fake_hub.Hub, revision: str | None = None) -> Path:
    """Have huggingface_hub itself fetch the file, and return where it is."""
    return Path(hf_hub_download(MODEL, FILE, revision=revision, endpoint=hub.endpoint))


def look_up(records: Path, **fields: object) -> ModelFiles:
    return Hub(records).look_up(LoadRequest.from_dict({"model_path": MODEL, **fields}))


def children() -> list[psutil.Process]:
    """The fetchers of this process that are alive."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and "fetcher.py" in str(child.cmdline()):
                found.append(child)
    return found


def content(files: dict[str, fake_hub.Content], name: str) -> bytes:
    return b"".join(fake_hub.Blob.of(files[name]).chunks())


def root_of(model: str = MODEL) -> Path:
    return cache.directory() / f"models--{model.replace('/', '--')}"


def blob_of(files: ModelFiles) -> Path:
    return Path(os.path.realpath(files.weights[0].path))


def assert_whole(files: ModelFiles, source: Path) -> None:
    assert Path(files.weights[0].path).read_bytes() == source.read_bytes()
    blobs = blob_of(files).parent
    assert not list(blobs.glob("*.orchestrator.*")), "something of ours was left behind"
    assert not scan_cache_dir(cache.directory()).warnings


def flip(path: Path, at: int = 300_000) -> None:
    """Change one byte, and neither the size nor the header."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0xFF]), at)


# ---------------------------------------------------------------------------- what a fetch leaves


def test_a_model_is_fetched_whole_and_seen_by_every_other_tool(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    """The cache is shared: what we finish, the client finds, without asking anybody."""
    progress = FetchProgress()
    files = fetch(records, progress, gguf_variant="Q8_0")
    assert files.variant == "Q8_0"
    assert files.hub is not None
    assert files.hub.commit == gguf_repo.commit
    fetched = Path(files.weights[0].path)
    assert fetched.read_bytes() == content(gguf_files, FILE)
    hub.stop()
    assert hf_hub_download(MODEL, FILE, local_files_only=True) == files.weights[0].path
    seen = scan_cache_dir(cache.directory())
    assert not seen.warnings
    assert progress.bytes_done == progress.bytes_total == files.size_bytes
    assert not [p for p in os.listdir(fetched.parents[2] / "blobs") if "orchestrator" in p]
    assert (fetched.parents[2] / "refs" / "main").read_text() == gguf_repo.commit


@pytest.mark.usefixtures("gguf_repo")
def test_a_projector_is_found_unless_one_is_given(records: Path, tmp_path: Path) -> None:
    found = fetch(records, gguf_variant="Q8_0")
    assert found.projector is not None
    assert found.projector.path.endswith("mmproj-F16.gguf")
    given = fetch(records, gguf_variant="Q8_0", mmproj_path=str(tmp_path / "own.gguf"))
    assert given.projector is None


def test_all_parts_of_a_split_model_are_of_one_commit(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    fetching: Callable[..., Fetching],
) -> None:
    """A push between two parts changes nothing of the load that has begun."""
    old = gguf_repo.commit
    held = hub.fail(path="00001-of", hang=True, times=1)
    one = fetching(gguf_variant="BF16")
    hub.wait_for(lambda: held.held)
    first, second = sorted(name for name in gguf_files if "-of-" in name)
    gguf_repo.push({**gguf_files, first: gguf_files[second], second: gguf_files[first]})
    held.release()
    files = one.files()
    assert files.hub is not None
    assert files.hub.commit == old
    assert len(files.weights) == 2
    assert {Path(file.path).parent.parent.name for file in files.weights} == {old}


def test_upper_and_lower_case_are_one_repo_with_one_folder(
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


def test_a_renamed_repo_is_cached_as_it_was_asked_for(
    hub: fake_hub.Hub, gguf_files: dict[str, fake_hub.Content], records: Path
) -> None:
    """As huggingface_hub does; else offline nobody would find it under the old name."""
    hub.add(fake_hub.Repo("new/name-GGUF", {FILE: gguf_files[FILE]}, aliases=["old/name-GGUF"]))
    files = fetch(records, model_path="old/name-GGUF")
    assert files.hub is not None
    assert files.hub.repo == "old/name-GGUF"
    assert look_up(records, model_path="old/name-GGUF").weights == files.weights


def test_names_with_anything_that_a_name_may_hold(
    hub: fake_hub.Hub, gguf_files: dict[str, fake_hub.Content], records: Path
) -> None:
    name = "a/b c/d+e/Mödel #1 100%25 ?x=y&z 模型-Q8_0.gguf"
    hub.add(fake_hub.Repo("owner/odd", {name: gguf_files[FILE]}))
    files = fetch(records, model_path="owner/odd")
    assert files.weights[0].path.endswith(name)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)


def test_small_models_outside_of_lfs_are_checked_by_gits_hash(
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
def test_what_is_whole_and_no_model_is_told_as_that(
    hub: fake_hub.Hub, records: Path, data: bytes
) -> None:
    hub.add(fake_hub.Repo("owner/empty", {"x-Q8_0.gguf": data}))
    with pytest.raises(InvalidModel):
        fetch(records, model_path="owner/empty")


def test_a_token_set_before_starts_nothing(
    records: Path, launches: list[tuple[str, ...]], hub: fake_hub.Hub
) -> None:
    token = CancelToken(Generation(1))
    token.set(CancelReason.USER)
    with pytest.raises(Cancelled):
        Hub(records).fetch(LoadRequest(model_path=MODEL), token, FetchProgress())
    assert not launches
    assert not hub.requests


# ------------------------------------------------------------------------------------ cached first


def test_what_is_cached_needs_no_network_when_offline_or_pinned(
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


def test_a_branch_is_asked_for_once_and_nothing_is_fetched_again(
    hub: fake_hub.Hub, gguf_repo: fake_hub.Repo, records: Path
) -> None:
    first = fetch(records)
    hub.clear()
    assert fetch(records) == first
    assert [request.path for request in hub.requests] == [f"/api/models/{gguf_repo.name}"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"status": 500}, "500"),
        ({"status": 429, "retry_after_s": 1}, "too often"),
        ({"hang": True}, "2 s"),
        ({"html": True}, "web page"),
        ({"truncate_json": True}, "no sense"),
        (None, "cannot be reached"),
    ],
)
@pytest.mark.usefixtures("gguf_repo")
def test_a_hub_that_cannot_be_asked_is_done_without(
    hub: fake_hub.Hub, records: Path, fault: dict[str, Any] | None, told: str
) -> None:
    """B58: with the model on disk, the network is no reason not to load it; but it is told."""
    first = fetch(records)
    hub.clear()
    if fault is None:
        hub.stop()
    else:
        hub.fail(path="/api/models", **fault)
    started = time.monotonic()
    again = fetch(records)
    assert time.monotonic() - started < download.FRESHNESS_S + 1
    assert again.weights == first.weights
    assert again.hub is not None
    assert again.hub.note is not None
    assert told in again.hub.note
    if fault is not None:
        assert len(hub.requests) == 1


@pytest.mark.usefixtures("gguf_repo")
def test_a_refusal_is_no_reason_to_use_what_is_cached(hub: fake_hub.Hub, records: Path) -> None:
    fetch(records)
    hub.fail(path="/api/models", status=403)
    with pytest.raises(HubError) as caught:
        fetch(records)
    assert caught.value.problem.category == "hub_unauthorized"


def test_a_moved_branch_is_noticed_and_what_is_the_same_is_not_fetched_again(
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


def test_the_new_commit_that_breaks_off_leaves_the_old_one_in_use(
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
def test_offline_what_is_not_whole_is_refused_and_what_is_there_is_named(
    records: Path, monkeypatch: pytest.MonkeyPatch, hub: fake_hub.Hub
) -> None:
    fetch(records, gguf_variant="Q8_0")
    hub.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable) as caught:
        fetch(records, gguf_variant="Q4_K_M")
    assert caught.value.reason == "offline"
    assert FILE in caught.value.message
    with pytest.raises(HubUnreachable):
        fetch(records, model_path="owner/nothing")
    assert not hub.requests


def test_a_commit_of_which_only_a_part_is_known_is_asked_for(
    hub: fake_hub.Hub, gguf_repo: fake_hub.Repo, records: Path
) -> None:
    """Which variant is preferred, a folder with one of them cannot tell: B56."""
    other_tool(hub, gguf_repo.commit)
    assert fetch(records, revision=gguf_repo.commit).variant == "UD-Q4_K_XL"


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.usefixtures("big")
def test_a_cancelled_fetch_is_continued_by_the_next(
    hub: fake_hub.Hub, big_file: Path, fetching: Callable[..., Fetching]
) -> None:
    stall = hub.fail(stall_after=3 << 20, times=1)
    one = fetching(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 3 << 20, "3 MiB")
    assert hub.wait_for(lambda: stall.held)
    one.cancel()
    assert not scan_cache_dir(cache.directory()).warnings
    (partial,) = (root_of(BIG) / "blobs").iterdir()
    assert partial.name.endswith(PARTIAL)
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    hub.clear()
    two = fetching(model_path=BIG)
    assert_whole(two.files(), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == [f"bytes={3 << 20}-"]
    assert min(filter(None, two.bytes_seen)) >= 3 << 20, "what is there counts at once"
    assert two.progress.bytes_done == two.progress.bytes_total == big_file.stat().st_size
    assert two.bytes_seen == sorted(two.bytes_seen)


@pytest.mark.usefixtures("big")
def test_a_fetcher_that_is_killed_is_told_and_continued(
    hub: fake_hub.Hub, big_file: Path, fetching: Callable[..., Fetching]
) -> None:
    hub.fail(stall_after=1 << 20, times=1)
    one = fetching(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 1 << 20, "1 MiB")
    (child,) = children()
    child.kill()
    error = one.error()
    assert error.problem.category == "hub_error"
    assert "-9" in error.message
    hub.clear()
    assert_whole(fetching(model_path=BIG).files(), big_file)
    assert hub.seen(server="cdn")[0].range == f"bytes={1 << 20}-"


@pytest.mark.parametrize(
    ("fault", "range_"),
    [({"reset_after": 100_000}, 100_000), ({"cut_after": 100_000}, 100_000)],
)
@pytest.mark.usefixtures("big")
def test_a_connection_that_breaks_loses_nothing(
    hub: fake_hub.Hub, records: Path, big_file: Path, fault: dict[str, Any], range_: int
) -> None:
    hub.fail(times=1, **fault)
    assert_whole(fetch(records, model_path=BIG), big_file)
    asked = [request.range for request in hub.seen(server="cdn")]
    assert asked == [None, f"bytes={range_}-"]


@pytest.mark.parametrize(
    ("fault", "asked_again"),
    [
        ({"ignore_range": True}, []),
        ({"shift_range": 5}, [None]),
        ({"status": 416, "path": "/cdn/"}, [None]),
    ],
    ids=["ignored", "shifted", "refused"],
)
@pytest.mark.usefixtures("big")
def test_a_range_that_is_not_honoured_starts_from_nothing(
    hub: fake_hub.Hub, records: Path, big_file: Path, fault: dict[str, Any], asked_again: list[None]
) -> None:
    """B57: bytes are never appended where they do not belong."""
    plant_partial(big_file, big_file.read_bytes()[: 1 << 20])
    hub.fail(times=1, **fault)
    assert_whole(fetch(records, model_path=BIG), big_file)
    ranges = [request.range for request in hub.seen(server="cdn")]
    assert ranges == [f"bytes={1 << 20}-", *asked_again]


@pytest.mark.usefixtures("big")
def test_a_partial_file_that_is_not_its_beginning_is_thrown_away(
    hub: fake_hub.Hub, records: Path, big_file: Path
) -> None:
    plant_partial(big_file, b"\0" * 1000)
    assert_whole(fetch(records, model_path=BIG), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == ["bytes=1000-", None]


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_partial_file_that_has_all_or_too_much_is_no_trap(
    records: Path, big_file: Path, extra: bytes, hub: fake_hub.Hub
) -> None:
    plant_partial(big_file, big_file.read_bytes() + extra)
    assert_whole(fetch(records, model_path=BIG), big_file)
    assert len(hub.seen(server="cdn")) == bool(extra)


def plant_partial(source: Path, data: bytes) -> Path:
    path = root_of(BIG) / "blobs" / (hashlib.sha256(source.read_bytes()).hexdigest() + PARTIAL)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("big")
def test_old_leftovers_of_ours_are_swept_and_nothing_else(records: Path, big_file: Path) -> None:
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
def test_a_body_that_arrives_mangled_is_fetched_once_more(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching], big_file: Path
) -> None:
    hub.fail(flip_at=5_000_000, times=1)
    hub.fail(path="/cdn/", bytes_per_s=32 << 20)
    one = fetching(model_path=BIG)
    assert_whole(one.files(), big_file)
    assert [request.range for request in hub.seen(server="cdn")] == [None, None]
    assert one.bytes_seen == sorted(one.bytes_seen)


@pytest.mark.usefixtures("big")
def test_a_body_that_is_always_mangled_is_given_up_and_never_seen(
    hub: fake_hub.Hub, records: Path
) -> None:
    fault = hub.fail(flip_at=5_000_000)
    with pytest.raises(HubCorrupt):
        fetch(records, model_path=BIG)
    assert fault.hits == 2
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    assert not look_up(records, model_path=BIG).is_on_disk


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("header", ["X-Linked-ETag", "Content-Length"])
def test_another_file_than_was_listed_is_told_before_it_is_fetched(
    hub: fake_hub.Hub, records: Path, header: str
) -> None:
    if header == "Content-Length":
        hub.fail(path="/cdn/", headers={"Content-Length": "1000"}, cut_after=0)
    else:
        hub.fail(path="/resolve/", headers={header: '"' + "0" * 64 + '"'})
    with pytest.raises(HubCorrupt):
        fetch(records, model_path=BIG)
    assert len(hub.seen(server="cdn")) == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_what_another_tool_has_fetched_is_hashed_once(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    records: Path,
    launches: list[tuple[str, ...]],
    *,
    pinned: bool,
) -> None:
    fields: dict[str, Any] = {"gguf_variant": "Q8_0", "mmproj_path": "/own.gguf"}
    fields |= {"revision": gguf_repo.commit} if pinned else {}
    path = other_tool(hub, fields.get("revision"))
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
def test_what_another_tool_has_damaged_is_set_aside_and_fetched_once_more(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    damage: str,
    *,
    pinned: bool,
) -> None:
    """huggingface_hub hashes nothing: it would call either of them a hit."""
    revision = gguf_repo.commit if pinned else None
    blob = Path(os.path.realpath(other_tool(hub, revision)))
    if damage == "flipped":
        flip(blob)
    else:
        os.truncate(blob, 300_000)
    hub.clear()
    files = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf", revision=revision)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert hub.sent(FILE) == len(content(gguf_files, FILE))
    assert not list(blob.parent.glob("*.orchestrator.*")), (
        "the damaged one goes when it is replaced"
    )


@pytest.mark.usefixtures("gguf_repo")
def test_damage_is_set_aside_where_the_hub_cannot_replace_it(
    hub: fake_hub.Hub, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, after it was hashed: another time or size, and it is hashed again."""
    files = fetch(records, gguf_variant="Q8_0")
    flip(blob_of(files))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubCorrupt):
        fetch(records, gguf_variant="Q8_0")
    assert not look_up(records, gguf_variant="Q8_0").is_on_disk
    assert [p.suffix for p in (root_of() / "blobs").glob("*.orchestrator.*")] == [".corrupt"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.clear()
    assert fetch(records, gguf_variant="Q8_0").is_on_disk
    assert hub.sent("mmproj") == 0


def test_a_link_that_points_to_nothing_is_replaced(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
) -> None:
    link = other_tool(hub)
    link.unlink()
    link.symlink_to("../../blobs/gone")
    assert not look_up(records, gguf_variant="Q8_0").is_on_disk
    files = fetch(records, gguf_variant="Q8_0")
    assert Path(files.weights[0].path) == link
    assert link.read_bytes() == content(gguf_files, FILE)
    assert gguf_repo.commit in str(link)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_blob_in_a_shared_store_is_told_by_its_link_and_never_moved(
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    hub: fake_hub.Hub,
    *,
    damaged: bool,
) -> None:
    """With Xet, `blobs/<etag>` is a link into a store whose names are other hashes."""
    link = other_tool(hub, gguf_repo.commit)
    blob = link.parent / os.readlink(link)
    shared = cache.directory() / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    if damaged:
        flip(shared)
    hub.clear()
    fields: dict[str, Any] = {
        "gguf_variant": "Q8_0",
        "mmproj_path": "/own.gguf",
        "revision": gguf_repo.commit,
    }
    files = fetch(records, **fields)
    assert Path(files.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert shared.exists()
    assert blob.is_symlink() is not damaged
    assert bool(hub.sent()) is bool(hub.requests) is damaged


def test_a_cache_without_links_is_one_too(
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    hub: fake_hub.Hub,
) -> None:
    link = other_tool(hub)
    link.resolve().replace(link)
    hub.clear()
    files = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf")
    assert Path(files.weights[0].path) == link
    assert not hub.sent()
    flip(link)
    again = fetch(records, gguf_variant="Q8_0", mmproj_path="/own.gguf")
    assert Path(again.weights[0].path).read_bytes() == content(gguf_files, FILE)
    assert gguf_repo.commit in again.weights[0].path


# ------------------------------------------------------------------------------------------ errors

FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str | None, str]] = {
    # the fault, the request, and what is told: category, field, text
    "missing": (
        {},
        {"model_path": "owner/none"},
        "model_not_found",
        "model_path",
        "does not exist",
    ),
    "private": ({}, {"model_path": "owner/private"}, "model_not_found", "model_path", "hf_token"),
    "gated": ({}, {"model_path": "owner/gated"}, "hub_gated", "hf_token", "accept its terms"),
    "gated to you": (
        {},
        {"model_path": "owner/gated", "hf_token": "hf_stranger"},
        "hub_gated",
        "hf_token",
        "accept its terms",
    ),
    "bad token": ({}, {"hf_token": "hf_nobody"}, "hub_unauthorized", "hf_token", "check hf_token"),
    "odd token": ({}, {"hf_token": "hf_sécret"}, "hub_unauthorized", "hf_token", "check hf_token"),
    "revision": ({}, {"revision": "v9"}, "model_not_found", "revision", "has no 'v9'"),
    "variant": ({}, {"gguf_variant": "Q2_K"}, "model_not_found", "gguf_variant", "Q4_K_M"),
    "limited": ({"status": 429, "retry_after_s": 99}, {}, "hub_rate_limited", None, "hf_token"),
    "broken": ({"status": 503}, {}, "hub_unreachable", None, "503"),
    "refused": ({"status": 403}, {}, "hub_unauthorized", "hf_token", "403"),
    "page": ({"html": True}, {}, "hub_unreachable", None, "web page"),
    "cut json": ({"truncate_json": True}, {}, "hub_unreachable", None, "no sense"),
    "circle": ({"redirect": "/api/models/a/b"}, {}, "hub_unreachable", None, "redirects"),
    "file page": ({"html": True, "path": "/resolve/"}, {}, "hub_unreachable", None, "web page"),
    "file gone": ({"status": 404, "path": "/resolve/"}, {}, "hub_unreachable", None, "404"),
    "cdn": ({"status": 403, "path": "/cdn/"}, {}, "hub_unreachable", None, "403"),
    "listing resets": ({"reset_after": 0}, {}, "hub_unreachable", None, "try again"),
    "body resets": ({"reset_after": 0, "path": "/cdn/"}, {}, "hub_unreachable", None, "try again"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_has_its_category_and_says_what_to_do(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    case: str,
) -> None:
    fault, fields, category, field, told = FAILURES[case]
    files = {FILE: gguf_files[FILE]}
    hub.add(fake_hub.Repo("owner/private", files, private=True, readers=["hf_reader"]))
    hub.add(fake_hub.Repo("owner/gated", files, gated=True, readers=["hf_reader"]))
    hub.add(fake_hub.Repo("owner/other", files, private=True, readers=["hf_stranger"]))
    if fault:
        hub.fail(**fault)
    with pytest.raises(OrchestratorError) as caught:
        fetch(records, **{"stall_timeout_s": 2.4, **fields})
    problem = caught.value.problem
    assert (problem.category, problem.field) == (category, field)
    assert told in problem.message
    assert "Traceback" not in str(caught.value)
    if fault.get("status") == 429:
        assert problem.retry_after_s == 99
        assert len(hub.requests) == 1
    assert len(hub.seen(server="cdn")) <= 6
    assert gguf_repo.commit not in str(list(root_of().glob("snapshots/*/*.gguf")))


@pytest.mark.usefixtures("gguf_repo")
def test_a_hub_that_is_down_and_one_that_is_not_to_be_trusted(
    hub: fake_hub.Hub, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("http://", "https://"))
    with pytest.raises(HubUnreachable) as caught:
        fetch(records)
    assert caught.value.reason == "tls"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.stop()
    with pytest.raises(HubUnreachable, match="check the network"):
        fetch(records, stall_timeout_s=3)


@pytest.mark.usefixtures("gguf_repo")
@pytest.mark.parametrize("path", ["/api/models", "/resolve/", "/cdn/"])
def test_failures_that_pass_are_waited_out(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching], path: str
) -> None:
    fault = hub.fail(path=path, status=503, times=2)
    one = fetching(gguf_variant="Q8_0", mmproj_path="/own.gguf", stall_timeout_s=4)
    assert one.files().is_on_disk
    assert fault.hits == 2
    assert one.progress.note is None


@pytest.mark.usefixtures("gguf_repo")
def test_retry_after_is_honoured_within_the_stall_clock(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching]
) -> None:
    hub.fail(path="/api/models", status=429, retry_after_s=1, times=1)
    one = fetching(gguf_variant="Q8_0", stall_timeout_s=30)
    one.wait_until(lambda p: p.note and "too often" in p.note, "the note")
    assert one.files().is_on_disk
    first, second = hub.seen("/api/models")
    assert second.at - first.at >= 1


@pytest.mark.usefixtures("big")
def test_a_listing_that_hangs_is_asked_for_again_and_given_up(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching]
) -> None:
    fault = hub.fail(path="/api/models", hang=True)
    error = fetching(model_path=BIG, stall_timeout_s=3).error()
    assert error.problem.category == "hub_unreachable"
    assert fault.hits == 4


@pytest.mark.usefixtures("big")
def test_a_file_that_hangs_is_asked_for_again_until_the_stall_clock_is_over(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching]
) -> None:
    fault = hub.fail(path="/cdn/", hang=True)
    error = fetching(model_path=BIG, stall_timeout_s=1.5).error()
    assert isinstance(error, Stalled)
    assert error.reason == "download"
    assert error.field == "stall_timeout_s"
    assert fault.hits >= 2


@pytest.mark.usefixtures("big")
def test_a_slow_hub_is_no_stall(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching], big_file: Path
) -> None:
    """Also after it had to begin again: the clock looks at bytes that move, not at the total."""
    plant_partial(big_file, b"\0" * (big_file.stat().st_size - 1))
    hub.fail(path="/cdn/", bytes_per_s=5 << 20)
    one = fetching(model_path=BIG, stall_timeout_s=1.5)
    assert_whole(one.files(), big_file)


@pytest.mark.usefixtures("gguf_repo")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model_path": f"{MODEL}:Q8_0", "gguf_variant": "Q4_K_M"}, "gguf_variant"),
        ({"revision": "../../x"}, "revision"),
        ({"revision": "/etc/passwd"}, "revision"),
        ({"revision": "main?x"}, "revision"),
        ({"revision": "a/./b"}, "revision"),
    ],
)
def test_a_request_that_contradicts_itself_or_leads_astray_asks_nobody(
    hub: fake_hub.Hub, records: Path, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fetch(records, **fields)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest):
        look_up(records, **fields)
    assert not hub.requests


# -------------------------------------------------------------------------- a hub that means harm

EVIL = "../../../../evil-Q8_0.gguf"


def test_files_with_an_impossible_name_hash_or_size_are_not_there(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do their names reach the disk: they are left out before anything is asked for."""
    hub.add(fake_hub.Repo("owner/evil", {FILE: gguf_files[FILE]}))
    changes: list[dict[str, Any]] = [
        {"rfilename": EVIL},
        {"rfilename": "/tmp/evil-Q8_0.gguf"},
        {"rfilename": "a/../../../evil-Q8_0.gguf"},
        {"rfilename": "evil\0-Q8_0.gguf"},
        {"rfilename": ""},
        {"rfilename": "1.gguf", "lfs": {"sha256": EVIL, "size": 1}},
        {"rfilename": "2.gguf", "lfs": {"sha256": "a" * 63 + "\n", "size": 1}},
        {"rfilename": "3.gguf", "lfs": {"sha256": None, "size": 1}},
        {"rfilename": "4.gguf", "size": -1},
        {"rfilename": "5.gguf", "size": "12"},
        {"rfilename": "6.gguf", "size": None},
        {"rfilename": "7.gguf", "size": 1 << 60},
    ]

    def poison(info: dict[str, Any]) -> None:
        (good,) = info["siblings"]
        info["siblings"] = [{**good, **change} for change in changes]

    alter_info(monkeypatch, poison)
    with pytest.raises(ModelNotFound) as caught:
        fetch(records, model_path="owner/evil")
    assert caught.value.message.endswith("holds no .gguf model"), "not one of them was believed"
    assert not hub.seen("/resolve/")
    assert not cache.directory().exists()


@pytest.mark.parametrize(
    "change",
    [{"sha": "../../x"}, {"sha": None}, {"siblings": None}, {"siblings": [1]}, {"pad": "x" * 99}],
    ids=str,
)
@pytest.mark.usefixtures("gguf_repo")
def test_a_listing_that_makes_no_sense_is_the_hubs_error(
    hub: fake_hub.Hub,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    if "pad" in change:
        change = {"pad": "x" * (100 << 20)}
    alter_info(monkeypatch, lambda info: info.update(change))
    with pytest.raises(HubError) as caught:
        fetch(records)
    assert caught.value.problem.category == "hub_unreachable"
    assert "no sense" in caught.value.message
    assert len(hub.requests) == 1


def test_a_repo_that_calls_itself_something_else_stays_in_its_folder(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(fake_hub.Repo("owner/evil", {FILE: gguf_files[FILE]}))
    alter_info(monkeypatch, lambda info: info.update(id="../../../evil"))
    files = fetch(records, model_path="owner/evil")
    assert Path(files.weights[0].path).is_relative_to(root_of("owner/evil"))


def alter_info(monkeypatch: pytest.MonkeyPatch, alter: Callable[[dict[str, Any]], object]) -> None:
    original = fake_hub._info

    def altered(*args: Any) -> dict[str, Any]:
        info = original(*args)
        alter(info)
        return info

    monkeypatch.setattr(fake_hub, "_info", altered)


# ------------------------------------------------------------------------------------- the token


def test_the_token_reaches_the_hub_and_nobody_else(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    fetching: Callable[..., Fetching],
    records: Path,
) -> None:
    token = "hf_reader"
    repo = fake_hub.Repo("owner/gated", {FILE: gguf_files[FILE]}, gated=True, readers=[token])
    hub.add(repo)
    held = hub.fail(path="/cdn/", stall_after=1000, times=1)
    with capture_logs() as logs:
        one = fetching(model_path="owner/gated", hf_token=token)
        hub.wait_for(lambda: held.held)
        (child,) = children()
        assert token not in str(child.cmdline())
        assert token not in str(child.environ())
        held.release()
        assert one.files().is_on_disk
    assert {request.token for request in hub.seen(server="hub")} == {token}
    assert not [request for request in hub.seen(server="cdn") if request.has_token]
    assert token not in str(logs) + str(one.progress)
    assert not [path for path in records.rglob("*") if token in path.read_text()]


@pytest.mark.usefixtures("gguf_repo")
def test_a_token_is_not_shown_whatever_it_looks_like(hub: fake_hub.Hub, records: Path) -> None:
    secret = "quite-an-unusual-secret"
    hub.add(fake_hub.Repo("owner/private", {}, private=True, readers=[secret]))
    with pytest.raises(ModelNotFound) as caught, capture_logs() as logs:
        fetch(records, hf_token=secret, revision=secret)
    assert caught.value.field == "revision"
    assert secret not in str(caught.value) + str(logs)


def test_the_fetcher_ends_with_its_parent(hub: fake_hub.Hub, tmp_path: Path) -> None:
    """Also when the parent is killed, and its pipes are held open by a fork of it."""
    hub.add(fake_hub.Repo(BIG, {BIG_FILE: b"GGUF"}))
    held = hub.fail(path="/api/models", hang=True)
    program = (
        "import os, sys, time, pathlib\n"
        "from orchestrator.models.hub.download import *\n"
        "from orchestrator.base.tokens import *\n"
        "import threading\n"
        f"request = LoadRequest(model_path={BIG!r})\n"
        f"hub = Hub(pathlib.Path({str(tmp_path)!r}))\n"
        "args = request, CancelToken(Generation(1)), FetchProgress()\n"
        "threading.Thread(target=hub.fetch, args=args, daemon=True).start()\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    hub.wait_for(lambda: held.held)
    (child,) = psutil.Process(parent.pid).children()
    fd = os.pidfd_open(child.pid)
    try:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
        assert select.select([fd], [], [], 5)[0], "it goes on"
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------- cancels


def _held(hub: fake_hub.Hub, start: Callable[..., Fetching], **fault: Any) -> Fetching:
    held = hub.fail(**fault)
    one = start(model_path=BIG)
    hub.wait_for(lambda: held.held)
    return one


def in_the_listing(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    return _held(hub, start, path="/api/models", hang=True)


def in_the_redirect(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    return _held(hub, start, path="/resolve/", hang=True)


def in_the_answer(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    return _held(hub, start, path="/cdn/", hang=True)


def in_a_stalled_body(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    return _held(hub, start, stall_after=1 << 20)


def in_a_body(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    hub.fail(bytes_per_s=2 << 20)
    one = start(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done, "the first byte")
    return one


def in_the_wait_before_a_retry(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    hub.fail(path="/resolve/", status=503, retry_after_s=300)
    one = start(model_path=BIG)
    one.wait_until(lambda p: p.note and "503" in p.note, "a note")
    return one


def in_the_wait_for_another(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    hub.fail(stall_after=1 << 20, times=1)
    first = start(model_path=BIG)
    first.wait_until(lambda p: p.bytes_done, "the first byte")
    second = start(model_path=BIG)
    second.wait_until(lambda p: p.note and "another process" in p.note, "a note")
    return second


def in_hashing(hub: fake_hub.Hub, start: Callable[..., Fetching]) -> Fetching:
    """Something that takes seconds to hash and no room on the disk."""
    size, etag = 8 << 30, "0" * 64
    huge = fake_hub.Blob(size, lambda *_: b"")
    huge.__dict__["sha256"] = etag
    repo = hub.add(fake_hub.Repo("owner/huge", {"x-Q8_0.gguf": b""}))
    repo.commits[repo.commit]["x-Q8_0.gguf"] = huge
    blob = root_of("owner/huge") / "blobs" / etag
    blob.parent.mkdir(parents=True)
    blob.touch()
    os.truncate(blob, size)
    one = start(model_path="owner/huge")
    one.wait_until(lambda p: p.bytes_done == size, "what is there")
    return one


PHASES = [
    in_the_listing,
    in_the_redirect,
    in_the_answer,
    in_a_stalled_body,
    in_a_body,
    in_the_wait_before_a_retry,
    in_the_wait_for_another,
    in_hashing,
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
@pytest.mark.usefixtures("big")
def test_a_cancel_in_any_phase_settles_at_once_and_the_next_load_is_whole(
    hub: fake_hub.Hub,
    big_file: Path,
    fetching: Callable[..., Fetching],
    phase: Callable[[fake_hub.Hub, Callable[..., Fetching]], Fetching],
) -> None:
    """B20: a cancel is a kill of the child, whatever it hangs in."""
    one = phase(hub, fetching)
    before = {child.pid for child in children()}
    assert one.cancel() < 1
    assert len(before) - len(children()) == 1
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    hub.clear()
    assert_whole(fetching(model_path=BIG).files(), big_file)


@pytest.mark.usefixtures("big")
def test_a_cancel_while_the_child_starts_settles_at_once(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching], monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, started = launch.popen, threading.Event()

    def tell(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = popen(command, **settings)
        started.set()
        return process

    monkeypatch.setattr(launch, "popen", tell)
    one = fetching(model_path=BIG)
    assert started.wait(DEADLINE_S)
    assert one.cancel() < 1
    assert not children()
    assert not hub.requests


@pytest.mark.usefixtures("big")
def test_a_child_that_the_kernel_keeps_is_not_waited_for(
    hub: fake_hub.Hub, fetching: Callable[..., Fetching], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed while it syncs a large file goes on for as long as that takes."""
    monkeypatch.setattr(fetch_process, "REAP_S", 0.0)
    one = in_the_listing(hub, fetching)
    (child,) = children()
    assert one.cancel() < 1
    assert not psutil.wait_procs([child], timeout=DEADLINE_S)[1]


# ------------------------------------------------------------------------------- two at the same


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("is_killed", [False, True])
def test_of_two_fetchers_of_one_file_one_transfers(
    hub: fake_hub.Hub,
    big_file: Path,
    fetching: Callable[..., Fetching],
    *,
    is_killed: bool,
) -> None:
    """B59. The other goes on from its bytes when the first dies."""
    held = hub.fail(stall_after=3 << 20, times=1)
    first = fetching(model_path=BIG)
    first.wait_until(lambda p: p.bytes_done >= 3 << 20, "3 MiB")
    (child,) = children()
    second = fetching(model_path=BIG)
    second.wait_until(lambda p: p.note and "another process" in p.note, "a note")
    second.wait_until(lambda p: p.bytes_done >= 3 << 20, "what the other has")
    assert len(hub.seen(server="cdn")) == 1
    if is_killed:
        child.kill()
        assert first.error().problem.category == "hub_error"
    else:
        held.release()
        assert_whole(first.files(), big_file)
    assert_whole(second.files(), big_file)
    ranges = [request.range for request in hub.seen(server="cdn")]
    assert ranges == ([None, f"bytes={3 << 20}-"] if is_killed else [None])
    if not is_killed:
        assert hub.sent(BIG_FILE) == big_file.stat().st_size


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("is_right", [True, False])
def test_what_another_tool_finishes_meanwhile_is_hashed_before_it_is_used(
    hub: fake_hub.Hub, big_file: Path, fetching: Callable[..., Fetching], *, is_right: bool
) -> None:
    """It shares no lock with us; the file that appears is the one that counts, if it is right."""
    partial = plant_partial(big_file, b"")
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one = fetching(model_path=BIG)
        one.wait_until(lambda p: p.note and "another process" in p.note, "a note")
        blob = partial.with_name(partial.name.removesuffix(PARTIAL))
        blob.write_bytes(big_file.read_bytes())
        if not is_right:
            flip(blob)
    assert_whole(one.files(), big_file)
    assert bool(hub.seen(server="cdn")) is not is_right


# -------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a volume of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder))
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a full disk needs a small one, and only root may mount it")
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    yield folder
    subprocess.run(("umount", "-l", str(folder)), check=True)


@pytest.mark.usefixtures("big")
def test_a_volume_that_may_only_be_read_is_used(records: Path, small_volume: Path) -> None:
    """Nor does what cannot be written down, which commit a branch is, fail the load."""
    first = fetch(records, model_path=BIG)
    (root_of(BIG) / "refs" / "main").write_text("0" * 40)
    subprocess.run(("mount", "-o", "remount,ro", str(small_volume)), check=True)
    assert fetch(records, model_path=BIG).weights == first.weights


@pytest.mark.usefixtures("big")
def test_what_does_not_fit_is_refused_before_the_first_byte(
    hub: fake_hub.Hub, records: Path, big_file: Path, small_volume: Path
) -> None:
    """B56: no smaller one in its place; and what is there already need not fit again."""
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
def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_lost(
    hub: fake_hub.Hub, big_file: Path, small_volume: Path, fetching: Callable[..., Fetching]
) -> None:
    held = hub.fail(stall_after=1 << 20, times=1)
    one = fetching(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done >= 1 << 20, "1 MiB")
    (small_volume / "filler").write_bytes(bytes(8 << 20))
    held.release()
    error = one.error()
    assert isinstance(error, DiskFull)
    assert "needs" in error.message
    assert "free" in error.message
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    (small_volume / "filler").unlink()
    hub.clear()
    assert_whole(fetching(model_path=BIG).files(), big_file)
    (request,) = hub.seen(server="cdn")
    assert request.range is not None
    assert int(request.range[6:-1]) >= 1 << 20


# ------------------------------------------------------------------------------ too large for HTTP


@pytest.mark.usefixtures("big")
def test_what_plain_http_does_not_serve_is_left_to_the_library_and_hashed(
    hub: fake_hub.Hub,
    big_file: Path,
    tmp_path: Path,
    fetching: Callable[..., Fetching],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than 50 GB come by Xet alone; here the border is lower, and Xet is off."""
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
    one = fetching(model_path=BIG, stall_timeout_s=5)
    assert_whole(one.files(), big_file)
    assert hub.seen(method="HEAD"), "the library's own way"
    assert any(0 < seen < big_file.stat().st_size for seen in one.bytes_seen), "a sign of life"
    assert [request.range for request in hub.seen(server="cdn")] == [None]
