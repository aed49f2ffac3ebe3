"""Choose the files of a model from a listing: all parts of one variant, and its projector.

A listing is the names inside of a folder or a Hub repo, "/" between folders. What is no model is
set aside, by its header where that can be read, else by its name; it can be named only by its path.
A variant is matched as a path, then as `folder/label`, then by its quant label, then by text that
only one name has; without one the order of `PREFERENCE` decides. An incomplete, unknown or
ambiguous variant is an error that lists what there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
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
_OTHERS: Final = len(PREFERENCE)
_LARGE: Final = frozenset({"FP16", "FP32"})  # last: four times the bytes of a quantised file
_RANK: Final = {label: rank for rank, label in enumerate(PREFERENCE)} | dict.fromkeys(
    _LARGE, _OTHERS + 1
)


def _word(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Z0-9])({words})(?![A-Z0-9])", re.IGNORECASE | re.ASCII)


_LABEL: Final = _word(
    r"(?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)"
)
_SPLIT: Final = re.compile(
    r"(?P<prefix>(?:.*/)?[^/]+)-(?P<number>\d{5})-of-(?P<count>(?!00000)\d{5})(?P<end>\.gguf)",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
# Drafts and heads for drafting (their headers may be those of models; Eagle-7B is a model),
# vocabularies, the other byte order.
_ASIDE: Final = re.compile(
    r"(?:^|/)(?:mtp[-/]|\._|ggml-vocab-)|-be(?:-\d{5}-of-\d{5})?\.(?=[^/]*\Z)|(?<![A-Z0-9])"
    r"(?:drafts?|drafter|dflash|dspark|eagle3|eagle2?(?![-_.]?\d+(?:\.\d+)?b))(?![A-Z0-9])",
    re.IGNORECASE | re.ASCII,
)
# What only a header can tell from a model made with it, such as a merged adapter.
_PART: Final = _word(r"loras?|adapters?|control[-_ ]?vectors?")
_PROJECTOR: Final = re.compile(r"(?:.*[^A-Z0-9])?mmproj", re.IGNORECASE | re.ASCII | re.DOTALL)
_UNUSABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|^\s|(?:^|/)\.{0,2}(?:/|$)")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
MODEL: Final = "model"
_MAX_LISTED: Final = 30
_MAX_CHARACTERS: Final = 120

RoleOf = Callable[[str], str | None]
"""Returns what a file is by its header, MODEL or another word; None if it cannot be read."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One variant of a listing, names as listed.

    Attributes:
        weights: Every part, in order.
        projector: Its vision projector.
        variant: The shortest name that means this variant alone: its quant label in upper case,
            or its file name if it has none; else `folder/label` or its path.
    """

    weights: tuple[str, ...]
    projector: str | None
    variant: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.weights, *filter(None, (self.projector,)))


@dataclass(frozen=True, slots=True)
class Variant(Record):
    """A variant that can be loaded.

    Attributes:
        gguf_variant: Its name in a load request; None for a single file.
        size_bytes: Of all parts, and of the projector that a load would use; None if not listed.
        is_default: Is it what a load without a variant would use?
        is_cached: Is all of it on this machine?
    """

    gguf_variant: str | None
    size_bytes: int | None
    is_default: bool
    is_cached: bool = True


@dataclass(slots=True, eq=False)
class _Model:
    """The parts of one variant, some of which may be missing."""

    folder: str  # "" or with a "/" at its end
    stem: str  # the file name without part number and suffix
    count: int
    is_aside: bool
    label: str
    parts: dict[int, str] = field(default_factory=dict)  # in order

    @property
    def is_whole(self) -> bool:
        return len(self.parts) == self.count

    @property
    def first(self) -> str:
        return next(iter(self.parts.values()))


def choose(
    names: Iterable[str], variant: str | None, *, where: str, role: RoleOf = lambda _: None
) -> Chosen:
    """Return the files of a variant, by preference if it is None or blank.

    Raises:
        ModelNotFound: no such variant, or more than one (field `gguf_variant`); no model at all,
            or parts of it are missing (field `model_path`). `where` is the folder or repo.
    """
    names, requested, aside = frozenset(names), (variant or "").strip(), set[str]()
    while True:
        listing = _Listing(names, where, role, aside)
        model = listing.named(requested)
        if model.is_aside or role(model.first) in {None, MODEL}:
            break
        aside.update(model.parts.values())
    if not model.is_whole:
        present = set(model.parts.values())
        missing = (name for name in parts_of(model.first) if name not in present)
        count = model.count - len(model.parts)
        raise ModelNotFound.because(
            f"{where}: {_printable(model.first)} is split and "
            f"{_joined(missing, count)} {'is' if count == 1 else 'are'} missing beside it",
            field="model_path",
        )
    return listing.chosen(model)


def every(
    names: Iterable[str], *, where: str, role: RoleOf = lambda _: None
) -> tuple[list[Chosen], Chosen | None]:
    """Return complete variants, preferred ones first, and the one that `choose` prefers, if any.

    Raises:
        ModelNotFound: no complete model (field `model_path`).
    """
    names = frozenset(names)
    listing = _Listing(names, where, role, {n for n in names if role(n) not in {None, MODEL}})
    found = [listing.chosen(model) for model in listing.models if model.is_whole]
    if not found:
        choose(names, None, where=where, role=role)  # raises
    return found, found[0] if listing.models[0].is_whole else None


def matches(name: str, label: str) -> bool:
    """Does a file have exactly this label, or this text between word boundaries of its name?"""
    if label_of(name).lower() == label.lower():
        return True
    return not _LABEL.fullmatch(label) and _words(_stem(label)).search(_stem(name)) is not None


def label_of(name: str) -> str:
    """Return the quant label of a file in upper case, or its file name if it has none.

    The last label in the file name counts, else that of the nearest folder.
    """
    slash = name.rfind("/") + 1
    file = name[slash:]
    return _last_label(_stem(file)) or _folder_label(name[:slash]) or file


def parts_of(name: str) -> Iterator[str]:
    """Yield the names of all parts of a split model, in order; of a whole model its own name."""
    if (split := _SPLIT.fullmatch(name)) is None:
        yield name
        return
    for number in range(1, int(split["count"]) + 1):
        yield f"{split['prefix']}-{number:05d}-of-{split['count']}{split['end']}"


class _Listing:
    """A listing, sorted into models (preferred ones first), projectors and files set aside."""

    def __init__(
        self, names: Collection[str], where: str, role: RoleOf, aside: Collection[str]
    ) -> None:
        self._where = where
        self._projectors: list[str] = []
        self._unusable: list[str] = []
        models: dict[tuple[str, str], _Model] = {}
        for name in sorted(names):
            if name[-5:].lower() != ".gguf":
                continue
            if _UNUSABLE.search(name):
                self._unusable.append(name)
                continue
            slash = name.rfind("/") + 1
            folder, file = name[:slash], name[slash:]
            is_aside = name in aside or _is_aside(name, file, role)
            if not is_aside and (_PROJECTOR.match(file) or folder.lower().startswith("mmproj")):
                self._projectors.append(name)
                is_aside = True
            stem, number, count = file[:-5], 1, 1
            key = name, ""
            if split := _SPLIT.fullmatch(file):
                stem, number, count = split["prefix"], int(split["number"]), int(split["count"])
                key = f"{folder}{stem}{split['end']}", split["count"]
                if not 1 <= number <= count:
                    is_aside, stem, number, count, key = True, file[:-5], 1, 1, (name, "")
            if (model := models.get(key)) is None:
                label = _last_label(stem) or _folder_label(folder) or file
                model = models[key] = _Model(folder, stem, count, is_aside, label)
            model.parts[number] = name
        # root before sub-folders, whole models before left-over parts
        found = sorted(
            models.values(),
            key=lambda m: (m.folder.count("/"), m.folder, m.stem, not m.is_whole, m.first),
        )
        self._aside = [model for model in found if model.is_aside]
        in_order = [model for model in found if not model.is_aside]
        self._index = _index(in_order, self._aside)
        self.models = sorted(in_order, key=lambda model: _RANK.get(model.label, _OTHERS))
        self._folders = {model.folder for model in in_order}
        self._bases = {_base(model) for model in in_order} if self._projectors else set()

    def named(self, name: str) -> _Model:
        """Return the one model with this name; the preferred one if it is empty."""
        if name and (found := self._look_up(name)):
            return found
        if not self.models:
            files = [file for model in self._aside for file in model.parts.values()]
            files += self._unusable
            only = f", only {_joined(files, len(files))}" if files else ""
            raise ModelNotFound.because(
                f"{self._where} contains no .gguf model{only}", field="model_path"
            )
        if not name:
            return self.models[0]
        several: list[_Model] = []
        if not _LABEL.fullmatch(name):
            pattern = _words(name)
            several = [model for model in self.models if pattern.search(model.folder + model.stem)]
            if len(several) == 1:
                return several[0]
        listed = several or self.models
        known = _joined(map(self._variant, listed), len(listed))
        shown = repr(name[:_MAX_CHARACTERS])
        raise ModelNotFound.because(
            f"{shown} matches more than one variant of {self._where}: name one of {known}"
            if several
            else f"{self._where} has no variant {shown}; it has {known}",
            field="gguf_variant",
        )

    def chosen(self, model: _Model) -> Chosen:
        projector = None if model.is_aside else self._projector(model)
        return Chosen(tuple(model.parts.values()), projector, self._variant(model))

    def _look_up(self, name: str) -> _Model | None:
        return self._index.get(name) or self._index.get(name.lower())

    def _variant(self, model: _Model) -> str:
        """Return the shortest name that means this model."""
        names = (model.label, model.folder + model.label)
        return next((n for n in names if self._look_up(n.strip()) is model), model.first)

    def _projector(self, model: _Model) -> str | None:
        """Return the projector of a model: beside it, above it, or in a folder without models.

        The most similar name wins, then 16 bits; one with the name of another model never does.
        """
        base = _base(model)
        ranked: list[tuple[int, int, bool, str]] = []
        for name in self._projectors:
            folder = name[: name.rfind("/") + 1]
            owner = self._owner(name) or base
            is_above = model.folder.startswith(folder)
            if (is_above or folder not in self._folders) and f"{base} ".startswith(f"{owner} "):
                distance = len(model.folder) - len(folder) if is_above else len(model.folder) + 1
                is_half = name.lower().endswith("-f16.gguf")
                ranked.append((distance, -len(owner), not is_half, name))
        return min(ranked)[-1] if ranked else None

    def _owner(self, projector: str) -> str | None:
        """Return the longest name of a model that a projector's name begins with."""
        file = projector[projector.rfind("/") + 1 : -5].lower()
        words = [word for word in _SEPARATORS.split(file) if word and word != "mmproj"]
        starts = (" ".join(words[:end]) for end in range(len(words), 0, -1))
        return next((start for start in starts if start in self._bases), None)


