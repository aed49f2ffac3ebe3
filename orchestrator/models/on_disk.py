"""The models that are on this machine: in the Hub's cache, and below folders.

Told by their names: to read a file would be a use of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.base.record import Record
from orchestrator.errors import CacheDirError, ModelNotFound
from orchestrator.models import variants
from orchestrator.models.hub import cache


@dataclass(frozen=True, slots=True)
class ModelOnDisk(Record):
    """A model that needs no download.

    Attributes:
        model_path: What loads it: `owner/name:VARIANT`, or a file.
        where: `cache` of the Hub, or a `folder`.
        size_bytes: Of all its parts.
        last_used_at: Unix seconds; a file system may keep this to the day only.
    """

    model_path: str
    where: Literal["cache", "folder"]
    size_bytes: int
    last_used_at: float


def found(folders: Iterable[str | os.PathLike[str]] = ()) -> list[ModelOnDisk]:
    """Return the models in the cache and in folders and what is below them, by name.

    Raises:
        CacheDirError: the cache has no place.
        ModelNotFound: a folder does not exist; field `models_dir`.
    """
    models = [*_cached(), *(one for folder in folders for one in _below(Path(folder)))]
    return sorted(models, key=lambda one: (one.where, one.model_path.lower()))


def cached_repos() -> list[str]:
    """Return the names of the repos in the cache."""
    with contextlib.suppress(OSError):
        return sorted(repo.name for repo in cache.every())
    return []


def free_bytes() -> int | None:
    """Return the free space where the Hub's cache is, or will be; None if it has no place."""
    with contextlib.suppress(CacheDirError, OSError):
        folder = cache.directory().absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return shutil.disk_usage(existing).free
    return None


def _cached() -> Iterator[ModelOnDisk]:
    for repo in cache.every():
        whole: dict[str, ModelOnDisk] = {}
        for commit in repo.commits():
            top = repo.path(commit, "")
            for variant, files in _whole(top, repo.names(commit)):
                one = _measured(f"{repo.name}:{variant}", "cache", files)
                known = whole.get(variant)
                if known is None or known.last_used_at < one.last_used_at:
                    whole[variant] = one
        yield from whole.values()


def _below(folder: Path) -> Iterator[ModelOnDisk]:
    if not folder.is_dir():
        message = f"{folder} is not a folder: give one with models"
        raise ModelNotFound.because(message, field="models_dir")
    for top, folders, names in os.walk(folder):
        folders.sort()
        for _, files in _whole(Path(top), names):
            yield _measured(str(files[0]), "folder", files)


def _whole(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, list[Path]]]:
    """Yield the complete variants of one folder, each with its weights."""
    listed = [name for name in names if name.lower().endswith(".gguf")]
    with contextlib.suppress(ModelNotFound):
        chosen, _ = variants.every(listed, where=str(folder))
        for one in chosen:
            yield one.variant, [folder / name for name in one.weights]


def _measured(path: str, where: Literal["cache", "folder"], files: list[Path]) -> ModelOnDisk:
    stats = [file.stat() for file in files if file.exists()]
    last = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)
    return ModelOnDisk(path, where, sum(stat.st_size for stat in stats), last)
