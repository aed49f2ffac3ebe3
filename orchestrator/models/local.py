"""From what a caller named to the files that would be loaded, looked at on disk.

A file, or a folder with one model; all shards of a split one, in order. Nothing is guessed: what
cannot be found is an error that lists what is there. Reads headers only; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path
from typing import Final

from orchestrator.base import paths
from orchestrator.base.paths import PathNames
from orchestrator.errors import InvalidModel, ModelNotFound, OrchestratorError, naming
from orchestrator.models import gguf_file, variants
from orchestrator.models.roots import ModelRoots
from orchestrator.models.variants import Variant
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.request import LoadRequest

_MAX_DEPTH: Final = 4
_MAX_ENTRIES: Final = 20_000
_MAX_MISSING: Final = 30


def identity_of(path: str | os.PathLike[str]) -> FileIdentity:
    """Return the identity of an existing file, symbolic links resolved."""
    return _as_named(os.path.realpath(path))


def _as_named(path: str) -> FileIdentity:
    """Return the identity of an existing file under the name given, be it a link."""
    found = os.stat(path)
    return FileIdentity(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def is_local(model_path: str, roots: ModelRoots | None = None) -> bool:
    """Is something there on this machine, be it a model or not?

    Raises:
        ModelNotFound: it cannot be looked up (field `model_path`).
        InvalidRequest: it is outside of the allowed folders.
    """
    return _path(model_path, "model_path", roots).exists()


def locate(request: LoadRequest, roots: ModelRoots | None = None) -> ModelFiles:
    """Return the files this request would load, checked to be whole GGUF files.

    Args:
        roots: Folders that every file has to be in, and that names are read from; None = anywhere.

    Raises:
        ModelNotFound: nothing is there (field `model_path`, `gguf_variant` or `mmproj_path`).
        InvalidModel: empty, truncated or not a GGUF.
        InvalidRequest: outside of the allowed folders.
    """
    path = _path(request.model_path, "model_path", roots)
    variant = None
    if path.is_dir():
        chosen = variants.choose(_listing(path), request.gguf_variant, where=str(path))
        first, variant = path / chosen.weights[0], chosen.variant
    elif path.exists():
        name = f"{path.parent.name}/{path.name}"
        if request.gguf_variant is not None and not variants.matches(name, request.gguf_variant):
            raise ModelNotFound.because(
                f"{path} is not variant {request.gguf_variant!r}: leave gguf_variant out, or give "
                "the folder",
                field="gguf_variant",
            )
        first = path
    else:
        raise _not_found(request.model_path)
    parts = _parts(first, roots)
    inside = os.path.relpath(first.parent, path) if path.is_dir() else os.pardir
    names = _names_of_parts(parts, os.path.normpath(os.path.join(request.model_path, inside)))
    with naming(names):
        weights = tuple(_checked(part, "model_path", is_part=len(parts) > 1) for part in parts)
    return ModelFiles(weights, given_projector(request, roots), variant, names=names)


def variants_of(request: LoadRequest, roots: ModelRoots | None = None) -> list[Variant]:
    """Return what a local file or folder could be loaded as.

    Raises:
        ModelNotFound, InvalidModel: as `locate`.
    """
    path = _path(request.model_path, "model_path", roots)
    if not path.is_dir():
        return [Variant(None, locate(request, roots).size_bytes, is_default=True)]
    names = _listing(path)
    if roots is not None:  # not even the size of what is outside is told
        names = [name for name in names if roots.holds(path / name)]
    found, default = variants.every(names, where=str(path))
    return [
        Variant(
            chosen.variant,
            sum(_size(path / name) for name in chosen.weights),
            is_default=chosen is default,
        )
        for chosen in found
    ]


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 of a link that leads nowhere, which a load would say."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def given_projector(request: LoadRequest, roots: ModelRoots | None = None) -> FileIdentity | None:
    """Return the projector that the request names; it is always a local file.

    Raises:
        ModelNotFound, InvalidModel, InvalidRequest: as `locate` (field `mmproj_path`).
    """
    if request.mmproj_path is None:
        return None
    file = _path(request.mmproj_path, "mmproj_path", roots)
    if not file.is_file():
        raise ModelNotFound.because(f"mmproj_path {file} is not a file", field="mmproj_path")
    return _checked(file, "mmproj_path")


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound.because(
        f"{name} does not exist: give a .gguf file, a folder with one, or a Hub repo (owner/name)",
        field="model_path",
    )


def _names_of_parts(parts: tuple[Path, ...], folder: str) -> PathNames:
    """Each is called by its name in the folder that was sent, wherever a link leads."""
    return tuple((os.path.realpath(part), os.path.join(folder, part.name)) for part in parts)


def names_of(text: str, field: str, roots: ModelRoots | None) -> PathNames:
    """Return what the paths are called that this text leads to."""
    with contextlib.suppress(OSError, RuntimeError, OrchestratorError):
        return paths.names_as_sent(_path(text, field, roots), text)
    return ()


def _path(text: str, field: str, roots: ModelRoots | None) -> Path:
    """Return the path, or say that there can be nothing there."""
    try:
        path = Path(text).expanduser() if roots is None else Path(roots.resolve(text, field))
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, not ours to see; no such user
        why = getattr(error, "strerror", None) or str(error)
        message = f"{field} {text[:200]} cannot be looked up ({why}): check the path"
        raise ModelNotFound.because(message, field=field) from error
    return path


def _checked(path: Path, field: str, *, is_part: bool = False) -> FileIdentity:
    if not path.is_file():
        raise InvalidModel.because(f"{path} is not a regular file", field=field)
    if not os.access(path, os.R_OK):
        raise InvalidModel.because(f"{path} may not be read: check its permissions", field=field)
    file = _as_named(str(path)) if is_part else identity_of(path)
    info = gguf_file.inspect(file, field)
    if field == "model_path" and info.architecture == "clip":
        raise InvalidModel.because(
            f"{path} is a vision projector: give it as mmproj_path", field="model_path"
        )
    return file


def _parts(first: Path, roots: ModelRoots | None) -> tuple[Path, ...]:
    """Return every part of a split model, in order; a whole model is its only part.

    Only their folder is resolved: llama.cpp finds the parts by the name of the first, and a Hub
    cache links names to blobs without one.
    """
    names = tuple(variants.parts_of(first.name))
    is_whole = names == (first.name,)
    folder = first.parent if is_whole else Path(os.path.realpath(first.parent))
    parts = tuple(folder / name for name in names)
    if roots is not None:
        for part in parts:
            roots.check(part, "model_path")
    if is_whole:
        return parts
    if missing := list(islice((p.name for p in parts if not p.is_file()), _MAX_MISSING)):
        raise ModelNotFound.because(
            f"{first} is split and {', '.join(missing)} is missing beside it", field="model_path"
        )
    return parts


def _listing(folder: Path) -> list[str]:
    """Name every .gguf file in a folder and, as in a Hub cache, a few levels below it."""
    found: list[str] = []
    todo, seen = [("", 0)], 0
    while todo:
        inside, depth = todo.pop()
        with contextlib.suppress(OSError), os.scandir(folder / inside) as entries:
            for seen, entry in enumerate(entries, seen + 1):  # noqa: B020 (goes on counting)
                if seen > _MAX_ENTRIES:
                    raise ModelNotFound.because(
                        f"{folder} holds too much to look through: give the .gguf file",
                        field="model_path",
                    )
                if entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH:
                        todo.append((f"{inside}{entry.name}/", depth + 1))
                elif entry.name.endswith(".gguf"):
                    found.append(inside + entry.name)
    return found
