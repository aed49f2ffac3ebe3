"""Local models: from the path in a request to the files that a load would use.

The path is a file or a folder with a model; all parts of a split model belong to it, in order. What
cannot be found is an error that lists what is there. Only headers are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from orchestrator.base.paths import names_as_sent
from orchestrator.errors import InvalidModel, ModelNotFound, RefusedArgument, naming
from orchestrator.models import gguf_file, variants
from orchestrator.models.roots import ModelRoots
from orchestrator.models.variants import Variant
from orchestrator.settings import reach
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.request import LoadRequest

_NO_MODEL: Final = {  # what no server loads as its model, by `gguf_file.role`
    "projector": "a vision projector: give it as mmproj_path",
    "adapter": "a LoRA adapter: give its model, and the adapter with --lora in llama_extra_args",
    "control vector": "a control vector: give its model, and the vector with --control-vector in "
    "llama_extra_args",
    "imatrix": "an importance matrix for quantisation: give the file of the model",
    "vocabulary": "a vocabulary without weights: give the file of the model",
}
_MAX_DEPTH: Final = 4
_MAX_ENTRIES: Final = 20_000
_MAX_MISSING: Final = 30


def identity_of(path: str | os.PathLike[str], *, keeps_name: bool = False) -> FileIdentity:
    """Return the identity of an existing file, links resolved unless its name is to be kept."""
    found, name = os.stat(path), os.path.abspath(path) if keeps_name else os.path.realpath(path)
    return FileIdentity(name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def role_of(path: Path, roots: ModelRoots | None = None) -> str | None:
    """Return what a file is by its header (`gguf_file.role`)."""
    with contextlib.suppress(OSError):
        if path.is_file() and (roots is None or roots.holds(path)):
            return gguf_file.role(identity_of(path))
    return None


def resolve(text: str, field: str, roots: ModelRoots | None = None) -> Path:
    """Return the path of a request; it need not exist, but must be inside of the roots."""
    try:
        path = Path(text).expanduser() if roots is None else Path(roots.resolve(text, field))
        path.exists()
    except (OSError, RuntimeError) as error:  # such as too long, not permitted; no such user
        why = getattr(error, "strerror", None) or str(error)
        message = f"{field} {text[:200]} cannot be looked up ({why}): check the path"
        raise ModelNotFound.because(message, field=field) from error
    return path


def locate(path: Path, request: LoadRequest, roots: ModelRoots | None = None) -> ModelFiles:
    """Return the files of the model at a path (`model_path`, resolved).

    Raises:
        ModelNotFound, InvalidModel, InvalidRequest: missing, not a whole GGUF, outside of the roots
            (field `model_path`, `gguf_variant` or `mmproj_path`).
    """
    names = names_as_sent(path, request.model_path)
    with naming(names):
        first, variant = _first_part(path, request, roots)
        parts = _parts(first, roots)
        inside = os.path.relpath(first.parent, path) if path.is_dir() else os.pardir
        folder = os.path.normpath(os.path.join(request.model_path, inside))
        names += tuple((os.path.realpath(part), os.path.join(folder, part.name)) for part in parts)
    with naming(names):
        weights = tuple(_checked(part, "model_path", is_part=len(parts) > 1) for part in parts)
    return with_projector(ModelFiles(weights, None, variant, names=names), request, roots)


def with_projector(
    files: ModelFiles, request: LoadRequest, roots: ModelRoots | None = None
) -> ModelFiles:
    """Add the projector that the request names, if any; it is always a local file."""
    if request.mmproj_path is None:
        return files
    path = resolve(request.mmproj_path, "mmproj_path", roots)
    names = names_as_sent(path, request.mmproj_path)
    with naming(names):
        if not path.is_file():
            raise ModelNotFound.because(f"mmproj_path {path} is not a file", field="mmproj_path")
        projector = _checked(path, "mmproj_path")
    return replace(files, projector=projector, names=(*files.names, *names))


def check_named_files(args: Iterable[str]) -> None:
    """Refuse extra args that name a file which the server could not read.

    Raises:
        RefusedArgument: names the flag and the path.
    """
    for flag, value in reach.named_files(args):
        for path in [value] if os.path.exists(value) else value.split(","):
            unscaled, colon, _ = path.rpartition(":")
            why = _unreadable(path)
            if why is not None and (not colon or _unreadable(unscaled) is not None):
                message = f"llama_extra_args: {flag} names {path[:200]}, which {why}"
                raise RefusedArgument.because(message, field="llama_extra_args")


def _unreadable(path: str) -> str | None:
    """Return why the server could not read a file, None if it can. It expands no `~`."""
    if not os.path.exists(path):
        return "does not exist: give the absolute path of a file"
    if os.path.isdir(path):
        return "is a folder: give a file"
    return None if os.access(path, os.R_OK) else "cannot be read: check its permissions"


def variants_of(path: Path, request: LoadRequest, roots: ModelRoots | None = None) -> list[Variant]:
    """Return the variants of the model at a path; raises as `locate` does."""
    if not path.is_dir():
        return [Variant(None, locate(path, request, roots).size_bytes, is_default=True)]
    with naming(names_as_sent(path, request.model_path)):
        names = _listing(path)
        if roots is not None:  # the size of a file outside must not be visible
            names = [name for name in names if roots.holds(path / name)]
        found, default = variants.every(names, where=str(path), role=lambda n: role_of(path / n))
    return [
        Variant(chosen.variant, _size(path, chosen.weights), is_default=chosen is default)
        for chosen in found
    ]


def _size(folder: Path, names: tuple[str, ...]) -> int:
    """Return the size of files, without broken links, which only a load refuses."""
    return sum(os.path.getsize(path) for n in names if os.path.exists(path := folder / n))


def _first_part(
    path: Path, request: LoadRequest, roots: ModelRoots | None
) -> tuple[Path, str | None]:
    """Return the file that was chosen, and its variant if it was chosen from a folder."""
    wanted = request.gguf_variant
    if path.is_dir():
        names, role = _listing(path), lambda name: role_of(path / name, roots)
        chosen = variants.choose(names, wanted, where=str(path), role=role)
        return path / chosen.weights[0], chosen.variant
    if not path.exists():
        raise ModelNotFound.because(
            f"{request.model_path} does not exist: give a .gguf file, a folder with one, or a Hub "
            "repo (owner/name)",
            field="model_path",
        )
    if wanted is not None and not variants.matches(f"{path.parent.name}/{path.name}", wanted):
        message = f"{path} is not variant {wanted!r}: leave gguf_variant out, or give the folder"
        raise ModelNotFound.because(message, field="gguf_variant")
    return path, None


def _parts(first: Path, roots: ModelRoots | None) -> tuple[Path, ...]:
    """Return every part of a split model, in order; a whole model is its only part.

    Only the folder is resolved: llama.cpp finds the parts by the name of the first, and a Hub cache
    links names to blobs that have other names.
    """
    names = tuple(variants.parts_of(first.name))
    is_whole = names == (first.name,)
    folder = first.parent if is_whole else Path(os.path.realpath(first.parent))
    parts = tuple(folder / name for name in names)
    if roots is not None:
        for part in parts:
            roots.resolve(str(part), "model_path")  # raises if its target is outside
    missing = () if is_whole else islice((p.name for p in parts if not p.is_file()), _MAX_MISSING)
    if absent := ", ".join(missing):
        message = f"{first} is split and {absent} is missing beside it"
        raise ModelNotFound.because(message, field="model_path")
    return parts


def _checked(path: Path, field: str, *, is_part: bool = False) -> FileIdentity:
    if not path.is_file():
        raise InvalidModel.because(f"{path} is not a regular file", field=field)
    if not os.access(path, os.R_OK):
        raise InvalidModel.because(f"{path} is not readable: check its permissions", field=field)
    file = identity_of(path, keeps_name=is_part)
    gguf_file.inspect(file, field)
    if field == "model_path" and (what := _NO_MODEL.get(gguf_file.role(file) or "")) is not None:
        raise InvalidModel.because(f"{path} is {what}", field=field)
    return file


def _listing(folder: Path) -> list[str]:
    """Return every .gguf file in a folder and, as in a Hub cache, a few levels below it."""
    found: list[str] = []
    seen = 0
    for top, folders, files in os.walk(folder):
        inside = "" if top == str(folder) else f"{os.path.relpath(top, folder)}/"
        seen += len(folders) + len(files)
        if seen > _MAX_ENTRIES:
            message = f"{folder} has too many files to search: give the .gguf file"
            raise ModelNotFound.because(message, field="model_path")
        if inside.count("/") == _MAX_DEPTH:
            folders.clear()
        found += [inside + name for name in files if name.lower().endswith(".gguf")]
    return found