def _is_aside(name: str, file: str, role: RoleOf) -> bool:
    """Return whether a file is no model; its header can tell more than the name of a part."""
    if _ASIDE.search(name):
        return True
    is_data = "imatrix" in file.lower() and (
        file[-13:-5].lower() == ".imatrix" or _last_label(file) is None
    )
    return (is_data or _PART.search(name) is not None) and role(name) != MODEL


def _index(models: list[_Model], aside: list[_Model]) -> dict[str, _Model]:
    """Map every name to its model: a more exact name wins, then an earlier model. What is set aside
    has only its paths. Names in lower case are for comparisons without case.
    """
    paths = [(path, model) for model in (*models, *aside) for path in model.parts.values()]
    paths += [(path[:-5], model) for path, model in paths]
    paths += [(model.folder + model.stem, model) for model in models]
    labels = [(model.folder + model.label, model) for model in models if model.folder]
    labels += [(model.label, model) for model in models]
    index = dict(reversed(paths))
    for name, model in (*paths, *labels):
        index.setdefault(name.lower(), model)
    return index


def _base(model: _Model) -> str:
    """Return the words of a model's name before its quant label."""
    label = model.stem.upper().rfind(model.label)
    name = model.stem if label < 0 else model.stem[:label]
    return " ".join(filter(None, _SEPARATORS.split(name.lower())))


