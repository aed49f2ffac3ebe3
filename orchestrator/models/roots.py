"""The folders that an operator confines local models to.

A path is checked as text first; only one that is inside by its text is looked up on disk, and its
target must be inside, too. So no answer depends on files outside, not even on whether they exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from orchestrator.base.paths import PathNames
from orchestrator.errors import InvalidRequest, RefusedArgument
from orchestrator.settings import reach

Folder = str | os.PathLike[str]


class ModelRoots:
    """The allowed folders, one or more. A relative path is looked for in each, in their order."""

    def __init__(self, folders: Iterable[Folder]) -> None:
        given = [os.path.abspath(os.path.expanduser(os.fspath(folder))) for folder in folders]
        for folder in given:
            if not os.path.isdir(folder):
                message = f"models_dir {folder} is not a folder: create it first"
                raise InvalidRequest.because(message, field="models_dir")
        self._roots = tuple(dict.fromkeys(map(os.path.realpath, given)))
        self._spellings = (*self._roots, *given)
        self.names: PathNames = tuple((folder, "<models>") for folder in self._spellings)

    def resolve(self, text: str, field: str) -> str:
        """Return where a path leads, links resolved; it need not exist, but must be inside."""
        if text == "~" or text.startswith("~/"):  # `~user` would reveal which users exist
            text = os.path.expanduser(text)
        places = (os.path.normpath(os.path.join(root, text)) for root in self._roots)
        targets = [os.path.realpath(place) for place in places if _is_in(place, self._spellings)]
        inside = [path for path in targets if _is_in(path, self._roots)]
        if not inside:
            message = f"{field} is outside the allowed model folders: give a file inside them"
            raise InvalidRequest.because(message, field=field)
        return next(filter(os.path.exists, inside), inside[0])

    @property
    def folders(self) -> tuple[str, ...]:
        return self._roots

    def found(self, path: str) -> str:
        """Return a path that was found inside as callers may give it: relative to its folder."""
        root = next((one for one in self._roots if _is_in(path, (one,))), None)
        return path if root is None else os.path.relpath(path, root)

    def holds(self, path: Folder) -> bool:
        """Does this path lead inside?"""
        return _is_in(os.path.realpath(path), self._roots)

    def check_args(self, args: Iterable[str]) -> None:
        """Refuse extra args that name files outside, or that reach beyond files.

        The server opens them by name, so each must be absolute and free of `..`.
        """
        for flag, path in reach.named_paths(args):
            if path is None:
                why = "is refused while models_dir is set: it can reach other files or machines"
            elif (
                os.pardir in path.split(os.sep)  # after a link the kernel takes it differently
                or not _is_in(path, self._spellings)
                or not self.holds(path)
            ):
                why = "must be the absolute path of a file inside of the model folders"
            else:
                continue
            message = f"llama_extra_args: {flag} {why}"
            raise RefusedArgument.because(message, field="llama_extra_args")


def model_roots(models_dir: Folder | Iterable[Folder]) -> ModelRoots | None:
    """Return the allowed folders; None if models may be anywhere."""
    folders = (models_dir,) if isinstance(models_dir, str | os.PathLike) else tuple(models_dir)
    return ModelRoots(folders) if folders else None


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return any(path == one or path.startswith(one.rstrip(os.sep) + os.sep) for one in folders)
