"""The catalogue of a pool: its models by name, from a TOML file or a mapping.

Pure but for reading that file. A catalogue never changes: a re-read, an entry added at run time and
a removed one each make a new one, and `difference` says what that means for the servers. A mistake
changes nothing: it is an error with file, line and name.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from orchestrator.base.paths import names_of_own
from orchestrator.base.record import Record
from orchestrator.errors import InvalidRequest, ModelNotFound, NameTaken, OrchestratorError
from orchestrator.pool.entries import Entry, KeyEntry, PoolSettings, Preset
from orchestrator.pool.places import KeyPath, Places, dotted, lines_of
from orchestrator.pool.reading import Mistake, Reading
from orchestrator.pool.values import by_device
from orchestrator.settings.fields import StrPath

_SYNTAX: Final = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
_MAX_CHARACTERS: Final = 200


@dataclass(frozen=True, slots=True)
class Match:
    """What a name stands for: an entry, and the preset of it where the name has one."""

    entry: Entry
    preset: Preset | None = None


@dataclass(frozen=True, slots=True)
class Changes(Record):
    """Names of entries, in the order of their catalogue."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The models of a pool; see docs/catalogue.md.

    Attributes:
        models: Entries by name.
        keys: Keys by name.
        file: The file it was read from.
        places: Where its values stand in that file.
    """

    pool: PoolSettings
    models: Mapping[str, Entry]
    keys: Mapping[str, KeyEntry]
    file: Path | None = None
    places: Places = field(default=Places(), compare=False, repr=False)
    _names: Mapping[str, Entry] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = {name: one for one in self.models.values() for name in (one.name, *one.aliases)}
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))
        object.__setattr__(self, "keys", MappingProxyType(dict(self.keys)))
        object.__setattr__(self, "_names", MappingProxyType(names))

    def find(self, asked: str) -> Match | None:
        """Return what a request means by a name: an entry, an alias, or either with `:preset`."""
        if (entry := self._names.get(asked)) is not None:
            return Match(entry)
        name, _, wanted = asked.rpartition(":")  # no preset has a colon in its name
        if (entry := self._names.get(name)) is not None:
            return next((Match(entry, one) for one in entry.presets if one.name == wanted), None)
        return None

    @property
    def default(self) -> Entry | None:
        """The entry for requests that name none: `default` of the pool, or the only one."""
        if self.pool.default is not None:
            return self.models.get(self.pool.default)
        return next(iter(self.models.values())) if len(self.models) == 1 else None

    def match(self, name: str | None) -> Match:
        """Return the entry that a caller means; None is the default.

        Raises:
            ModelNotFound: it lists what there is.
            InvalidRequest: there is no default.
        """
        if name is None:
            if (entry := self.default) is not None:
                return Match(entry)
            names = ", ".join(self.models) or "none"
            message = f"this pool has no default model: name one of {names}"
            raise InvalidRequest.because(message, field="model")
        if (match := self.find(name)) is None:
            raise no_model(name, self.models)
        return match

    def only(self, names: Collection[str] | None) -> Catalogue:
        """Return the catalogue without the other entries; None = with all."""
        if names is None:
            return self
        default = self.pool.default if self.pool.default in names else None
        models = {name: one for name, one in self.models.items() if name in names}
        return replace(self, models=models, pool=replace(self.pool, default=default))


def no_model(asked: str, names: Iterable[str]) -> ModelNotFound:
    """Return the error for a name that nothing has; it lists what there is."""
    listed = ", ".join(names) or "none"
    message = f"there is no model {asked[:_MAX_CHARACTERS]!r}; the models are: {listed}"
    return ModelNotFound.because(message, field="model")


def read_catalogue(path: str | os.PathLike[str]) -> Catalogue:
    """Read the catalogue in a TOML file.

    Raises:
        InvalidCatalogue: it cannot be read, or has a mistake.
    """
    tables, file, places = tables_in(path)
    return _catalogue(tables, file.parent, file, places)


def tables_in(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Path, Places]:
    """Return the tables of a TOML file, that file, and where its values stand.

    Raises:
        InvalidCatalogue: it cannot be read, or is no TOML.
    """
    shown = os.fspath(path)
    file = Path(os.path.abspath(os.path.expanduser(shown)))
    places = Places(shown)
    try:
        places = Places(shown, names=names_of_own(file, file.name))
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise places.error("this is not UTF-8 text", line=line) from None  # it has the text
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        why = getattr(error, "strerror", None) or "the name cannot be used"
        raise places.error(f"cannot be read ({why}): give the file of a catalogue") from error
    return _parsed(text, places), file, replace(places, lines=lines_of(text))


def catalogue_of(
    mapping: Mapping[str, Any], folder: str | os.PathLike[str] = os.curdir
) -> Catalogue:
    """Return the catalogue of the same tables as a mapping.

    Args:
        folder: Where relative paths start.

    Raises:
        InvalidCatalogue: it has a mistake.
    """
    return _catalogue(mapping, Path(os.path.abspath(folder)), None, Places())


def reader_of(
    models: StrPath | Mapping[str, Any], folder: StrPath = os.curdir
) -> Callable[[], Catalogue]:
    """Return what reads a catalogue, now and again: a file, or tables whose paths start here."""
    if isinstance(models, Mapping):
        return partial(catalogue_of, models, folder)
    return partial(read_catalogue, models)


def with_entry(
    catalogue: Catalogue, name: str, fields: Mapping[str, Any], *, is_remote: bool
) -> Catalogue:
    """Add an entry at run time. Relative paths start in the working directory.

    Args:
        is_remote: Whether a caller over HTTP adds it. Then it has neither `base_url` nor
            `api_key_file`, and its paths stay as they are, for the rules of HTTP callers.

    Raises:
        NameTaken: an entry or an alias has its name, or a name of it; `field` says which.
        InvalidRequest: the name or a field cannot be used.
    """
    path: KeyPath = ("models", name)
    if name in catalogue.models:
        message = f"{dotted((name,))} is already the name of a model: choose another name"
        raise NameTaken.because(message, field="name")
    reading = Reading(None if is_remote else Path.cwd())
    entry = reading.entry(name, fields, catalogue.pool, is_remote=is_remote)
    made = replace(catalogue, models={**catalogue.models, name: entry})
    for mistake in (*reading.mistakes, *_conflicts(made.models.values()), *_pins(made)):
        where = mistake.path[len(path) :] or ("name",)
        problem = replace(mistake.error.problem, field=dotted(where))
        raise type(mistake.error)(problem) from mistake.error
    return made


def with_pin(catalogue: Catalogue, name: str, *, pinned: bool) -> Catalogue:
    """Pin an entry of ours, or unpin it. Raises InvalidRequest: one of its group is pinned."""
    entry = catalogue.models[name]
    assert entry.request is not None  # noqa: S101 (the caller has checked it)
    entry = replace(entry, request=replace(entry.request, pinned=pinned))
    made = replace(catalogue, models={**catalogue.models, name: entry})
    for mistake in _pins(made):
        raise mistake.error
    return made


def without_entry(catalogue: Catalogue, name: str) -> Catalogue:
    """Remove an entry; what names it elsewhere then names nothing. Raises KeyError."""
    models = dict(catalogue.models)
    del models[name]
    return replace(catalogue, models=models)


def merge(reread: Catalogue, runtime: Mapping[str, Entry]) -> Catalogue:
    """Add the entries of run time to a catalogue that was read again.

    Raises:
        InvalidCatalogue: the file has a name of theirs, or pins too much beside them: it says
            where. Neither wins, because both are in use.
    """
    made = replace(reread, models={**reread.models, **runtime})
    entries = (*runtime.values(), *reread.models.values())
    _raise_first(reread.places, [*_conflicts(entries, added=runtime), *_pins(made, entries)])
    return made


def difference(old: Catalogue, new: Catalogue) -> Changes:
    """Return what a new catalogue changes. Of `changed`, `Entry.reloads` says what needs a new
    server: the rest applies at once.
    """
    common = [name for name in new.models if name in old.models]
    return Changes(
        added=tuple(name for name in new.models if name not in old.models),
        changed=tuple(name for name in common if old.models[name] != new.models[name]),
        removed=tuple(name for name in old.models if name not in new.models),
        unchanged=tuple(name for name in common if old.models[name] == new.models[name]),
    )


def check_pins(
    catalogue: Catalogue, budget: Mapping[str, int], need: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse pinned models that do not fit together.

    Args:
        budget: MiB by device.
        need: MiB by device, by entry; those of entries that are not pinned do not count.

    Raises:
        InvalidCatalogue: names the first entry that is too much.
    """
    mistakes = _beyond(catalogue.models.values(), budget, lambda one: need.get(one.name, {}))
    _raise_first(catalogue.places, list(mistakes))


