"""What a catalogue holds, as values; the rows of their fields define its keys.

As in `settings/fields.py`, checks, schema and reference derive from a row. All values are
read-only. Sizes are in MiB.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from orchestrator.pool import values
from orchestrator.pool.values import Memory
from orchestrator.settings import checks
from orchestrator.settings.drafting import OFF
from orchestrator.settings.fields import SETTINGS, Kind, Setting, setting
from orchestrator.settings.reference import split_reference
from orchestrator.settings.request import LoadRequest

_REQUIRED: Final[Any] = dataclasses.MISSING
_MAX: Final = 1 << 30
_IDENTITY: Final = (
    *(name for name, row in SETTINGS.items() if row.is_identity),
    *("revision", "mmproj_path", "llama_extra_args"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The table `[pool]`. Names in it are those of entries, whichever name was written."""

    memory: Memory | Literal["auto"] = setting(
        values.budget,
        "budget of the first device, or of each device in a table; auto = what is free",
        default=values.AUTO,
    )
    headroom: int = setting(
        values.mib_of, "what stays free on each device whose budget is auto", default=1024
    )
    max_resident: int = setting(
        checks.integer,
        "models that are resident at the same time; 0 = as many as fit",
        default=0,
        bounds=(0, _MAX),
    )
    max_wait_s: float = setting(
        values.seconds_or_zero,
        "how long requests of resident models may keep those of another model waiting, seconds",
        default=30.0,
    )
    min_resident_s: float = setting(
        values.seconds_or_zero, "how long a loaded model stays at least, seconds", default=5.0
    )
    max_waiting: int = setting(
        checks.integer,
        "requests that may wait, of all models together",
        default=256,
        bounds=(0, _MAX),
    )
    held_s: float = setting(
        values.seconds_or_zero, "how long a request waits at most, seconds", default=600.0
    )
    idle_ttl_s: float = setting(
        values.seconds_or_zero,
        "unload a model without idle_ttl_s after this long without use, seconds; 0 = never",
        default=900.0,
    )
    cache_ram_mib: int = setting(
        checks.integer,
        "host memory for cached prompts of a chat model without cache_ram_mib, MiB",
        default=512,
        bounds=SETTINGS["cache_ram_mib"].bounds,
    )
    preload: tuple[str, ...] = setting(
        values.names, "models to load at the start, in this order", default=()
    )
    default: str | None = setting(
        checks.line, "the model for requests that name none; with one model that one"
    )


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults of a request: the same server under another name.

    Attributes:
        name: Its name after the colon.
        text: The members as a JSON object; a text, because nothing in it can be changed.
    """

    name: str
    text: str

    @property
    def members(self) -> dict[str, Any]:
        """The members, as a new object."""
        made: dict[str, Any] = json.loads(self.text)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model: of ours, with a load request, or of another server, with a `base_url`.

    Attributes:
        request: What is loaded, with the pool's defaults in it; None for another server.
        kind: What the server is for; the request's where there is one.
    """

    name: str
    request: LoadRequest | None = None
    kind: Kind = "chat"
    aliases: tuple[str, ...] = setting(values.names, "other names of this entry", default=())
    presets: tuple[Preset, ...] = setting(
        values.mapping, "tables of defaults for requests, by name", default=()
    )
    weight: float = setting(
        values.weight,
        "of two models that wait, the larger weight times wait goes first",
        default=1.0,
    )
    memory: Memory | None = setting(
        values.need, "what it needs in all, believed; a size or a table by device"
    )
    group: str | None = setting(checks.line, "of the models of a group one is resident at most")
    spillover: tuple[str, ...] = setting(
        values.names,
        "entries with base_url that take requests while there is no room for this one",
        default=(),
    )
    base_url: str | None = setting(
        values.base_url, "an OpenAI-compatible server, which is not ours to start"
    )
    api_key_file: Path | None = setting(values.file, "file with the key for that server")
    upstream_model: str | None = setting(
        checks.line, "the model's name there; default: the entry's name"
    )

    @property
    def pinned(self) -> bool:
        """Whether it stays resident: neither evicted nor unloaded when idle."""
        return self.request is not None and self.request.pinned

    def reloads(self, other: Entry) -> bool:
        """Return whether `other` needs another server than this entry.

        Everything else in which two entries differ applies at once. Files are not compared: a load
        does that (`settings/target.py`).
        """
        return self._server() != other._server()

    def _server(self) -> tuple[object, ...]:
        request = self.request
        if request is None:
            return self.base_url, self.upstream_model
        repo, _ = split_reference(request.model_path) or (None, None)
        drafting = None if request.speculative_type == OFF else request.speculative_type
        variant = request.variant and request.variant.upper()
        model = (repo and repo.lower()) or request.model_path
        return model, variant, drafting, *(request.effective(name) for name in _IDENTITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """One table of `[keys]`: a key and what it may do.

    Attributes:
        models: Names of entries; None = all.
    """

    name: str
    key_file: Path = setting(values.file, "file with the key", default=_REQUIRED)
    models: tuple[str, ...] | None = setting(
        values.some_names, "models that the key sees and uses; left out = all"
    )
    admin: bool = setting(
        checks.boolean, "whether it may change things, and read metrics", default=False
    )
    weight: float = setting(
        values.weight, "its share where several keys wait for one model", default=1.0
    )


def _rows_of(kind: type) -> dict[str, Setting]:
    return {f.name: f.metadata["setting"] for f in fields(kind) if "setting" in f.metadata}


REFUSED: Final = ("on_busy", "load_request_id", "prefetch", "force_reload", "restore_previous")
"""Fields of a load that a catalogue may not have."""

POOL: Final = _rows_of(PoolSettings)
KEY: Final = _rows_of(KeyEntry)
_OWN: Final = _rows_of(Entry)
_ELSEWHERE: Final = ("base_url", "api_key_file", "upstream_model")

_IN_A_POOL: Final = {
    "llama_extra_args": "flags of llama-server; nothing is inherited",
    "speculative_type": "drafting: default, off, ngram-mod or a type the server lists; null = off",
    "idle_ttl_s": "unload after this long without use, seconds; default: the pool's",
    "cache_ram_mib": "host memory for cached prompts, MiB; default: the pool's for chat, else 0",
    "pinned": "once resident it stays: neither evicted nor unloaded when idle",
}

MODEL: Final[dict[str, Setting]] = {
    **{
        name: replace(row, help=_IN_A_POOL.get(name, row.help))
        for name, row in SETTINGS.items()
        if name not in REFUSED
    },
    **{name: row for name, row in _OWN.items() if name not in _ELSEWHERE},
}
"""Keys of an entry with `model_path`."""

ELSEWHERE: Final[dict[str, Setting]] = {
    name: MODEL.get(name) or _OWN[name]
    for name in (*_ELSEWHERE, "kind", "aliases", "presets", "weight")
}
"""Keys of an entry with `base_url`."""
