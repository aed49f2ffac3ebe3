"""Which files of a listing are the model: all parts of one variant, and its projector.

A listing is names inside one folder or Hub repo, "/" between folders. Companions are set aside and
are never weights. A variant is meant by its path, then as `folder/label`, then by its quant label,
then by text that only one name carries; without one the order of `PREFERENCE` decides. Nothing is
mixed or guessed: what is incomplete, unknown or ambiguous is an error that names what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Final

from orchestrator.base.record import Record
from orchestrator.errors import ModelNotFound

PREFERENCE: Final[tuple[str, ...]] = (
    *("UD-Q4_K_XL", "UD-Q4_K_L", "UD-Q5_K_XL", "UD-Q3_K_XL", "UD-Q6_K_XL", "UD-Q6_K_S"),
    *("UD-Q8_K_XL", "UD-Q2_K_XL", "UD-IQ4_NL", "UD-IQ4_XS", "UD-IQ3_S", "UD-IQ3_XXS"),
    *("UD-IQ2_M", "UD-IQ2_XXS", "UD-IQ1_M", "UD-IQ1_S", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S"),
    *("Q6_K", "Q8_0", "Q3_K_M", "Q3_K_L", "Q3_K_S", "Q2_K", "Q2_K_L", "IQ4_NL", "IQ4_XS"),
    *("IQ3_M", "IQ3_XXS", "IQ2_M", "IQ1_M", "F16", "BF16", "F32"),
)
_RANK: Final = {label: rank for rank, label in enumerate(PREFERENCE)}
_LABEL: Final = re.compile(
    r"(?<![A-Z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))"
    r"(?![A-Z0-9])",
    re.IGNORECASE | re.ASCII,
)
_SPLIT: Final = re.compile(
    r"(?P<prefix>(?:.*/)?[^/]+)-(?P<number>\d{5})-of-(?P<count>(?!00000)\d{5})(?P<end>\.gguf)",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
_ASIDE_FOLDER: Final = re.compile(r"(?:.*/)?(?:mtp|dspark)/", re.IGNORECASE | re.DOTALL)
_ASIDE_FILE: Final = re.compile(
    r"mtp-|dflash-|\._|.*imatrix|.*-be(?:-\d{5}-of-\d{5})?\.", re.IGNORECASE | re.DOTALL
)
_PROJECTOR: Final = re.compile(r"(?:.*[^A-Z0-9])?mmproj", re.IGNORECASE | re.ASCII | re.DOTALL)
_UNUSABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\s|(?:^|/)\.{0,2}(?:/|$)")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
_MAX_SHOWN: Final = 30
_MAX_SHOWN_CHARACTERS: Final = 120


@dataclass(frozen=True, slots=True)
class Chosen:
    """One variant of a listing, names exactly as listed.

    Attributes:
        weights: Every part, in order.
        projector: The vision projector that belongs to it.
        variant: The shortest name that means this variant and no other of the listing: its quant
            label in upper case, or its file name where it has none; else `folder/label` or its
            path. Asking for it gives the same again.
    """

    weights: tuple[str, ...]
    projector: str | None
    variant: str


@dataclass(frozen=True, slots=True)
class Variant(Record):
    """One that could be loaded.

    Attributes:
        gguf_variant: What means it in a load request; None of a file that is named itself.
        size_bytes: Of all its parts, and of the projector a load would take with it.
        is_default: What a load without a variant takes.
        is_cached: Is all of it on this machine?
    """

    gguf_variant: str | None
    size_bytes: int
    is_default: bool
    is_cached: bool = True


@dataclass(slots=True, eq=False)
class _Model:
    """The parts of one variant, some of which may be missing."""

    folder: str  # "" or with a "/" at its end
    stem: str  # the file name without part number and ending
    label: str
    count: int
    parts: dict[int, str] = field(default_factory=dict)  # in order

    @property
    def is_whole(self) -> bool:
        return len(self.parts) == self.count

    @property
    def order(self) -> tuple[object, ...]:
        """Root before sub-folders; a left-over part of another split after what is whole."""
        first = min(self.parts.values())
        return self.folder.count("/"), self.folder, self.stem, not self.is_whole, first


def choose(names: Iterable[str], variant: str | None, *, where: str) -> Chosen:
    """Return the files of the variant that is meant; the order of the names is of no importance.

    Args:
        names: Every file in the folder or repo; "/" separates folders.
        variant: A quant label or a path as listed; None or blank = by preference.
        where: The folder or repo, as an error shows it.

    Raises:
        ModelNotFound: no such variant, or more than one (field `gguf_variant`); no model at all,
            or parts of it are missing (field `model_path`).
    """
    models, projectors, aside = _sort_out(names)
    if not models:
        only = f", only {_listed([*projectors, *aside])}" if projectors or aside else ""
        raise ModelNotFound.because(f"{where} holds no .gguf model{only}", field="model_path")
    index = _index(models)
    asked = (variant or "").strip()
    if asked:
        model = _meant(asked, models, index, where)
    else:
        model = min(models, key=lambda m: _RANK.get(m.label, len(_RANK)))
    if not model.is_whole:
        missing = list(islice(_missing(model), _MAX_SHOWN))
        left = model.count - len(model.parts)
        raise ModelNotFound.because(
            f"{where}: {_shown(next(iter(model.parts.values())))} is split and "
            f"{_listed(missing, left)} {'is' if left == 1 else 'are'} missing beside it",
            field="model_path",
        )
    weights = tuple(model.parts.values())
    return Chosen(weights, _projector(model, models, projectors), _variant(model, index))


def every(names: Iterable[str], *, where: str) -> tuple[list[Chosen], Chosen | None]:
    """Return every variant that is whole, the preferred one first, and which one `choose` picks
    by itself: None when parts of that one are missing.

    Raises:
        ModelNotFound: no model at all, or no whole one (field `model_path`).
    """
    names = tuple(names)
    models, projectors, _ = _sort_out(names)
    index = _index(models)
    models.sort(key=lambda m: _RANK.get(m.label, len(_RANK)))
    found = [
        Chosen(tuple(m.parts.values()), _projector(m, models, projectors), _variant(m, index))
        for m in models
        if m.is_whole
    ]
    if not found:
        choose(names, None, where=where)  # says what is missing
    return found, found[0] if models[0].is_whole else None


def matches(name: str, label: str) -> bool:
    """Is this file meant by a label, or by text that its name carries at its boundaries?

    A quant label matches the whole label of the file, never a part of it.
    """
    if label_of(name).lower() == label.lower():
        return True
    if _LABEL.fullmatch(label):
        return False
    return _carrying(_stem(label)).search(_stem(name)) is not None


def label_of(name: str) -> str:
    """Return the quant label of a file, in upper case; without one, the file name.

    The file name counts first, its last label if it has several, then the nearest folder.
    """
    slash = name.rfind("/") + 1
    file = name[slash:]
    return _last_label(_stem(file)) or _folder_label(name[:slash]) or file


def parts_of(name: str) -> Iterator[str]:
    """Yield the names of all parts of the split model this one belongs to, in order; of a whole
    model, its own.
    """
    if (split := _SPLIT.fullmatch(name)) is None:
        yield name
        return
    for number in range(1, int(split["count"]) + 1):
        yield f"{split['prefix']}-{number:05d}-of-{split['count']}{split['end']}"


def _sort_out(names: Iterable[str]) -> tuple[list[_Model], list[str], list[str]]:
    """Return the models in order, the projectors and the files set aside, both sorted."""
    models: dict[tuple[str, str], _Model] = {}
    projectors: list[str] = []
    aside: list[str] = []
    for name in sorted(set(names)):
        if name[-5:].lower() != ".gguf":
            continue
        slash = name.rfind("/") + 1
        folder, file = name[:slash], name[slash:]
        if _ASIDE_FILE.match(file) or _ASIDE_FOLDER.match(folder) or _UNUSABLE.search(name):
            aside.append(name)
            continue
        if _PROJECTOR.match(file) or folder.lower().startswith("mmproj"):
            projectors.append(name)
            continue
        stem, number, count = file[:-5], 1, 1
        key = name, ""
        if split := _SPLIT.fullmatch(file):
            stem, number, count = split["prefix"], int(split["number"]), int(split["count"])
            key = f"{folder}{stem}{split['end']}", split["count"]
            if not 1 <= number <= count:
                aside.append(name)
                continue
        if (model := models.get(key)) is None:
            label = _last_label(stem) or _folder_label(folder) or file
            model = models[key] = _Model(folder, stem, label, count)
        model.parts[number] = name
    return sorted(models.values(), key=lambda m: m.order), projectors, aside


def _index(models: list[_Model]) -> dict[str, _Model]:
    """Return what every name means: the more exact one first, then the first model.

    Keys in lower case are those that are compared without regard to case.
    """
    paths = [(path, model) for model in models for path in model.parts.values()]
    paths += [(path[:-5], model) for path, model in paths]
    paths += [(model.folder + model.stem, model) for model in models]
    labels = [(model.folder + model.label, model) for model in models if model.folder]
    labels += [(model.label, model) for model in models]
    index = dict(reversed(paths))
    for name, model in (*paths, *labels):
        index.setdefault(name.lower(), model)
    return index


def _look_up(asked: str, index: dict[str, _Model]) -> _Model | None:
    return index.get(asked) or index.get(asked.lower())


def _variant(model: _Model, index: dict[str, _Model]) -> str:
    """Return the shortest name that means this model."""
    path = next(iter(model.parts.values()))
    candidates = (model.label, model.folder + model.label)
    return next((name for name in candidates if _look_up(name.strip(), index) is model), path)


def _meant(asked: str, models: list[_Model], index: dict[str, _Model], where: str) -> _Model:
    """Return the one model that is asked for by this name."""
    if found := _look_up(asked, index):
        return found
    carriers: list[_Model] = []
    if not _LABEL.fullmatch(asked):
        pattern = _carrying(asked)
        carriers = [model for model in models if pattern.search(model.folder + model.stem)]
        if len(carriers) == 1:
            return carriers[0]
    listed = sorted(carriers or models, key=lambda m: _RANK.get(m.label, len(_RANK)))
    known = _listed([_variant(m, index) for m in islice(listed, _MAX_SHOWN)], len(listed))
    shown = repr(asked[:_MAX_SHOWN_CHARACTERS])
    raise ModelNotFound.because(
        f"{shown} means more than one variant of {where}: name one of {known}"
        if carriers
        else f"{where} has no variant {shown}; it has {known}",
        field="gguf_variant",
    )


def _missing(model: _Model) -> Iterator[str]:
    part = next(iter(model.parts.values()))
    present = set(model.parts.values())
    return (name for name in parts_of(part) if name not in present)


def _projector(model: _Model, models: list[_Model], projectors: list[str]) -> str | None:
    """Return the projector of a model: beside it, above it, or in a folder without models; the
    one named most like it, then the one in 16 bits, and none that is named for another model.
    """
    if not projectors:
        return None
    folders = {other.folder for other in models}
    bases = {_base(other) for other in models}
    base = _base(model)
    ranked: list[tuple[int, int, bool, str]] = []
    for name in projectors:
        folder = name[: name.rfind("/") + 1]
        owner = _owner(name, bases) or base
        is_above = model.folder.startswith(folder)
        if (is_above or folder not in folders) and f"{base} ".startswith(f"{owner} "):
            distance = len(model.folder) - len(folder) if is_above else len(model.folder) + 1
            is_half = name.lower().endswith("-f16.gguf")
            ranked.append((distance, -len(owner), not is_half, name))
    return min(ranked)[-1] if ranked else None


def _owner(projector: str, bases: set[str]) -> str | None:
    """Return the model that a projector is named for: the longest of these in its name."""
    file = projector[projector.rfind("/") + 1 : -5].lower()
    words = [word for word in _SEPARATORS.split(file) if word and word != "mmproj"]
    starts = (" ".join(words[:end]) for end in range(len(words), 0, -1))
    return next((start for start in starts if start in bases), None)


def _base(model: _Model) -> str:
    """Return the words of a model's name before its quant label."""
    label = model.stem.upper().rfind(model.label)
    name = model.stem if label < 0 else model.stem[:label]
    return " ".join(filter(None, _SEPARATORS.split(name.lower())))


