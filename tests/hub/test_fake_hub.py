"""The fake hub, compared with the real client: what it serves, and what each fault looks like."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from tests.kit.fake_hub import Hub, Repo
from tests.kit.models import MODEL
from tests.kit.process.support import Background

NAME = "Org/Tiny-GGUF"
GGUF = random.Random(7).randbytes(3_000_000)
TEXT = b"hello\n"
TEXT_BLOB_ID = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
SHA256 = hashlib.sha256(GGUF).hexdigest()
READER, STRANGER, STALE = "hf_reader", "hf_stranger", "hf_stale"
SHORT_S = 0.1  # a timeout that must expire


@pytest.fixture
def repo(hub: Hub) -> Repo:
    hub.add(Repo("Org/Other", {}, readers=[STRANGER]))
    return hub.add(Repo(NAME, {"a.gguf": GGUF, "README.md": TEXT}, readers=[READER]))


def fetch(hub: Hub, file: str = "a.gguf", *, name: str = NAME, **options: Any) -> Path:
    given: dict[str, Any] = {"token": False, "etag_timeout": 20, **options}
    return Path(hf_hub_download(name, file, endpoint=hub.endpoint, **given))


def info(hub: Hub, *, name: str = NAME, token: str | bool = False, **options: Any) -> ModelInfo:
    api = HfApi(endpoint=hub.endpoint, token=token)
    return api.model_info(name, files_metadata=True, **options)


def steps(hub: Hub) -> list[tuple[str, str, str | None]]:
    """Return server, method and token of each request."""
    return [(request.server, request.method, request.token) for request in hub.requests]


@contextlib.contextmanager
def get(url: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    """GET without following a redirect; the body is unread."""
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
    """Return where the hub redirects requests for a file to, and clear the log."""
    with get(f"{hub.endpoint}/{NAME}/resolve/main/{file}") as response:
        location = response.headers["Location"]
    hub.clear()
    return location


# ---------------------------------------------------------------------------------------- listings


def test_listing_has_sizes_and_hashes(hub: Hub, repo: Repo) -> None:
    found = info(hub)
    assert (found.id, found.sha, found.private, found.gated) == (NAME, repo.commit, False, False)
    text, model = found.siblings or []
    assert (text.rfilename, text.size, text.lfs) == ("README.md", 6, None)
    assert text.blob_id == TEXT_BLOB_ID
    assert (model.rfilename, model.size) == ("a.gguf", len(GGUF))
    assert model.lfs is not None
    assert (model.lfs.sha256, model.lfs.size) == (SHA256, len(GGUF))
    assert model.lfs.pointer_size == 132
    assert [request.target for request in hub.requests] == [f"/api/models/{NAME}?blobs=true"]


def test_every_revision_is_listed(hub: Hub, repo: Repo) -> None:
    first = repo.commit
    second = repo.push({"b.gguf": GGUF})
    third = repo.push({"c.gguf": GGUF}, branch="refs/pr/1")
    assert len({first, second, third}) == 3
    for revision, commit in [(first, first), ("main", second), ("refs/pr/1", third)]:
        assert info(hub, revision=revision).sha == commit
    assert hub.requests[-1].target.endswith("/revision/refs%2Fpr%2F1?blobs=true")


def test_metadata_of_a_file_has_commit_etag_and_size(hub: Hub, repo: Repo) -> None:
    url = hf_hub_url(NAME, "a.gguf", endpoint=hub.endpoint)
    found = get_hf_file_metadata(url, token=False)
    assert (found.commit_hash, found.etag, found.size) == (repo.commit, SHA256, len(GGUF))
    assert found.location.startswith(f"{hub.cdn}/cdn/{SHA256}?sig=")
    url = hf_hub_url(NAME, "README.md", endpoint=hub.endpoint)
    found = get_hf_file_metadata(url, token=False)
    assert (found.etag, found.size, found.location) == (TEXT_BLOB_ID, 6, url)


# --------------------------------------------------------------------------------------- downloads


def test_lfs_file_comes_from_the_cdn_without_the_token(hub: Hub, repo: Repo) -> None:
    path = fetch(hub, token=READER)
    assert path.read_bytes() == GGUF
    assert path.parent.name == repo.commit
    assert path.resolve().name == SHA256
    assert steps(hub) == [("hub", "HEAD", READER), ("cdn", "GET", None)]


def test_small_file_comes_from_the_hub(hub: Hub, repo: Repo) -> None:
    assert fetch(hub, "README.md", token=READER).read_bytes() == TEXT
    assert steps(hub) == [("hub", "HEAD", READER), ("hub", "GET", READER)]


def test_cached_file_costs_a_head_request_or_none(hub: Hub, repo: Repo) -> None:
    path = fetch(hub)
    hub.clear()
    assert fetch(hub) == path
    assert steps(hub) == [("hub", "HEAD", None)]
    hub.clear()
    assert fetch(hub, revision=repo.commit) == path
    assert hub.requests == []


def test_main_moves_and_old_commits_stay(hub: Hub, repo: Repo) -> None:
    old, before = repo.commit, fetch(hub)
    new = repo.push({"a.gguf": GGUF[::-1]})
    after = fetch(hub)
    assert (before.parent.name, after.parent.name) == (old, new)
    assert (before.read_bytes(), after.read_bytes()) == (GGUF, GGUF[::-1])
    assert fetch(hub, "README.md", revision=old).read_bytes() == TEXT
    with pytest.raises(RemoteEntryNotFoundError):
        fetch(hub, "README.md")


def test_other_case_and_old_names_are_redirected(hub: Hub, repo: Repo) -> None:
    """The client keeps the token, and the name that was requested."""
    hub.add(Repo("Org/New", {"a.gguf": GGUF}, aliases=["old"]))
    assert info(hub, name=NAME.lower()).id == NAME
    assert info(hub, name="old").id == "Org/New"
    hub.clear()
    path = fetch(hub, name=NAME.lower(), token=READER)
    assert path.read_bytes() == GGUF
    assert path.parents[2].name == "models--org--tiny-gguf"
    assert [token for _, _, token in steps(hub)] == [READER, READER, None]


def test_file_on_disk_is_served(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(GGUF)
    hub.add(Repo(NAME, {"a.gguf": path}))
    assert fetch(hub).read_bytes() == GGUF


def test_model_as_published(hub: Hub, gguf_repo: Repo, gguf_files: dict[str, Any]) -> None:
    siblings = info(hub, name=MODEL).siblings or []
    names = [sibling.rfilename for sibling in siblings]
    assert set(names) == set(gguf_files)
    assert "BF16/Qwen3-0.6B-BF16-00001-of-00002.gguf" in names
    hashes = [sibling.lfs.sha256 for sibling in siblings if sibling.lfs]
    assert len(set(hashes)) == len(hashes) == len(names) - 3
    for name in names:
        data = fetch(hub, name, name=MODEL).read_bytes()
        assert data[:4] == b"GGUF" or not name.endswith(".gguf")


# ------------------------------------------------------------------------------------------ access


@pytest.mark.parametrize(
    ("token", "status", "error"),
    [
        (False, 401, RepositoryNotFoundError),
        (STRANGER, 404, RepositoryNotFoundError),
        (STALE, 401, HfHubHTTPError),
    ],
)
def test_private_repository_is_visible_to_readers_only(
    hub: Hub, repo: Repo, token: str | bool, status: int, error: type[HfHubHTTPError]
) -> None:
    repo.private = True
    for call in (info, fetch):
        with pytest.raises(HfHubHTTPError) as caught:
            call(hub, token=token)
        assert type(caught.value) is error
        assert caught.value.response.status_code == status
    assert info(hub, token=READER).private
    assert fetch(hub, token=READER).read_bytes() == GGUF


def test_unknown_token_is_refused_for_public_files(hub: Hub, repo: Repo) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        fetch(hub, token=STALE)
    assert type(caught.value) is HfHubHTTPError


@pytest.mark.parametrize(("token", "status"), [(False, 401), (STRANGER, 403)])
def test_gated_repository_is_listed_for_everyone_and_served_to_readers(
    hub: Hub, repo: Repo, token: str | bool, status: int
) -> None:
    repo.gated = True
    assert info(hub, token=token).gated == "manual"
    with pytest.raises(GatedRepoError, match="restricted") as caught:
        fetch(hub, token=token)
    assert caught.value.response.status_code == status
    assert fetch(hub, token=READER).read_bytes() == GGUF


def test_missing_repo_revision_and_file_are_different_errors(hub: Hub, repo: Repo) -> None:
    with pytest.raises(RepositoryNotFoundError):
        fetch(hub, name="Org/None")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        info(hub, revision="nope")
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        fetch(hub, "no.gguf")
    assert caught.value.response.headers["X-Repo-Commit"] == repo.commit


def test_cdn_checks_the_signature(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    assert read(url.replace("sig=", "sig=0"))[0] == 403
    assert read(url)[0] == 200


# ------------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize(
    ("range_", "start", "stop"),
    [
        ("bytes=0-", 0, None),
        ("bytes=1000-", 1000, None),
        ("bytes=1000-1999", 1000, 2000),
        (f"bytes={len(GGUF) - 1}-{len(GGUF) * 2}", len(GGUF) - 1, None),
        ("bytes=-10", -10, None),
    ],
)
def test_range_is_served(hub: Hub, repo: Repo, range_: str, start: int, stop: int | None) -> None:
    with get(cdn_url(hub), Range=range_) as response:
        part = response.read()
    assert (response.status, part) == (206, GGUF[start:stop])
    first = start % len(GGUF)
    last = first + len(part) - 1
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{len(GGUF)}"
    assert hub.requests[0].range == range_
    hub.wait_for(lambda: hub.sent("/cdn/") == len(part))


def test_range_beyond_the_end_is_refused(hub: Hub, repo: Repo) -> None:
    with get(cdn_url(hub), Range=f"bytes={len(GGUF)}-") as response:
        assert (response.status, response.read()) == (416, b"")
    assert response.headers["Content-Range"] == f"bytes */{len(GGUF)}"


def test_malformed_range_is_ignored(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    for range_ in ("bytes=5-4", "bytes=-", "bytes=0-1,3-4", "lines=1-2"):
        assert read(url, Range=range_) == (200, GGUF)


# ------------------------------------------------------------------------------- faults of answers


def test_status_is_sent_until_the_fault_is_removed(hub: Hub, repo: Repo) -> None:
    fault = hub.fail(status=429, retry_after_s=3600)
    with pytest.raises(HfHubHTTPError) as caught:
        info(hub)
    assert caught.value.response.status_code == 429
    assert caught.value.response.headers["Retry-After"] == "3600"
    assert fault.hits == 1
    fault.remove()
    assert info(hub).sha == repo.commit


def test_hanging_hub_answers_when_released(hub: Hub, repo: Repo) -> None:
    fault = hub.fail(hang=True)
    with pytest.raises(httpx2.ReadTimeout):
        info(hub, timeout=SHORT_S)
    listing = Background(lambda: info(hub).sha)
    hub.wait_for(lambda: fault.held == 2)
    fault.release()
    assert listing.result() == repo.commit


def test_headers_are_replaced_or_removed(hub: Hub, repo: Repo) -> None:
    hub.fail(headers={"X-Linked-ETag": '"other"', "X-Repo-Commit": None}, method="HEAD")
    url = hf_hub_url(NAME, "a.gguf", endpoint=hub.endpoint)
    found = get_hf_file_metadata(url, token=False)
    assert (found.etag, found.commit_hash) == ("other", None)


@pytest.mark.parametrize("fault", [{"html": True}, {"truncate_json": True}])
def test_damaged_listing_is_not_json(hub: Hub, repo: Repo, fault: dict[str, Any]) -> None:
    hub.fail(**fault)
    with pytest.raises(json.JSONDecodeError):
        info(hub)


def test_redirect_to_another_host_arrives_without_the_token(hub: Hub, repo: Repo) -> None:
    elsewhere = cdn_url(hub).replace("127.0.0.1", "localhost")
    hub.fail(redirect=elsewhere, path="/api/")
    with pytest.raises(ValueError, match=r"decode|Expecting value"):
        info(hub, token=READER)
    (arrived,) = hub.seen(server="cdn")
    assert (arrived.host, arrived.has_token) == (urlsplit(elsewhere).netloc, False)


def test_faults_match_the_name_of_the_file_and_a_number_of_answers(hub: Hub) -> None:
    hub.add(Repo(NAME, {"a.gguf": GGUF, "b.gguf": GGUF[1:]}))
    hub.fail(status=503, path="a.gguf", method="GET", times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError):
            fetch(hub)
    assert fetch(hub, "b.gguf").read_bytes() == GGUF[1:]
    assert fetch(hub).read_bytes() == GGUF


# -------------------------------------------------------------------------------- faults of bodies


def test_cut_ends_the_stream(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    hub.fail(cut_after=1000)
    with get(url) as response, pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert caught.value.partial == GGUF[:1000]


def test_reset_comes_after_exactly_so_many_bytes(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    hub.fail(reset_after=1000)
    with get(url) as response:
        assert response.read(1000) == GGUF[:1000]
        with pytest.raises(ConnectionResetError):
            response.read(1)


def test_stall_sends_the_rest_when_released(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    fault = hub.fail(stall_after=1000)
    with get(url) as response:
        hub.wait_for(lambda: fault.held)
        assert response.read(1000) == GGUF[:1000]
        assert hub.sent() == 1000
        fault.release()
        assert response.read() == GGUF[1000:]


def test_slow_body_comes_in_pieces_until_released(hub: Hub, repo: Repo) -> None:
    fault = hub.fail(bytes_per_s=200_000)
    loading = Background(lambda: fetch(hub).read_bytes())
    hub.wait_for(lambda: hub.sent("/cdn/") >= 20_000)
    assert hub.sent("/cdn/") < 100_000
    fault.release()
    assert loading.result() == GGUF


def test_flipped_byte_is_accepted_by_the_client(hub: Hub, repo: Repo) -> None:
    """It hashes nothing, so our own check is needed."""
    hub.fail(flip_at=1_234_567)
    data = fetch(hub).read_bytes()
    assert [at for at in range(len(GGUF)) if data[at] != GGUF[at]] == [1_234_567]
    assert len(data) == len(GGUF)


def test_shifted_and_ignored_ranges(hub: Hub, repo: Repo) -> None:
    url = cdn_url(hub)
    fault = hub.fail(shift_range=-10)
    with get(url, Range="bytes=1000-1999") as response:
        assert response.read() == GGUF[990:1990]
    assert response.headers["Content-Range"] == f"bytes 990-1989/{len(GGUF)}"
    assert read(url) == (200, GGUF)
    fault.remove()
    hub.fail(ignore_range=True)
    assert read(url, Range="bytes=1000-1999") == (200, GGUF)


def test_connection_is_kept_alive(hub: Hub, repo: Repo) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=20)
    sockets = set()
    for _ in range(3):
        connection.request("GET", f"/{NAME}/resolve/main/README.md")
        assert connection.getresponse().read() == TEXT
        sockets.add(connection.sock)
    assert len(sockets) == 1
    connection.close()


# ---------------------------------------------------------------------------------------- stopping


def test_stopped_hub_refuses_connections_and_starts_on_the_same_ports(hub: Hub, repo: Repo) -> None:
    endpoint = hub.endpoint
    path = fetch(hub)
    hub.stop()
    with pytest.raises(ConnectionRefusedError):
        read(endpoint)
    with pytest.raises(httpx2.ConnectError):
        info(hub)
    hub.start()
    assert hub.endpoint == endpoint
    assert fetch(hub) == path


def test_stop_ends_every_thread_and_every_connection(repo: Repo) -> None:
    """Idle, hanging, stalled and throttled ones."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as clients, Hub() as other:
        other.add(repo)
        url = cdn_url(other)
        idle = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=20)
        clients.enter_context(idle)
        hang = other.fail(hang=True, path="/api/")
        api = Background(read, f"{other.endpoint}/api/models/{NAME}")
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


def test_bug_of_the_fake_hub_fails_the_test(repo: Repo, tmp_path: Path) -> None:
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