def _catalogue(
    given: Mapping[str, Any], folder: Path, file: Path | None, places: Places
) -> Catalogue:
    reading = Reading(folder)
    pool, entries, keys = reading.tables(given)
    models = {entry.name: entry for entry in entries}
    made = Catalogue(pool, models, {key.name: key for key in keys}, file, places)
    mistakes = [*reading.mistakes, *_conflicts(entries), *_pins(made)]
    if all(mistake.key != "aliases" for mistake in mistakes):  # else it is unknown what is named
        mistakes += _unknown_names(made)
    _raise_first(places, mistakes)
    return _with_names_of_entries(made)


def _raise_first(places: Places, mistakes: list[Mistake]) -> None:
    if mistakes:
        first = min(mistakes, key=lambda one: places.line(one.path) or 0)
        error = first.error
        raise places.error(error.message, first.table, first.key) from error


def _parsed(text: str, places: Places) -> dict[str, Any]:
    line: int | None = None
    try:
        return tomllib.loads(text)
    except RecursionError:
        what = "this is nested too deeply"
    except ValueError as error:  # also a number of too many digits
        what = str(error)
        if found := _SYNTAX.fullmatch(what):
            what, line = found[1], int(found[2] or text.count("\n") + 1)
    raise places.error(what[:_MAX_CHARACTERS], line=line)


