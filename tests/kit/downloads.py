"""Downloads from the fake hub: one on a thread of its own, and what it leaves in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import scan_cache_dir

from orchestrator.base import launch
from orchestrator.base.tokens import CancelReason, CancelToken, Generation
from orchestrator.errors import Cancelled, OrchestratorError
from orchestrator.models.hub import cache
from orchestrator.models.hub.download import RequestedModel
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.hub.records import Records
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.fake_hub import Blob, Content
from tests.kit.models import MODEL
from tests.kit.process.support import Background, until

FILE = "Qwen3-0.6B-Q8_0.gguf"
BIG = "owner/Big-GGUF"
BIG_FILE = "Big-Q8_0.gguf"
PARTIAL = ".orchestrator.incomplete"


def requested(records: Path, **fields: Any) -> RequestedModel:
    """Return a model of the fake hub, `MODEL` unless `model_path` is given."""
    request = LoadRequest.from_dict({"model_path": MODEL, **fields})
    return RequestedModel(request, Records(records))


def fetch(records: Path, progress: FetchProgress | None = None, **fields: Any) -> ModelFiles:
    token = CancelToken(Generation(1))
    return requested(records, **fields).fetch(token, progress or FetchProgress())


def look_up(records: Path, **fields: Any) -> ModelFiles:
    return requested(records, **fields).look_up()


class Download:
    """A fetch on a thread of its own."""

    def __init__(self, records: Path, **fields: Any) -> None:
        self.token = CancelToken(Generation(1))
        self.bytes_seen: list[int] = []
        self.progress = FetchProgress(
            on_change=lambda: self.bytes_seen.append(self.progress.bytes_done)
        )
        model = requested(records, **fields)
        self._fetch = Background(model.fetch, self.token, self.progress)

    def wait_until(self, condition: Callable[[FetchProgress], object], what: str) -> None:
        until(lambda: condition(self.progress), what)

    def files(self) -> ModelFiles:
        files: ModelFiles = self._fetch.result()
        return files

    def error(self) -> OrchestratorError:
        error = self._fetch.error()
        assert isinstance(error, OrchestratorError), error
        return error

    def cancel(self) -> float:
        """Cancel the download and return how long it took to end, in seconds."""
        started = time.monotonic()
        self.token.set(CancelReason.USER)
        assert isinstance(self.error(), Cancelled)
        return time.monotonic() - started

    def end(self) -> None:
        """Cancel the download if it still runs."""
        self.token.set(CancelReason.USER)
        self._fetch.error()


def fetchers(of: int | None = None) -> list[psutil.Process]:
    """Return the fetcher processes of a process, by default of this one, that are alive."""
    found = []
    for child in psutil.Process(of).children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and "fetcher.py" in str(child.cmdline()):
                found.append(child)
    return found


def refuse(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    links: int = 0,
    locks: int = 0,
    writes: int = 0,
) -> None:
    """Let fetchers meet a file system that refuses links, locks or writes with an errno.

    In their process, by an audit hook: a mount would need privileges. `folder` is for the program
    that installs it.
    """
    program = folder / "python"
    program.write_text(f"""#!{sys.executable}
import os, runpy, sys
TOP = {str(cache.directory())!r}
WRITES = {{"os.mkdir", "os.rename", "os.remove", "os.truncate", "os.symlink"}}
def hook(event, args):
    code = {{"os.symlink": {links}, "fcntl.flock": {locks}}}.get(event, 0)
    is_open = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (event in WRITES or is_open) and str(args[0]).startswith(TOP):
        code = code or {writes}
    if code:
        raise OSError(code, os.strerror(code))
sys.addaudithook(hook)
if {writes}:
    os.access = lambda path, mode, access=os.access: not mode & os.W_OK and access(path, mode)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    program.chmod(0o755)
    monkeypatch.setattr(launch, "interpreter", lambda: str(program))


def content(files: dict[str, Content], name: str) -> bytes:
    return b"".join(Blob.of(files[name]).chunks())


def root_of(model: str = MODEL) -> Path:
    """Return the folder of a repo in the cache."""
    return cache.directory() / f"models--{model.replace('/', '--')}"


def blob_of(files: ModelFiles) -> Path:
    return Path(os.path.realpath(files.weights[0].path))


def assert_whole(files: ModelFiles, source: Path) -> None:
    assert Path(files.weights[0].path).read_bytes() == source.read_bytes()
    assert not list(blob_of(files).parent.glob("*.orchestrator.*")), "a file of ours was left"
    assert not scan_cache_dir(cache.directory()).warnings


def flip_byte(path: Path, at: int = 300_000) -> None:
    """Change one byte, and neither the size nor the header."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0xFF]), at)


def add_partial(source: Path, data: bytes) -> Path:
    """Write a partial file of the big model, and return its path."""
    etag = hashlib.sha256(source.read_bytes()).hexdigest()
    path = root_of(BIG) / "blobs" / (etag + PARTIAL)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path
