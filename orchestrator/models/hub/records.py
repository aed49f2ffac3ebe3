"""Records about Hub models: its answers, the files of each commit, and which files were hashed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from orchestrator.base.private_file import read_file, write_json
from orchestrator.settings.files import ModelFiles

Listing = Mapping[str, tuple[int, str]]
"""The size in bytes and the etag of each model file of a commit, by its name."""

UNKNOWN: Final = -1, ""
"""Size and etag of a file for which a mirror lists none."""

_MAX_LATEST: Final = 64
_DAMAGED: Final = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class _Latest(dict[str, Any]):
    """The latest entries; older ones are dropped."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        for old in list(self)[:-_MAX_LATEST]:
            self.pop(old, None)


class Records:
    """JSON files in a folder of our own; listings are in memory, too, if it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listings: dict[str, Listing] = _Latest()
        self.answers: dict[str, tuple[float, ModelFiles]] = _Latest()  # with monotonic times

    def add_listing(self, repo: str, commit: str, listing: Listing) -> None:
        self._listings[key_of(repo.lower(), commit)] = listing
        write_json(self.listing_path(repo, commit), {"files": listing})

    def listing(self, repo: str, commit: str) -> Listing:
        """Return the files of a commit; none if there is no record or it is damaged."""
        if (known := self._listings.get(key_of(repo.lower(), commit))) is not None:
            return known
        with contextlib.suppress(OSError, *_DAMAGED):
            files = json.loads(read_file(self.listing_path(repo, commit)))["files"]
            return {str(name): (int(size), str(etag)) for name, (size, etag) in files.items()}
        return {}

    def listing_path(self, repo: str, commit: str) -> Path:
        return self._folder / f"{key_of(repo.lower(), commit)}.json"

    def add_hashed(self, path: Path, etag: str) -> None:
        if (mark := self._mark(path, etag)) is not None:
            write_json(mark, {"name": path.name})

    def is_hashed(self, path: Path, etag: str) -> bool:
        if (mark := self._mark(path, etag)) is not None:
            with contextlib.suppress(OSError):
                return bool(read_file(mark))
        return False

    def _mark(self, path: Path, etag: str) -> Path | None:
        """Return the record that exactly this file was hashed; a changed file has another."""
        with contextlib.suppress(OSError):
            at = path.stat()
            key = key_of(etag, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
            return self._folder / f"{key}.hashed"
        return None


def key_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