@lru_cache(maxsize=256)
def _carrying(text: str) -> re.Pattern[str]:
    """A pattern for text that no letter, digit or `_` goes on from; `UD-` makes another label."""
    boundaries = rf"(?<![A-Za-z0-9_])(?<!UD-){re.escape(text)}(?![A-Za-z0-9_])"
    return re.compile(boundaries, re.IGNORECASE | re.ASCII)


def _last_label(text: str) -> str | None:
    found = _LABEL.findall(text)
    return str(found[-1]).upper() if found else None


@lru_cache(maxsize=256)
def _folder_label(folder: str) -> str | None:
    """Return the label that the nearest of these folders has."""
    return next(filter(None, map(_last_label, reversed(folder.split("/")))), None)


def _stem(name: str) -> str:
    if split := _SPLIT.fullmatch(name):
        return split["prefix"]
    return name[:-5] if name[-5:].lower() == ".gguf" else name


def _listed(names: Iterable[str], count: int = 0) -> str:
    """Return the first names of so many, as an error can carry them."""
    (*all_shown,) = names
    shown = all_shown[:_MAX_SHOWN]
    left = max(count, len(all_shown)) - len(shown)
    return ", ".join(map(_shown, shown)) + (f" and {left} more" if left else "")


def _shown(name: str) -> str:
    """A listing is written by others: of bounded length, and what is not printable is escaped."""
    name = name[:_MAX_SHOWN_CHARACTERS]
    return name if name.isprintable() else repr(name)[1:-1]
