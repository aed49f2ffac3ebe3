"""Where local models may be: the folders that an operator allows, and nothing outside of them.

A name is read as text first. Only what lies inside by its text is looked at on disk, and what that
leads to has to be inside too. So nothing can be learnt about files outside: what is there and what
is not get the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from orchestrator.base.paths import PathNames
from orchestrator.errors import InvalidRequest, RefusedArgument
from orchestrator.settings import flags

Folder = str | os.PathLike[str]


class ModelRoots:
    """The allowed folders. A name that is not absolute is looked for in each, in their order.

    Args:
        folders: One or more; links in their names are resolved now.

    Raises:
        InvalidRequest: one is not a folder (field `models_dir`).
    """

    def __init__(self, folders: Iterable[Folder]) -> None:
        named = [os.path.abspath(os.path.expanduser(os.fspath(folder))) for folder in folders]
        for folder in named:
            if not os.path.isdir(folder):
                raise InvalidRequest.because(
                    f"models_dir {folder} is not a folder: create it first", field="models_dir"
                )
        self._roots = tuple(dict.fromkeys(map(os.path.realpath, named)))
        self._called = (*self._roots, *named)
        self.names: PathNames = tuple((folder, "<models>") for folder in self._called)

    def resolve(self, text: str, field: str) -> str:
        """Return where a name leads, links resolved; there need not be anything.

        Raises:
            InvalidRequest: it leads outside (field as given).
        """
        led = [os.path.realpath(place) for place in self._places(text)]
        inside = [path for path in led if _is_below(path, self._roots)]
        if not inside:
            raise _outside(field)
        return next(filter(os.path.exists, inside), inside[0])

    def check(self, path: Folder, field: str) -> None:
        """Refuse a path whose links lead outside.

        Raises:
            InvalidRequest: field as given.
        """
        if not self.holds(path):
            raise _outside(field)

    def holds(self, path: Folder) -> bool:
        """Does this path lead inside?"""
        return _is_below(os.path.realpath(path), self._roots)

    def check_args(self, args: Iterable[str]) -> None:
        """Refuse extra args that name files outside, or that reach further than any folder.

        The server opens these by their names, so they have to be absolute and mean what they say.

        Raises:
            RefusedArgument: names the flag.
        """
        for flag, path in flags.named_paths(args):
            if path is None:
                why = "is refused where models are confined to folders: it reaches further"
            elif not self._is_plain(path):
                why = "may only name a file inside of the model folders, by its absolute path"
            else:
                continue
            raise RefusedArgument.because(
                f"llama_extra_args: {flag} {why}", field="llama_extra_args"
            )

    def _places(self, text: str) -> Iterator[str]:
        """Yield what may be meant, as far as it lies inside by its text.

        `~user` is not looked up: it would tell which users there are.
        """
        if text == "~" or text.startswith("~/"):
            text = os.path.expanduser(text)
        for root in self._roots:
            place = os.path.normpath(os.path.join(root, text))
            if _is_below(place, self._called):
                yield place

    def _is_plain(self, path: str) -> bool:
        """Does it lead inside, and is there nothing that the kernel reads in another way?"""
        is_inside = _is_below(path, self._called) and os.pardir not in path.split(os.sep)
        return is_inside and _is_below(os.path.realpath(path), self._roots)


def model_roots(models_dir: Folder | Iterable[Folder]) -> ModelRoots | None:
    """Return the folders a caller allows; None when models may be anywhere."""
    folders = (models_dir,) if isinstance(models_dir, str | os.PathLike) else tuple(models_dir)
    return ModelRoots(folders) if folders else None


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path == one or path.startswith(one.rstrip(os.sep) + os.sep) for one in folders)


def _outside(field: str) -> InvalidRequest:
    return InvalidRequest.because(
        f"{field} is outside of the allowed model folders: name a file inside of them", field=field
    )
