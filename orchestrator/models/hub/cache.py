"""The Hugging Face cache of this machine: what is in it, without asking anybody.

Laid out as huggingface_hub documents it: `models--owner--name/` holds `refs/<revision>` (a commit),
`snapshots/<commit>/<file>` (links) and `blobs/<etag>` (what they point to). Only read here; the
variables that move it are looked at every time, because a host may set them late.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_REVISION: Final = "main"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ETAG: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_FILES: Final = 20_000
_MAX_NAME: Final = 1024


def is_commit(revision: str | None) -> bool:
    """A revision that can never mean anything else."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_revision(text: str) -> bool:
    """May it be the name of a branch, a tag, a pull request or a commit?"""
    parts = text.split("/")
    return all(re.fullmatch(r"[\w.+-]+", part) and part not in {".", ".."} for part in parts)


def is_etag(text: object) -> bool:
    """Is it a hash, and so a name for a file, too?"""
    return isinstance(text, str) and _ETAG.fullmatch(text) is not None


def is_file_name(name: str) -> bool:
    """May a file of a listing, which anybody can have written, be put under its own name?"""
    parts = name.split("/")
    return name.isprintable() and len(name) < _MAX_NAME and not {"", ".", ".."} & {*parts}


def is_offline() -> bool:
    """Has somebody said that the Hub must not be asked?"""
    given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return given.upper() in {"1", "ON", "YES", "TRUE"}


def directory() -> Path:
    """Return the folder of the cache, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return Path(os.path.expandvars(given)).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.path.join(base, "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """One repo in the cache.

    Attributes:
        repo: Its name as the folder has it.
        root: That folder.
    """

    repo: str
    root: Path

    def commit(self, revision: str | None) -> str | None:
        """Return what a revision was the last time somebody asked; None if nobody has."""
        if is_commit(revision):
            return revision
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (self.root / "refs" / (revision or DEFAULT_REVISION)).read_text().strip()
            return text if is_commit(text) else None
        return None

    def path(self, commit: str, name: str) -> Path:
        return self.root / "snapshots" / commit / name

    def names(self, commit: str) -> list[str]:
        """Return what is there of a commit: perhaps not all of it. A link to nothing is not."""
        top = self.root / "snapshots" / commit
        found: list[str] = []
        for folder, _, files in os.walk(top):
            paths = (Path(folder, file) for file in files)
            found += (path.relative_to(top).as_posix() for path in paths if os.path.exists(path))
            if len(found) > _MAX_FILES:
                break
        return found

    def blob(self, etag: str) -> Path:
        return self.root / "blobs" / etag

    def size_and_etag(self, commit: str, name: str) -> tuple[int, str]:
        """Return what is known of a file that is there: its link points to a blob named so, which
        may itself be a link into a store that has other names.
        """
        path = self.path(commit, name)
        with contextlib.suppress(OSError):
            link = os.readlink(path) if path.is_symlink() else name
            return path.stat().st_size, os.path.basename(link)
        return 0, "gone"


def find(repo: str) -> CachedRepo | None:
    """Return a repo that is in the cache; upper and lower case mean the same to the Hub."""
    top, folder = directory(), "models--" + repo.replace("/", "--")
    if os.path.isdir(top / folder):
        return CachedRepo(repo, top / folder)
    with contextlib.suppress(OSError):
        for name in os.listdir(top):
            if name.lower() == folder.lower() and os.path.isdir(top / name):
                return CachedRepo(name.removeprefix("models--").replace("--", "/", 1), top / name)
    return None


def place(repo: str) -> CachedRepo:
    """Return where a repo is in the cache, or will be."""
    return find(repo) or CachedRepo(repo, directory() / ("models--" + repo.replace("/", "--")))
