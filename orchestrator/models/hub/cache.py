"""The Hugging Face cache of this machine, read without any request.

It has the layout that huggingface_hub documents: `models--owner--name/` holds `refs/<revision>` (a
commit), `snapshots/<commit>/<file>` (links) and `blobs/<etag>` (their targets). The environment
variables that move it are read every time, because a host may set them late.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from orchestrator.errors import CacheDirError

DEFAULT_REVISION: Final = "main"
ABSENT: Final = 0, "gone"
_MAX_FILES: Final = 20_000
_MAX_NAME: Final = 1024


def is_commit(revision: str | None) -> bool:
    """Is it the full hash of a commit, and so never a branch?"""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def is_revision(text: str) -> bool:
    """May it be the name of a branch, a tag, a pull request or a commit?"""
    parts = text.split("/")
    return all(re.fullmatch(r"[\w.+-]+", part) and part not in {".", ".."} for part in parts)


def is_etag(text: object) -> bool:
    """Is it a hash, and so safe as a file name?"""
    pattern = r"[0-9a-f]{40}|[0-9a-f]{64}"
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def is_file_name(name: str) -> bool:
    """Does a name from a listing stay inside of the snapshot? Anyone may have written it."""
    parts = name.split("/")
    return name.isprintable() and len(name) < _MAX_NAME and not {"", ".", ".."} & {*parts}


def is_offline() -> bool:
    """Does the environment forbid requests to the Hub?"""
    given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return given.upper() in {"1", "ON", "YES", "TRUE"}


def directory() -> Path:
    """Return the folder of the cache, as huggingface_hub finds it.

    Raises:
        CacheDirError: It is below the home folder, and this user has none.
    """
    env = os.environ
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    if not hub:
        home = env.get("HF_HOME")
        home = home or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        hub = os.path.join(home, "hub")
    path = os.path.expanduser(os.path.expandvars(hub))
    if path.startswith("~"):
        raise CacheDirError.because(
            f"the model cache is {path}, and there is no home folder: set HF_HOME to a folder",
            field="model_path",
        )
    return Path(path)


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repo in the cache: its name, as the folder spells it, and that folder."""

    name: str
    root: Path

    def commit(self, revision: str | None) -> str | None:
        """Return the commit that a revision was when it was last requested; None if never."""
        if is_commit(revision):
            return revision
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (self.root / "refs" / (revision or DEFAULT_REVISION)).read_text().strip()
            return text if is_commit(text) else None
        return None

    def commits(self) -> list[str]:
        """Return the commits of which files are there."""
        with contextlib.suppress(OSError):
            return sorted(filter(is_commit, os.listdir(self.root / "snapshots")))
        return []

    def path(self, commit: str, name: str) -> Path:
        return self.root / "snapshots" / commit / name

    def names(self, commit: str) -> list[str]:
        """Return the files of a commit that are there; broken links are left out."""
        top = self.root / "snapshots" / commit
        found = (path for path in top.rglob("*") if os.path.isfile(path))
        return [path.relative_to(top).as_posix() for path in islice(found, _MAX_FILES)]

    def size_and_etag(self, commit: str, name: str) -> tuple[int, str]:
        """Return size and etag of a file that is there, by its link to a blob of that name. The
        blob itself may be a link to a store with other names.
        """
        path = self.path(commit, name)
        with contextlib.suppress(OSError):
            link = os.readlink(path) if path.is_symlink() else name
            return path.stat().st_size, os.path.basename(link)
        return ABSENT


def every() -> list[CachedRepo]:
    """Return the repos of the cache."""
    prefix, top = "models--", directory()
    names = sorted(os.listdir(top)) if top.is_dir() else []
    return [
        CachedRepo(_repo_of(name), top / name)
        for name in names
        if name.startswith(prefix) and os.path.isdir(top / name)
    ]


def _repo_of(folder: str) -> str:
    return folder.removeprefix("models--").replace("--", "/", 1)


def find(repo: str) -> CachedRepo | None:
    """Return a repo of the cache; the Hub ignores case in its name."""
    top, folder = directory(), "models--" + repo.replace("/", "--")
    if os.path.isdir(top / folder):
        return CachedRepo(repo, top / folder)
    with contextlib.suppress(OSError):
        for name in os.listdir(top):
            if name.lower() == folder.lower() and os.path.isdir(top / name):
                return CachedRepo(_repo_of(name), top / name)
    return None


def find_commit(repo: str, revision: str | None) -> tuple[CachedRepo, str] | None:
    """Return a repo of the cache and the commit of a revision, where both are known."""
    cached = find(repo)
    commit = cached and cached.commit(revision)
    return (cached, commit) if cached and commit else None


def place(repo: str) -> CachedRepo:
    """Return where a repo is in the cache, or will be."""
    return find(repo) or CachedRepo(repo, directory() / ("models--" + repo.replace("/", "--")))
