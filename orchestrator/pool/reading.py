"""From the tables of a catalogue to its values, with every mistake on the way.

A mistake does not end the reading, so that the first one in the file can be reported: what has one
gets its default. Values are checked by their rows; this module knows what the rows cannot: which
keys belong together, where relative paths start, and what the pool gives to its models.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import InvalidRequest, MalformedRequest, OrchestratorError
from orchestrator.pool import values
from orchestrator.pool.entries import (
    ELSEWHERE,
    KEY,
    MODEL,
    POOL,
    REFUSED,
    Entry,
    KeyEntry,
    PoolSettings,
    Preset,
)
from orchestrator.pool.places import KeyPath
from orchestrator.settings.checks import malformed, unknown_field
from orchestrator.settings.fields import SETTINGS, Setting
from orchestrator.settings.reference import of_address, split_reference
from orchestrator.settings.request import LoadRequest

_NOT_OURS: Final = {
    **dict.fromkeys(REFUSED, "a pool decides this, so leave it out"),
    **dict.fromkeys(
        ELSEWHERE.keys() - MODEL.keys(), "it belongs to an entry with base_url, so leave it out"
    ),
}
_NOT_THEIRS: Final = {
    **_NOT_OURS,
    **dict.fromkeys(
        MODEL.keys() - ELSEWHERE.keys(), "it belongs to an entry with model_path, so leave it out"
    ),
    "model_path": "an entry has either model_path or base_url, so leave one out",
}
_NOT_OVER_HTTP: Final = {
    **_NOT_OURS,
    **dict.fromkeys(
        ELSEWHERE.keys() - MODEL.keys(), "over HTTP no other server can be added, so leave it out"
    ),
}
NOT_IN_PRESETS: Final = {
    **dict.fromkeys(
        ("model", "messages", "prompt", "input"), "a preset holds defaults, so leave it out"
    ),
    "presets": "a preset has no presets, so leave it out",
}
_TABLES: Final = ("pool", "models", "keys")
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Mistake:
    """An error, the table it is in, and the key there; None for the table as a whole."""

    table: KeyPath
    key: str | None
    error: OrchestratorError

    @property
    def path(self) -> KeyPath:
        return self.table if self.key is None else (*self.table, self.key)


@dataclass(slots=True)
class Reading:
    """One pass over a catalogue.

    Args:
        folder: Where relative paths start; None leaves paths as they are.
    """

    folder: Path | None
    mistakes: list[Mistake] = field(default_factory=list)

    def tables(self, given: object) -> tuple[PoolSettings, list[Entry], list[KeyEntry]]:
        """Read a whole catalogue."""
        top = self._table((), None, given)
        for key in top:
            if key not in _TABLES:
                self._add((), key, unknown_field(key, _TABLES))
        pool, models, keys = (self._table((), key, top.get(key, {})) for key in _TABLES)
        settings = PoolSettings(**self._values(("pool",), pool, POOL))
        entries = [self.entry(name, one, settings) for name, one in models.items()]
        return settings, entries, [self._key(name, one) for name, one in keys.items()]

    def entry(
        self, name: str, given: object, pool: PoolSettings, *, is_remote: bool = False
    ) -> Entry:
        """Read one entry; `is_remote` if a caller over HTTP gives it."""
        path = ("models", name)
        self._name(path, name)
        members = self._table(("models",), name, given)
        is_elsewhere = members.get("base_url") is not None and not is_remote
        if is_elsewhere:
            read = self._values(path, members, ELSEWHERE, _NOT_THEIRS)
            kind, request = read.pop("kind", "chat"), None
            read["upstream_model"] = read.get("upstream_model") or name
            if (key_file := read.get("api_key_file")) is not None:
                read["api_key_file"] = Path(self._located(key_file))
        else:
            refused = _NOT_OVER_HTTP if is_remote else _NOT_OURS
            known = MODEL.keys() if "model_path" in members else MODEL.keys() | ELSEWHERE.keys()
            read = self._values(path, members, MODEL, refused, known)
            load = {key: read.pop(key) for key in SETTINGS if key in read}
            kind, request = load.get("kind", "chat"), self._request(path, load, pool)
        presets = self._presets((*path, "presets"), read.pop("presets", {}))
        return Entry(name=name, kind=kind, request=request, presets=presets, **read)

    def _request(
        self, table: KeyPath, load: dict[str, Any], pool: PoolSettings
    ) -> LoadRequest | None:
        if "model_path" not in load:
            if not self._has_mistake(table):  # it may be the key that is misspelt
                message = "model_path is required, or base_url for a server elsewhere"
                self._add(table, "model_path", MalformedRequest.because(message))
            return None
        load["model_path"] = self._model(load["model_path"])
        if load.get("mmproj_path") is not None:
            load["mmproj_path"] = self._located(load["mmproj_path"])
        given: dict[str, Any] = {
            "llama_extra_args": (),  # nothing is inherited
            "idle_ttl_s": pool.idle_ttl_s or None,
            "cache_ram_mib": pool.cache_ram_mib if load.get("kind", "chat") == "chat" else None,
        }
        given |= {key: value for key, value in load.items() if value is not None}
        try:
            return LoadRequest(**given)
        except InvalidRequest as error:
            self._add(table, error.field, error)
            return None

    def _presets(self, table: KeyPath, given: Mapping[str, Any]) -> tuple[Preset, ...]:
        return tuple(self._preset(table, name, one) for name, one in _named(given).items())

    def _preset(self, table: KeyPath, name: str, given: object) -> Preset:
        self._name((*table, name), name)
        texts: list[str] = []
        for key, value in sorted(self._table(table, name, given).items()):
            with self._at((*table, name), key):
                if (why := NOT_IN_PRESETS.get(key)) is not None:
                    raise _refused(key, why)
                texts.append(f"{json.dumps(key)}: {_json(key, value)}")
        return Preset(name, f"{{{', '.join(texts)}}}")

    def _key(self, name: str, given: object) -> KeyEntry:
        path = ("keys", name)
        self._name(path, name)
        read = self._values(path, self._table(("keys",), name, given), KEY)
        if "key_file" not in read and not self._has_mistake(path):
            self._add(path, "key_file", MalformedRequest.because("key_file is required"))
        key_file = Path(self._located(read.pop("key_file", "")))
        return KeyEntry(name=name, key_file=key_file, **read)

    def _values(
        self,
        table: KeyPath,
        given: Mapping[str, Any],
        rows: Mapping[str, Setting],
        refused: Mapping[str, str] | None = None,
        known: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Return the values of the keys with a row, in normal form.

        Args:
            refused: Why other keys are refused.
            known: Keys that an unknown one may be meant as; default: those with a row.
        """
        read: dict[str, Any] = {}
        for key, value in given.items():
            with self._at(table, key):
                if key in rows:
                    read[key] = rows[key].normal(key, value)
                elif why := (refused or {}).get(key):
                    raise _refused(key, why)
                else:
                    raise unknown_field(key, known or rows)
        return read

    def _table(self, table: KeyPath, key: str | None, value: object) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return _named(value)
        self._add(table, key, malformed(key or "a catalogue", "a table", value))
        return {}

    def _name(self, path: KeyPath, name: str) -> None:
        with self._at(path, None):
            values.name("name", name)

    def _model(self, text: str) -> str:
        """Return the path of a local model; a repo and an address of the Hub stay as they are."""
        if self.folder is None or of_address(text) != (text, None):
            return text
        path = self._located(text)
        return path if split_reference(text) is None or os.path.exists(path) else text

    def _has_mistake(self, table: KeyPath) -> bool:
        return any(mistake.path[: len(table)] == table for mistake in self.mistakes)

    def _located(self, text: str) -> str:
        return text if self.folder is None else str(self.folder / os.path.expanduser(text))

    @contextlib.contextmanager
    def _at(self, table: KeyPath, key: str | None) -> Iterator[None]:
        try:
            yield
        except InvalidRequest as error:
            self._add(table, key, error)

    def _add(self, table: KeyPath, key: str | None, error: OrchestratorError) -> None:
        self.mistakes.append(Mistake(table, key, error))


def _named(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the members by text, which keys of a Python mapping need not be."""
    return {k if isinstance(k, str) else type(k).__name__: value for k, value in given.items()}


def _refused(key: str, why: str) -> InvalidRequest:
    return InvalidRequest.because(f"{key} is refused: {why}", field=key)


def _json(key: str, value: object) -> str:
    try:
        text = json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{key} is not JSON, which has no dates, no inf and no nan: write another value"
        raise InvalidRequest.because(message, field=key) from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for one in level for inner in _inside(one)]
    if level:  # it could be written, but perhaps not read again
        message = f"{key} is nested too deeply: at most {_MAX_DEPTH} levels"
        raise InvalidRequest.because(message, field=key)
    return text


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