def _conflicts(entries: Iterable[Entry], added: Collection[str] = ()) -> Iterator[Mistake]:
    """Yield a mistake for every second thing of one name, in the order of the entries.

    Args:
        added: Names of the entries that were added at run time.
    """
    owners: dict[str, Entry] = {}
    order: dict[int, int] = {}
    for number, one in enumerate(entries):
        order[id(one)], own = number, set[str]()
        for name, key in ((one.name, None), *((alias, "aliases") for alias in one.aliases)):
            owner = owners.setdefault(name, one)
            if owner is not one or name in own:
                yield Mistake(("models", one.name), key, _taken(name, owner, one, added))
            own.add(name)
    for alias, one in owners.items():
        name, _, preset = alias.rpartition(":")
        base = owners.get(name)
        if base is None or all(preset != other.name for other in base.presets):
            continue
        if order[id(base)] <= order[id(one)]:
            yield Mistake(("models", one.name), "aliases", _taken(alias, base, one, added))
        else:
            table = ("models", base.name, "presets")
            yield Mistake(table, preset, _taken(alias, one, base, added))


def _taken(name: str, owner: Entry, one: Entry, added: Collection[str]) -> OrchestratorError:
    shown = dotted((name,))
    if owner is one:
        message = f"{shown} is already a name of this entry: choose another name"
        return InvalidRequest.because(message, field="aliases")
    theirs = dotted(("models", owner.name)) + ", which was added at run time" * (
        owner.name in added
    )
    message = f"{shown} is already a name of {theirs}: choose another name"
    return NameTaken.because(message, field="aliases")


def _unknown_names(made: Catalogue) -> Iterator[Mistake]:
    """Yield a mistake for every name that must be an entry's, and is not."""
    default = () if made.pool.default is None else (made.pool.default,)
    lists: list[tuple[KeyPath, str, tuple[str, ...]]] = [
        (("pool",), "preload", made.pool.preload),
        (("pool",), "default", default),
        *((("keys", key.name), "models", key.models or ()) for key in made.keys.values()),
        *((("models", one.name), "spillover", one.spillover) for one in made.models.values()),
    ]
    for table, key, names in lists:
        for name in names:
            shown, match = dotted((name,)), made.find(name)
            if match is None or match.preset is not None:
                message = f"{key} names {shown}, which is no entry and no alias of one"
            elif key == "preload" and match.entry.base_url is not None:
                message = f"{key} names {shown}, which has a base_url: there is nothing to load"
            elif key == "spillover" and match.entry.base_url is None:
                message = f"spillover names {shown}, which has no base_url: name another server"
            else:
                continue
            yield Mistake(table, key, InvalidRequest.because(message, field=key))


def _with_names_of_entries(made: Catalogue) -> Catalogue:
    """Return a catalogue that names entries by their own name only."""

    def own(names: Iterable[str]) -> tuple[str, ...]:
        found = [match.entry.name for name in names if (match := made.find(name)) is not None]
        return tuple(dict.fromkeys(found))

    pool = made.pool
    default = next(iter(own([pool.default])), None) if pool.default else None
    keys = {
        name: key if key.models is None else replace(key, models=own(key.models))
        for name, key in made.keys.items()
    }
    models = {
        name: replace(one, spillover=own(one.spillover)) if one.spillover else one
        for name, one in made.models.items()
    }
    pool = replace(pool, preload=own(pool.preload), default=default)
    return replace(made, pool=pool, models=models, keys=keys)


def _pins(made: Catalogue, entries: Iterable[Entry] | None = None) -> Iterator[Mistake]:
    """Yield what is known to be wrong with pins without asking a machine."""
    entries = list(made.models.values() if entries is None else entries)
    pinned: dict[str, Entry] = {}
    for one in entries:
        if one.pinned and one.group and (first := pinned.setdefault(one.group, one)) is not one:
            shown = dotted((first.name,))
            message = f"{shown} of the same group is already pinned: pin one of a group"
            error = InvalidRequest.because(message, field="pinned")
            yield Mistake(("models", one.name), "pinned", error)
    yield from _beyond(entries, by_device(made.pool.memory), lambda one: by_device(one.memory))


def _beyond(
    entries: Iterable[Entry],
    budget: Mapping[str, int],
    need_of: Callable[[Entry], Mapping[str, int]],
) -> Iterator[Mistake]:
    """Yield a mistake for every pinned entry that is too much beside those before it."""
    total: Counter[str] = Counter()
    for one in entries:
        if not one.pinned:
            continue
        for device, mib in need_of(one).items():
            total[device] += mib
            if device in budget and total[device] > budget[device]:
                where = f" of {device}" if device else ""
                message = (
                    f"with it the pinned models need {total[device]} MiB{where}, and the budget "
                    f"is {budget[device]} MiB: pin fewer, or raise memory"
                )
                error = InvalidRequest.because(message, field="pinned")
                yield Mistake(("models", one.name), "pinned", error)
