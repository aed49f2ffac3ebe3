"""The fake hub, proved against the real client: what it serves, and what each fault looks like.

These are also notes on huggingface_hub: which requests a call makes, what it raises when the Hub
fails, and what it does not notice.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import (
    HfApi,
    constants,
    file_download,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoFolder
from huggingface_hub.utils import _http

from tests.kit.fake_hub import Blob, Hub, Repo
from tests.kit.models import MODEL

NAME = "Org/Tiny-GGUF"
GGUF = b"".join(Blob.pattern(3_000_000, seed=7).chunks())
TEXT = b"hello\n"
TEXT_BLOB_ID = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
SHA256 = hashlib.sha256(GGUF).hexdigest()
READER, STRANGER, STALE = "hf_reader", "hf_stranger", "hf_stale"
SHORT_S = 0.1  # a time-out that is meant to run out


@pytest.fixture
def repo(hub: Hub) -> Repo:
    return hub.add(Repo(NAME, {"a.gguf": GGUF, "README.md": TEXT}, readers=[READER]))


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds the client wanted to sleep, and does not; it writes small chunks, too."""
    found: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    return found


def download(hub: Hub, file: str = "a.gguf", *, name: str = NAME, **options: Any) -> Path:
    given: dict[str, Any] = {"token": False, "etag_timeout": 20, **options}
    return Path(hf_hub_download(name, file, endpoint=hub.endpoint, **given))


def info(hub: Hub, *, name: str = NAME, token: str | bool = False, **options: Any) -> ModelInfo:
    api = HfApi(endpoint=hub.endpoint, token=token)
    return api.model_info(name, files_metadata=True, **options)


def tree(hub: Hub, path: str | None = None, *, recursive: bool = True) -> dict[str, Any]:
    api = HfApi(endpoint=hub.endpoint, token=False)
    return {entry.path: entry for entry in api.list_repo_tree(NAME, path, recursive=recursive)}


def steps(hub: Hub) -> list[tuple[str, str, str | None]]:
    return [(request.server, request.method, request.range) for request in hub.requests]


def tokens(hub: Hub) -> list[tuple[str, str | None]]:
    return [(request.server, request.token) for request in hub.requests]


