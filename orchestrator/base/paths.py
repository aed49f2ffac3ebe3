"""What callers call the paths they have sent, and the names of our own folders.

Names go with what was looked up, and with what went wrong, for whoever shows texts to strangers
(`http.paths`). Nothing is kept here.
"""

from __future__ import annotations

import os

PathNames = tuple[tuple[str, str], ...]
"""Paths, and what each is called."""


def names_as_sent(path: str | os.PathLike[str], text: str) -> PathNames:
    """A caller calls this path so; where it really leads, and what is beside it, is called alike.

    Looks at the disk.
    """
    beside = os.path.realpath(os.path.dirname(path) or os.curdir)
    names = {beside: os.path.dirname(text) or os.curdir, os.path.realpath(path): text}
    names |= {os.fspath(path): text} if os.path.isabs(path) else {}
    return tuple(names.items())


def names_of_own(path: str | os.PathLike[str], name: str) -> PathNames:
    """This path is a place of ours, called so. Looks at the disk."""
    return tuple(dict.fromkeys((os.path.abspath(path), os.path.realpath(path)), name).items())