@lru_cache(maxsize=256)
def _words(text: str) -> re.Pattern[str]:
    """Compile a pattern for text between word boundaries; after `UD-` it is another label."""
    boundaries = rf"(?<![A-Za-z0-9_])(?<!UD-){re.escape(text)}(?![A-Za-z0-9_])"
    return re.compile(boundaries, re.IGNORECASE | re.ASCII)


def _last_label(text: str) -> str | None:
    found = _LABEL.findall(text)
    return str(found[-1]).upper() if found else None


@lru_cache(maxsize=256)
def _folder_label(folder: str) -> str | None:
    """Return the label of the nearest of these folders."""
    return next(filter(None, map(_last_label, reversed(folder.split("/")))), None)


def _stem(name: str) -> str:
    if split := _SPLIT.fullmatch(name):
        return split["prefix"]
    return name[:-5] if name[-5:].lower() == ".gguf" else name


def _joined(names: Iterable[str], count: int) -> str:
    """Return the first of `count` names, for an error of bounded length."""
    shown = list(islice(names, _MAX_LISTED))
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return ", ".join(map(_printable, shown)) + more


def _printable(name: str) -> str:
    """Return a name from a listing, which anyone may have written, shortened and escaped."""
    name = name[:_MAX_CHARACTERS]
    return name if name.isprintable() else repr(name)[1:-1]
