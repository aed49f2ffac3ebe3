"""Downloads that are cancelled, and downloads of one file by two processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.base import launch
from orchestrator.models.hub import fetch_process
from tests.kit import fake_hub
from tests.kit.downloads import (
    BIG,
    BIG_FILE,
    PARTIAL,
    Download,
    add_partial,
    assert_whole,
    fetchers,
    flip_byte,
    root_of,
)
from tests.kit.process.support import DEADLINE_S, Watch

pytestmark = pytest.mark.usefixtures("hub")

Start = Callable[..., Download]


def _held(hub: fake_hub.Hub, start: Start, **fault: Any) -> Download:
    held = hub.fail(**fault)
    one = start(model_path=BIG)
    hub.wait_for(lambda: held.held)
    return one


def in_the_listing(hub: fake_hub.Hub, start: Start) -> Download:
    return _held(hub, start, path="/api/models", hang=True)


def in_the_redirect(hub: fake_hub.Hub, start: Start) -> Download:
    return _held(hub, start, path="/resolve/", hang=True)


def before_the_body(hub: fake_hub.Hub, start: Start) -> Download:
    return _held(hub, start, path="/cdn/", hang=True)


def in_a_stalled_body(hub: fake_hub.Hub, start: Start) -> Download:
    return _held(hub, start, stall_after=1 << 20)


def in_a_body(hub: fake_hub.Hub, start: Start) -> Download:
    hub.fail(bytes_per_s=2 << 20)
    one = start(model_path=BIG)
    one.wait_until(lambda p: p.bytes_done, "the first byte")
    return one


def before_a_retry(hub: fake_hub.Hub, start: Start) -> Download:
    hub.fail(path="/resolve/", status=503, retry_after_s=300)
    one = start(model_path=BIG)
    one.wait_until(lambda p: p.note and "503" in p.note, "a note")
    return one


def behind_another_process(hub: fake_hub.Hub, start: Start) -> Download:
    hub.fail(stall_after=1 << 20, times=1)
    first = start(model_path=BIG)
    first.wait_until(lambda p: p.bytes_done, "the first byte")
    second = start(model_path=BIG)
    second.wait_until(lambda p: p.note and "another process" in p.note, "a note")
    return second


def while_hashing(hub: fake_hub.Hub, start: Start) -> Download:
    """A file that takes seconds to hash and no room on the disk."""
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
    before_the_body,
    in_a_stalled_body,
    in_a_body,
    before_a_retry,
    behind_another_process,
    while_hashing,
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
@pytest.mark.usefixtures("big")
def test_cancel_in_any_phase_ends_the_download_at_once(
    hub: fake_hub.Hub,
    big_file: Path,
    download: Start,
    phase: Callable[[fake_hub.Hub, Start], Download],
) -> None:
    """It kills the fetcher, whatever that blocks on (B20); the next download is whole."""
    one = phase(hub, download)
    before = len(fetchers())
    assert one.cancel() < 1
    assert before - len(fetchers()) == 1
    assert not list(root_of(BIG).glob("snapshots/*/*"))
    hub.clear()
    assert_whole(download(model_path=BIG).files(), big_file)


@pytest.mark.usefixtures("big")
def test_cancel_while_the_fetcher_starts_ends_the_download_at_once(
    hub: fake_hub.Hub, download: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, started = launch.popen, threading.Event()

    def observed(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = popen(command, **settings)
        started.set()
        return process

    monkeypatch.setattr(launch, "popen", observed)
    one = download(model_path=BIG)
    assert started.wait(DEADLINE_S)
    assert one.cancel() < 1
    assert not fetchers()
    assert not hub.requests


@pytest.mark.usefixtures("big")
def test_cancel_does_not_wait_for_a_fetcher_that_the_kernel_keeps(
    hub: fake_hub.Hub, download: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed in the fsync of a large file exits only when that is done."""
    monkeypatch.setattr(fetch_process, "REAP_S", 0.0)
    one = in_the_listing(hub, download)
    (fetcher,) = fetchers()
    assert one.cancel() < 1
    assert not psutil.wait_procs([fetcher], timeout=DEADLINE_S)[1]


HOST = """
import sys
from orchestrator import Orchestrator
Orchestrator(state_dir=sys.argv[1]).prefetch(sys.argv[2])
"""


@pytest.mark.usefixtures("big")
def test_stopped_fetcher_ends_with_its_host(hub: fake_hub.Hub, state_dir: Path) -> None:
    """It would keep the lock of the file, and hold up every later download of it (B108)."""
    held = hub.fail(stall_after=1 << 20)
    with subprocess.Popen([sys.executable, "-c", HOST, str(state_dir), BIG]) as host:
        hub.wait_for(lambda: held.held)
        (fetcher,) = fetchers(host.pid)
        end = Watch(fetcher.pid)
        fetcher.suspend()
        host.kill()
    end.seconds_to_exit(0, DEADLINE_S)


# ------------------------------------------------------------------------------------ one transfer


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("is_killed", [False, True])
def test_two_downloads_of_one_file_share_one_transfer(
    hub: fake_hub.Hub, big_file: Path, download: Start, *, is_killed: bool
) -> None:
    """The second continues from the bytes of the first if that is killed (B59)."""
    hold = hub.fail(stall_after=3 << 20, times=1)
    first = download(model_path=BIG)
    first.wait_until(lambda p: p.bytes_done >= 3 << 20, "3 MiB")
    (fetcher,) = fetchers()
    second = download(model_path=BIG)
    second.wait_until(lambda p: p.note and "another process" in p.note, "a note")
    second.wait_until(lambda p: p.bytes_done >= 3 << 20, "the bytes of the first")
    assert len(hub.seen(server="cdn")) == 1
    if is_killed:
        fetcher.kill()
        assert first.error().problem.category == "hub_error"
    else:
        hold.release()
        assert_whole(first.files(), big_file)
    assert_whole(second.files(), big_file)
    ranges = [request.range for request in hub.seen(server="cdn")]
    assert ranges == ([None, f"bytes={3 << 20}-"] if is_killed else [None])
    if not is_killed:
        assert hub.sent(BIG_FILE) == big_file.stat().st_size


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("is_right", [True, False])
def test_file_that_another_tool_finishes_meanwhile_is_used_if_its_hash_is_right(
    hub: fake_hub.Hub, big_file: Path, download: Start, *, is_right: bool
) -> None:
    """Other tools do not take our lock."""
    partial = add_partial(big_file, b"")
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one = download(model_path=BIG)
        one.wait_until(lambda p: p.note and "another process" in p.note, "a note")
        blob = partial.with_name(partial.name.removesuffix(PARTIAL))
        blob.write_bytes(big_file.read_bytes())
        if not is_right:
            flip_byte(blob)
    assert_whole(one.files(), big_file)
    assert bool(hub.seen(server="cdn")) is not is_right