@contextlib.contextmanager
def get(url: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """GET without following a redirect; the caller reads."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        with connection.getresponse() as response:
            yield response


def read(url: str, **headers: str) -> tuple[int, bytes]:
    with get(url, **headers) as response:
        return response.status, response.read()


def cdn_url(hub: Hub, file: str = "a.gguf") -> str:
    """Where the hub sends who asks for a file; the log then begins after that."""
    with get(f"{hub.endpoint}/{NAME}/resolve/main/{file}") as response:
        location = response.headers["Location"]
    hub.clear()
    return location


class Background:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 (handed to whoever asks)
            self._error = error

    def result(self) -> Any:
        if error := self.error():
            raise error
        return self._result

    def error(self) -> BaseException | None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self._error


class TestListings:
    def test_model_info_has_sizes_and_hashes(self, hub: Hub, repo: Repo) -> None:
        """These are what a downloader plans with: the size before, the sha256 after."""
        found = info(hub)
        assert (found.id, found.sha, found.private, found.gated) == (
            NAME,
            repo.commit,
            False,
            False,
        )
        text, model = found.siblings or []
        assert (text.rfilename, text.size, text.blob_id, text.lfs) == (
            "README.md",
            6,
            TEXT_BLOB_ID,
            None,
        )
        assert (model.rfilename, model.size) == ("a.gguf", len(GGUF))
        assert model.lfs is not None
        assert (model.lfs.sha256, model.lfs.size, model.lfs.pointer_size) == (
            SHA256,
            len(GGUF),
            132,
        )
        assert [request.target for request in hub.requests] == [f"/api/models/{NAME}?blobs=true"]

    def test_model_info_of_every_revision(self, hub: Hub, repo: Repo) -> None:
        first = repo.commit
        second = repo.push({"b.gguf": GGUF})
        third = repo.push({"c.gguf": GGUF}, branch="refs/pr/1")
        assert len({first, second, third}) == 3
        for revision, commit in [(first, first), ("main", second), ("refs/pr/1", third)]:
            assert info(hub, revision=revision).sha == commit
        assert hub.requests[-1].target.endswith("/revision/refs%2Fpr%2F1?blobs=true")

    def test_the_tree_is_walked_page_by_page(self, hub: Hub) -> None:
        hub.page_size = 2
        files = {"BF16/a-1.gguf": GGUF, "BF16/a-2.gguf": GGUF, "b.gguf": GGUF, "README.md": TEXT}
        hub.add(Repo(NAME, files))
        found = tree(hub)
        assert list(found) == ["BF16", "BF16/a-1.gguf", "BF16/a-2.gguf", "README.md", "b.gguf"]
        assert isinstance(found["BF16"], RepoFolder)
        assert isinstance(found["b.gguf"], RepoFile)
        assert found["b.gguf"].lfs is not None
        assert (found["b.gguf"].lfs.sha256, found["b.gguf"].size) == (SHA256, len(GGUF))
        assert found["README.md"].blob_id == TEXT_BLOB_ID
        assert len(hub.requests) == 3
        assert list(tree(hub, recursive=False)) == ["BF16", "README.md", "b.gguf"]
        assert list(tree(hub, "BF16")) == ["BF16/a-1.gguf", "BF16/a-2.gguf"]
        with pytest.raises(RemoteEntryNotFoundError):
            tree(hub, "Q4")

    def test_file_metadata(self, hub: Hub, repo: Repo) -> None:
        url = hf_hub_url(NAME, "a.gguf", endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token=False)
        assert (found.commit_hash, found.etag, found.size) == (repo.commit, SHA256, len(GGUF))
        assert found.location.startswith(f"{hub.cdn}/cdn/{SHA256}?sig=")
        url = hf_hub_url(NAME, "README.md", endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token=False)
        assert (found.etag, found.size, found.location) == (TEXT_BLOB_ID, 6, url)


class TestDownloads:
    def test_an_lfs_file_comes_from_the_cdn_without_the_token(self, hub: Hub, repo: Repo) -> None:
        """The client drops the token itself: it asks with HEAD and goes to the CDN afresh."""
        path = download(hub, token=READER)
        assert path.read_bytes() == GGUF
        assert path.parent.name == repo.commit
        assert path.resolve().name == SHA256
        assert steps(hub) == [("hub", "HEAD", None), ("cdn", "GET", None)]
        assert tokens(hub) == [("hub", READER), ("cdn", None)]
        assert not any(READER in str(request.headers) for request in hub.seen(server="cdn"))

    def test_a_small_file_comes_from_the_hub(self, hub: Hub, repo: Repo) -> None:
        assert download(hub, "README.md", token=READER).read_bytes() == TEXT
        assert tokens(hub) == [("hub", READER), ("hub", READER)]
        assert "hf_hub/" in hub.requests[0].user_agent
        assert hub.requests[0].host == urlsplit(hub.endpoint).netloc

    def test_the_hub_may_serve_everything_itself(self, repo: Repo) -> None:
        with Hub(lfs_redirect=False) as other:
            other.add(repo)
            assert download(other).read_bytes() == GGUF
            assert steps(other) == [("hub", "HEAD", None), ("hub", "GET", None)]

    def test_small_files_may_be_redirected_within_the_hub(self, repo: Repo) -> None:
        with Hub(resolve_cache=True) as other:
            other.add(repo)
            assert download(other, "README.md", token=READER).read_bytes() == TEXT
            assert tokens(other) == [("hub", READER)] * 3
            cached = f"/api/resolve-cache/models/{NAME}/{repo.commit}/README.md"
            assert [request.path for request in other.requests[1:]] == [cached, cached]

    def test_a_cached_file_needs_a_head_or_nothing(self, hub: Hub, repo: Repo) -> None:
        path = download(hub)
        hub.clear()
        assert download(hub) == path
        assert steps(hub) == [("hub", "HEAD", None)]
        hub.clear()
        assert download(hub, revision=repo.commit) == path
        assert download(hub, local_files_only=True) == path
        assert hub.requests == []

    def test_main_may_move_and_old_commits_stay(self, hub: Hub, repo: Repo) -> None:
        old, before = repo.commit, download(hub)
        new = repo.push({"a.gguf": GGUF[::-1]})
        after = download(hub)
        assert (before.parent.name, after.parent.name) == (old, new)
        assert (before.read_bytes(), after.read_bytes()) == (GGUF, GGUF[::-1])
        assert download(hub, "README.md", revision=old).read_bytes() == TEXT
        with pytest.raises(RemoteEntryNotFoundError):
            download(hub, "README.md")

    def test_other_casing_and_old_names_are_redirected(self, hub: Hub, repo: Repo) -> None:
        """The client follows, keeps the token, and files it under the name that was asked for."""
        hub.add(Repo("Org/New", {"a.gguf": GGUF}, aliases=["old"]))
        assert info(hub, name=NAME.lower()).id == NAME
        assert info(hub, name="old").id == "Org/New"
        hub.clear()
        path = download(hub, name=NAME.lower(), token=READER)
        assert path.read_bytes() == GGUF
        assert path.parents[2].name == "models--org--tiny-gguf"
        assert tokens(hub) == [("hub", READER), ("hub", READER), ("cdn", None)]

    def test_a_large_file_needs_no_memory_and_a_file_on_disk_is_served(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        kept = tmp_path / "kept.gguf"
        kept.write_bytes(GGUF)
        huge = Blob.pattern(1 << 40)
        hub.add(Repo(NAME, {"a.gguf": kept, "huge.bin": Blob.pattern(3 << 20, seed=1)}))
        assert download(hub).read_bytes() == GGUF
        data = download(hub, "huge.bin").read_bytes()
        assert len(data) == 3 << 20
        assert len({data[at : at + (1 << 20)] for at in range(0, 3 << 20, 1 << 20)}) == 3
        for start, size in [(0, 5), (3, 40), ((1 << 20) - 3, 3), (1 << 20, 17), ((1 << 21) + 9, 9)]:
            assert Blob.pattern(3 << 20, seed=1).read(start, size) == data[start : start + size]
        assert len(huge.read((1 << 40) - 5, 100)) == 5


class TestAccess:
    @pytest.mark.parametrize(
        ("token", "status", "error"),
        [
            (False, 401, RepositoryNotFoundError),
            (STRANGER, 404, RepositoryNotFoundError),
            (STALE, 401, HfHubHTTPError),
        ],
    )
    def test_a_private_repository_is_not_there(
        self, token: str | bool, status: int, error: type[HfHubHTTPError]
    ) -> None:
        """A token the Hub does not know is refused before anything is looked up."""
        with Hub(tokens=[STRANGER]) as hub:
            hub.add(Repo(NAME, {"a.gguf": GGUF}, private=True, readers=[READER]))
            with pytest.raises(HfHubHTTPError) as listed:
                info(hub, token=token)
            with pytest.raises(HfHubHTTPError) as loaded:
                download(hub, token=token)
            for caught in (listed.value, loaded.value):
                assert type(caught) is error
                assert caught.response.status_code == status
            assert steps(hub) == [("hub", "GET", None), ("hub", "HEAD", None)]
            assert info(hub, token=READER).private
            path = download(hub, token=READER)
            assert path.read_bytes() == GGUF
            assert download(hub, token=token) == path  # what is cached needs no right

    def test_a_token_the_hub_does_not_know_is_refused_for_public_files_too(
        self, hub: Hub, repo: Repo
    ) -> None:
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
            download(hub, token=STALE)
        assert type(caught.value) is HfHubHTTPError
        assert STALE not in str(caught.value)

    @pytest.mark.parametrize(("token", "status"), [(False, 401), (STRANGER, 403)])
    def test_a_gated_repository_is_listed_but_not_given(
        self, token: str | bool, status: int
    ) -> None:
        with Hub(tokens=[STRANGER]) as hub:
            hub.add(Repo(NAME, {"a.gguf": GGUF}, gated=True, readers=[READER]))
            assert info(hub, token=token).gated == "manual"
            with pytest.raises(GatedRepoError, match="restricted") as caught:
                download(hub, token=token)
            assert caught.value.response.status_code == status
            assert download(hub, token=READER).read_bytes() == GGUF

    def test_what_is_missing_is_told_apart(self, hub: Hub, repo: Repo) -> None:
        with pytest.raises(RepositoryNotFoundError):
            download(hub, name="Org/None")
        with pytest.raises(RevisionNotFoundError):
            download(hub, revision="0" * 40)
        with pytest.raises(RevisionNotFoundError):
            info(hub, revision="nope")
        with pytest.raises(RemoteEntryNotFoundError) as caught:
            download(hub, "no.gguf")
        assert caught.value.response.headers["X-Repo-Commit"] == repo.commit


class TestRanges:
    @pytest.mark.parametrize(
        ("asked", "start", "stop"),
        [
            ("bytes=0-", 0, None),
            ("bytes=1000-", 1000, None),
            ("bytes=1000-1999", 1000, 2000),
            (f"bytes={len(GGUF) - 1}-{len(GGUF) * 2}", len(GGUF) - 1, None),
            ("bytes=-10", -10, None),
        ],
    )
    def test_a_part_is_what_was_asked_for(
        self, hub: Hub, repo: Repo, asked: str, start: int, stop: int | None
    ) -> None:
        with get(cdn_url(hub), Range=asked) as response:
            part = response.read()
        assert (response.status, part) == (206, GGUF[start:stop])
        first = start % len(GGUF)
        last = first + len(part) - 1
        assert response.headers["Content-Range"] == f"bytes {first}-{last}/{len(GGUF)}"
        assert hub.requests[0].range == asked
        hub.wait_for(lambda: hub.sent("/cdn/") == len(part))  # counted once the kernel has it

    def test_nothing_is_left_to_ask_for(self, hub: Hub, repo: Repo) -> None:
        with get(cdn_url(hub), Range=f"bytes={len(GGUF)}-") as response:
            assert (response.status, response.read()) == (416, b"")
        assert response.headers["Content-Range"] == f"bytes */{len(GGUF)}"

    def test_what_is_no_range_is_ignored(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        for asked in ("bytes=5-4", "bytes=-", "bytes=0-1,3-4", "lines=1-2"):
            assert read(url, Range=asked) == (200, GGUF)

    def test_a_part_of_another_version_is_the_whole(self, hub: Hub, repo: Repo) -> None:
        """If-Range (RFC 9110, 13.1.5); the CDN's ETag is not the sha256."""
        url = cdn_url(hub)
        with get(url) as response:
            etag = response.headers["ETag"]
        assert SHA256 not in etag
        assert read(url, **{"Range": "bytes=9-", "If-Range": etag}) == (206, GGUF[9:])
        assert read(url, **{"Range": "bytes=9-", "If-Range": f'"{SHA256}"'}) == (200, GGUF)

    def test_the_cdn_wants_the_signature(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        assert read(url.replace("sig=", "sig=0"))[0] == 403
        assert read(url)[0] == 200


class TestFaultsOfAnswers:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_a_failing_hub_is_asked_seven_times(
        self, hub: Hub, repo: Repo, naps: list[float], status: int
    ) -> None:
        """And then called a missing local entry; a listing fails at once."""
        fault = hub.fail(status=status)
        with pytest.raises(LocalEntryNotFoundError) as caught:
            download(hub)
        assert isinstance(caught.value.__cause__, HfHubHTTPError)
        assert caught.value.__cause__.response.status_code == status
        assert (len(hub.requests), naps) == (7, [1, 2, 4, 8, 8])
        with pytest.raises(HfHubHTTPError):
            info(hub)
        assert (len(hub.requests), fault.hits) == (8, 8)
        fault.remove()
        assert download(hub).read_bytes() == GGUF

    def test_a_failing_cdn_fails_the_download_at_once(
        self, hub: Hub, repo: Repo, naps: list[float]
    ) -> None:
        hub.fail(status=503, path="/cdn/", times=1)
        with pytest.raises(HfHubHTTPError, match="503"):
            download(hub)
        assert (len(hub.requests), naps) == (2, [])

    def test_retry_after_is_obeyed_in_full(self, hub: Hub, repo: Repo, naps: list[float]) -> None:
        hub.fail(status=429, retry_after_s=3600, path="/cdn/", times=1)
        assert download(hub).read_bytes() == GGUF
        assert naps == [3601.0]

    def test_a_hanging_hub_is_asked_seven_times(
        self, hub: Hub, repo: Repo, naps: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With 10 s for the first time and 60 s for each of the others."""
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", SHORT_S)
        fault = hub.fail(hang=True)
        with pytest.raises(LocalEntryNotFoundError) as caught:
            download(hub, etag_timeout=SHORT_S)
        assert isinstance(caught.value.__cause__, httpx2.ReadTimeout)
        assert (len(hub.requests), fault.held) == (7, 7)
        with pytest.raises(httpx2.ReadTimeout):
            info(hub, timeout=SHORT_S)
        hub.stop()
        assert fault.held == 0

    def test_a_listing_waits_for_a_hanging_hub_until_it_answers(self, hub: Hub, repo: Repo) -> None:
        """`model_info` has no time-out of its own."""
        fault = hub.fail(hang=True)
        listing = Background(lambda: info(hub).sha)
        hub.wait_for(lambda: fault.held)
        fault.release()
        assert listing.result() == repo.commit

    def test_a_late_answer_is_taken(self, hub: Hub, repo: Repo) -> None:
        fault = hub.fail(late_s=0.02)
        assert download(hub).read_bytes() == GGUF
        assert fault.hits == 2

    def test_a_changed_etag_is_not_noticed(self, hub: Hub, repo: Repo) -> None:
        """The client never compares; the blob has the name that HEAD gave it."""
        hub.fail(headers={"X-Linked-ETag": '"other"'}, method="HEAD")
        assert download(hub).resolve().name == "other"

    def test_without_the_commit_it_is_no_hub(self, hub: Hub, repo: Repo) -> None:
        fault = hub.fail(headers={"X-Repo-Commit": None})
        with pytest.raises(LocalEntryNotFoundError) as caught:
            download(hub)
        assert isinstance(caught.value.__cause__, FileMetadataError)
        fault.remove()
        hub.fail(html=True)
        with pytest.raises(LocalEntryNotFoundError) as caught:
            download(hub)
        assert isinstance(caught.value.__cause__, FileMetadataError)

    def test_a_body_may_come_without_its_length(self, hub: Hub, repo: Repo) -> None:
        hub.fail(headers={"Content-Length": None}, path="/cdn/")
        assert download(hub).read_bytes() == GGUF

    @pytest.mark.parametrize("fault", [{"html": True}, {"truncate_json": True}])
    def test_a_broken_listing_is_a_decoding_error(
        self, hub: Hub, repo: Repo, fault: dict[str, Any]
    ) -> None:
        hub.fail(**fault)
        with pytest.raises(json.JSONDecodeError):
            info(hub)
        with pytest.raises(json.JSONDecodeError):
            tree(hub)

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_redirect_to_another_host_does_not_carry_the_token(
        self, hub: Hub, repo: Repo, method: str
    ) -> None:
        """Neither when the client's HTTP library follows it nor when the client itself does."""
        elsewhere = cdn_url(hub).replace("127.0.0.1", "localhost")
        hub.fail(redirect=elsewhere, method=method, path="/resolve/")
        if method == "GET":
            with pytest.raises(OSError, match="Consistency check failed"):
                download(hub, "README.md", token=READER)
        else:  # and then the size is not known either: any other file passes for this one
            assert download(hub, "README.md", token=READER).read_bytes() == GGUF
        hub.fail(redirect=elsewhere, path="/api/")
        with pytest.raises(ValueError, match=r"decode|Expecting value"):
            info(hub, token=READER)
        arrived = hub.seen(server="cdn")
        assert [request.host for request in arrived] == [urlsplit(elsewhere).netloc] * 2
        assert not any(request.has_token for request in arrived)


class TestFaultsOfBodies:
    def test_a_stalled_body_is_resumed(
        self, hub: Hub, repo: Repo, naps: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the last whole chunk, of 10 MiB by default: a smaller file starts anew."""
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5 * SHORT_S)
        fault = hub.fail(stall_after=1_050_000, times=1)
        assert download(hub).read_bytes() == GGUF
        assert steps(hub)[1:] == [("cdn", "GET", None), ("cdn", "GET", "bytes=1000000-")]
        assert (fault.hits, naps) == (1, [1])

    def test_a_body_cut_short_is_resumed(self, hub: Hub, repo: Repo, naps: list[float]) -> None:
        hub.fail(cut_after=2_050_000, times=1)
        assert download(hub).read_bytes() == GGUF
        assert steps(hub)[2] == ("cdn", "GET", "bytes=2000000-")

    def test_five_resumptions_without_a_byte_are_enough(
        self, hub: Hub, repo: Repo, naps: list[float], hf_home: Path
    ) -> None:
        hub.fail(cut_after=0)
        with pytest.raises(httpx2.RemoteProtocolError, match="received 0 bytes"):
            download(hub)
        assert (len(hub.seen("/cdn/")), naps) == (6, [1] * 5)
        assert list(hf_home.rglob("*.incomplete")) == []

    def test_a_reset_is_not_resumed(self, hub: Hub, repo: Repo, naps: list[float]) -> None:
        hub.fail(reset_after=2_000_000, times=1)
        with pytest.raises(httpx2.ReadError) as caught:
            download(hub)
        assert isinstance(caught.value.__context__, Exception)
        assert (len(hub.requests), naps) == (2, [])
        assert download(hub).read_bytes() == GGUF

    def test_a_mangled_body_is_accepted(self, hub: Hub, repo: Repo) -> None:
        hub.fail(flip_at=1_234_567)
        data = download(hub).read_bytes()
        assert [at for at in range(len(GGUF)) if data[at] != GGUF[at]] == [1_234_567]
        assert len(data) == len(GGUF)

    def test_an_ignored_range_starts_the_file_anew(
        self, hub: Hub, repo: Repo, naps: list[float]
    ) -> None:
        hub.fail(cut_after=1_000_000, times=1)
        fault = hub.fail(ignore_range=True)
        assert download(hub).read_bytes() == GGUF
        assert (fault.hits, len(hub.seen("/cdn/"))) == (1, 2)

    def test_another_range_of_the_right_length_is_not_noticed(
        self, hub: Hub, repo: Repo, naps: list[float]
    ) -> None:
        """The client does not read where Content-Range begins, only the total."""
        hub.fail(cut_after=1_000_000, times=1)
        hub.fail(shift_range=-10)
        assert download(hub).read_bytes() == GGUF[:1_000_000] + GGUF[999_990:-10]

    def test_a_slow_body_comes_in_pieces_until_released(self, hub: Hub, repo: Repo) -> None:
        fault = hub.fail(bytes_per_s=200_000)
        loading = Background(lambda: download(hub).read_bytes())
        hub.wait_for(lambda: hub.sent("/cdn/") >= 20_000)
        assert hub.sent("/cdn/") < 100_000
        fault.release()
        assert loading.result() == GGUF

    def test_faults_by_name_of_the_file_and_in_turn(self, hub: Hub) -> None:
        hub.add(Repo(NAME, {"a.gguf": GGUF, "b.gguf": GGUF[1:]}))
        hub.fail(status=503, path="a.gguf", method="GET", times=2)
        for _ in range(2):
            with pytest.raises(HfHubHTTPError):
                download(hub)
        assert download(hub, "b.gguf").read_bytes() == GGUF[1:]
        assert download(hub).read_bytes() == GGUF


class TestFaultsOnTheWire:
    def test_a_cut_is_the_end_of_the_stream(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        hub.fail(cut_after=1000)
        with get(url) as response, pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert caught.value.partial == GGUF[:1000]

    def test_a_reset_comes_after_exactly_so_many_bytes(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        hub.fail(reset_after=1000)
        with get(url) as response:
            assert response.read(1000) == GGUF[:1000]
            with pytest.raises(ConnectionResetError):
                response.read(1)

    def test_a_stall_sends_the_rest_when_released(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        fault = hub.fail(stall_after=1000)
        with get(url) as response:
            hub.wait_for(lambda: fault.held)
            assert response.read(1000) == GGUF[:1000]
            assert hub.sent() == 1000
            fault.release()
            assert response.read() == GGUF[1000:]

    def test_another_range_says_so(self, hub: Hub, repo: Repo) -> None:
        url = cdn_url(hub)
        hub.fail(shift_range=-10)
        with get(url, Range="bytes=1000-1999") as response:
            assert response.read() == GGUF[990:1990]
        assert response.headers["Content-Range"] == f"bytes 990-1989/{len(GGUF)}"
        assert read(url) == (200, GGUF)

    def test_a_connection_is_kept_alive(self, hub: Hub, repo: Repo) -> None:
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=20)
        sockets = set()
        for _ in range(3):
            connection.request("GET", f"/{NAME}/resolve/main/README.md")
            assert connection.getresponse().read() == TEXT
            sockets.add(connection.sock)
        assert len(sockets) == 1
        connection.close()


class TestStopping:
    def test_a_stopped_hub_refuses_and_comes_back_where_it_was(
        self, hub: Hub, repo: Repo, naps: list[float]
    ) -> None:
        endpoint = hub.endpoint
        path = download(hub)
        hub.stop()
        with pytest.raises(ConnectionRefusedError):
            read(endpoint)
        assert download(hub) == path
        with pytest.raises(LocalEntryNotFoundError) as caught:
            download(hub, "README.md")
        assert isinstance(caught.value.__cause__, httpx2.ConnectError)
        assert naps == [1, 2, 4, 8, 8]
        with pytest.raises(httpx2.ConnectError):
            info(hub)
        hub.start()
        assert hub.endpoint == endpoint
        assert download(hub, "README.md").read_bytes() == TEXT

    def test_stopping_ends_every_thread_and_every_connection(self, repo: Repo) -> None:
        """Idle, hanging, stalled and throttled ones."""
        before = set(threading.enumerate())
        with contextlib.ExitStack() as clients, Hub() as other:
            other.add(repo)
            url = cdn_url(other)
            idle = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=20)
            clients.enter_context(idle)
            hang = other.fail(hang=True, path="/api/")
            api = Background(lambda: read(f"{other.endpoint}/api/models/{NAME}"))
            stall = other.fail(stall_after=10, times=1)
            stalled = clients.enter_context(get(url))
            other.wait_for(lambda: hang.held and stall.held)
            slow = other.fail(bytes_per_s=1)
            throttled = clients.enter_context(get(url))
            other.wait_for(lambda: slow.held)
            other.stop()
            assert idle.recv(1) == b""
            for response in (stalled, throttled):
                with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                    response.read()
            assert isinstance(api.error(), (http.client.RemoteDisconnected, ConnectionResetError))
        assert set(threading.enumerate()) <= before

    def test_a_bug_of_the_fake_hub_fails_the_test(self, repo: Repo, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        gone.write_bytes(TEXT)
        other = Hub()
        other.add(Repo(NAME, {"gone": gone}))
        gone.unlink()
        other.start()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            read(f"{other.endpoint}/{NAME}/resolve/main/gone")
        with pytest.raises(FileNotFoundError):
            other.stop()
        other.close()


class TestModels:
    def test_a_model_as_published(
        self, hub: Hub, gguf_repo: Repo, gguf_files: dict[str, Any]
    ) -> None:
        siblings = info(hub, name=MODEL).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        assert set(names) == set(gguf_files)
        assert "BF16/Qwen3-0.6B-BF16-00001-of-00002.gguf" in names
        hashes = [sibling.lfs.sha256 for sibling in siblings if sibling.lfs]
        assert len(set(hashes)) == len(hashes) == len(names) - 3
        for name in names:
            data = download(hub, name, name=MODEL).read_bytes()
            assert data[:4] == b"GGUF" or not name.endswith(".gguf")
