"""From what a caller named to the files that would be loaded, looked at on disk.

A file, or a folder with one model; all shards of a split one, in order. Nothing is guessed: what
cannot be found is an error that lists what is there. Reads headers only; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from orchestrator import gguf_file
from orchestrator.errors import InvalidModel, ModelNotFound
from orchestrator.request import FileIdentity, LoadRequest, ModelFiles

_REPO: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SHARD: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.I)
_SET_ASIDE: Final = re.compile(r"(mmproj|mtp-|dflash-|\._)|.*imatrix|.*-be\.gguf$", re.I)

_MAX_DEPTH: Final = 4
_MAX_ENTRIES: Final = 20_000
_LABEL: Final = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|F16|F32))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)

PREFERENCE: Final = (
    *("UD-Q4_K_XL", "UD-Q4_K_L", "UD-Q5_K_XL", "UD-Q3_K_XL", "UD-Q6_K_XL", "UD-Q6_K_S"),
    *("UD-Q8_K_XL", "UD-Q2_K_XL", "UD-IQ4_NL", "UD-IQ4_XS", "UD-IQ3_S", "UD-IQ3_XXS"),
    *("UD-IQ2_M", "UD-IQ2_XXS", "UD-IQ1_M", "UD-IQ1_S", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S"),
    *("Q6_K", "Q8_0", "Q3_K_M", "Q3_K_L", "Q3_K_S", "Q2_K", "Q2_K_L", "IQ4_NL", "IQ4_XS"),
    *("IQ3_M", "IQ3_XXS", "IQ2_M", "IQ1_M", "F16", "BF16", "F32"),
)


def identity_of(path: str | os.PathLike[str]) -> FileIdentity:
    """Return the identity of an existing file, symbolic links resolved."""
    return _as_named(os.path.realpath(path))


def _as_named(path: str) -> FileIdentity:
    """Return the identity of an existing file under the name given, be it a link."""
    found = os.stat(path)
    return FileIdentity(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def locate(request: LoadRequest) -> ModelFiles:
    """Return the files this request would load, checked to be whole GGUF files.

    Raises:
        ModelNotFound: nothing is there (field `model_path`, `gguf_variant` or `mmproj_path`).
        InvalidModel: empty, truncated or not a GGUF.
    """
    path = _path(request.model_path, "model_path")
    if path.is_dir():
        first = _choose(path, request.gguf_variant)
    elif path.exists():
        if request.gguf_variant is not None and not matches(path.name, request.gguf_variant):
            raise ModelNotFound.because(
                f"{path} is not variant {request.gguf_variant!r}: leave gguf_variant out, or give "
                "the folder",
                field="gguf_variant",
            )
        first = path
    else:
        raise _not_found(request.model_path)
    shards = _shards(first)
    weights = tuple(_checked(s, "model_path", is_part=len(shards) > 1) for s in shards)
    projector = None
    if request.mmproj_path is not None:
        file = _path(request.mmproj_path, "mmproj_path")
        if not file.is_file():
            raise ModelNotFound.because(f"mmproj_path {file} is not a file", field="mmproj_path")
        projector = _checked(file, "mmproj_path")
    return ModelFiles(weights, projector, label_of(first.name) if path.is_dir() else None)


def matches(name: str, label: str) -> bool:
    """Does a file name carry this quant label, at alphanumeric boundaries?"""
    return _carrying(label).search(name) is not None


@lru_cache(maxsize=256)
def _carrying(label: str) -> re.Pattern[str]:
    """`Q4_K_M` is not a part of `IQ4_K_M`, and a `UD-` before it makes another label of it."""
    boundaries = rf"(?<![A-Za-z0-9_])(?<!UD-){re.escape(label)}(?![A-Za-z0-9_])"
    return re.compile(boundaries, re.IGNORECASE)


def label_of(name: str) -> str:
    """Return the quant label in a file name, the same however the file was asked for; without
    one, the name itself.
    """
    found = _LABEL.findall(name)
    return found[-1].upper() if found else name


def _not_found(name: str) -> ModelNotFound:
    if _REPO.fullmatch(name) and not name.endswith(".gguf"):
        message = (
            f"{name} is not a local file or folder, and this version does not download from the "
            "Hub: download the .gguf file and give its path"
        )
    else:
        message = f"{name} does not exist: give a .gguf file or a folder with one"
    return ModelNotFound.because(message, field="model_path")


def _path(text: str, field: str) -> Path:
    """Return the path, or say that there can be nothing there."""
    try:
        path = Path(text).expanduser()
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


def _shards(first: Path) -> tuple[Path, ...]:
    """Return every part of a split model, in order; a whole model is its only part.

    Only their folder is resolved: llama.cpp finds the parts by the name of the first, and a Hub
    cache links names to blobs without one.
    """
    if (split := _SHARD.fullmatch(first.name)) is None:
        return (first,)
    prefix, count = split["prefix"], int(split["count"])
    folder = Path(os.path.realpath(first.parent))
    parts = [folder / f"{prefix}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelNotFound.because(
            f"{first} is split and {', '.join(missing)} is missing beside it", field="model_path"
        )
    return tuple(parts)


def _choose(folder: Path, variant: str | None) -> Path:
    """Pick the one model of a folder: by path, by label, or by the preference order."""
    files = sorted(_candidates(folder), key=lambda p: (len(p.relative_to(folder).parts), str(p)))
    firsts = [p for p in files if (s := _SHARD.fullmatch(p.name)) is None or int(s["number"]) == 1]
    if not firsts:
        raise ModelNotFound.because(f"{folder} holds no .gguf model", field="model_path")
    if variant is None:
        stems = [p.stem for p in firsts]
        for label in PREFERENCE:
            for number, stem in enumerate(stems):
                if matches(stem, label):
                    return firsts[number]
        return firsts[0]
    names = {str(p.relative_to(folder)): p for p in firsts}
    if variant in names:
        return names[variant]
    if found := next((p for name, p in names.items() if matches(name, variant)), None):
        return found
    raise ModelNotFound.because(
        f"{folder} has no variant {variant!r}; it has {', '.join(names)}", field="gguf_variant"
    )


def _candidates(folder: Path) -> list[Path]:
    """Every model file in a folder and, as in a Hub cache, a few levels below it."""
    found: list[Path] = []
    todo, seen = [(str(folder), 0)], 0
    while todo:
        current, depth = todo.pop()
        with contextlib.suppress(OSError), os.scandir(current) as entries:
            for seen, entry in enumerate(entries, seen + 1):  # noqa: B020 (goes on counting)
                if seen > _MAX_ENTRIES:
                    raise ModelNotFound.because(
                        f"{folder} holds too much to look through: give the .gguf file",
                        field="model_path",
                    )
                if entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH:
                        todo.append((entry.path, depth + 1))
                elif entry.name.endswith(".gguf") and not _SET_ASIDE.match(entry.name):
                    found.append(Path(entry.path))
    return found
