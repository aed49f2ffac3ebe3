"""Display names for local paths, which replace them in text that leaves over HTTP (`http.paths`).

A path that a caller sent keeps the caller's spelling; a folder of ours has a name like `<state>`.
"""

from __future__ import annotations

import os

PathNames = tuple[tuple[str, str], ...]
"""Pairs of a path and its display name."""


def home() -> str | None:
    """Return the home folder of this user; None without HOME and without a passwd entry."""
    folder = os.path.expanduser("~")
    return folder if os.path.isabs(folder) else None


def real(path: str | os.PathLike[str]) -> str:
    """Return a path with links resolved; without a working directory, a relative one as it is."""
    try:
        return os.path.realpath(path)
    except FileNotFoundError:
        return os.fspath(path)


def names_as_sent(path: str | os.PathLike[str], text: str) -> PathNames:
    """Name a path, its target and their folders as in the caller's `text`. Reads the disk."""
    beside = real(os.path.dirname(path) or os.curdir)
    names = {beside: os.path.dirname(text) or os.curdir, real(path): text}
    names |= {os.fspath(path): text} if os.path.isabs(path) else {}
    return tuple(names.items())


def without_folders(names: PathNames) -> PathNames:
    """Return names that say nothing of where things are, for readers who have sent no path."""
    return tuple((path, os.path.basename(n) if os.path.isabs(n) else n) for path, n in names)


def names_of_own(path: str | os.PathLike[str], name: str) -> PathNames:
    """Give one name to a path of ours and to its target. Reads the disk."""
    absolute = os.path.normpath(os.path.join(real(os.curdir), path))
    return tuple(dict.fromkeys((absolute, real(path)), name).items())
