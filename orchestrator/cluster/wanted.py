"""What `build_app` is asked for, checked: values and catalogues, without Ray.

`serve run` passes every argument as text, so a text stands for the number or the switch in it.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, cast

from orchestrator.errors import InvalidRequest
from orchestrator.http.guards.origins import checked_hosts
from orchestrator.pool.catalogue import Catalogue, catalogue_of, read_catalogue, tables_in
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime.calls import Facade
from orchestrator.server.slot import LONGEST_NAME
from orchestrator.settings.checks import unknown_field
from orchestrator.settings.memory import HOST

DRAIN_S: Final = 60.0
"""Default of `drain_timeout_s`: a replica that is stopped finishes the answers it has begun."""
MARGIN_S: Final = 5.0
_SLOTS: Final = 4  # of a server whose entry does not say it
_OWN: Final = ("parts", "idle_ttl_s", "self")
_OPTIONS: Final = {
    name: given.default
    for name, given in inspect.signature(Facade.__init__).parameters.items()
    if name not in _OWN
} | {"memory": "auto"}
"""Those of a pool, with their defaults."""


@dataclass(frozen=True, slots=True)
class Models:
    """The tables of a catalogue, and where its relative paths start."""

    tables: Mapping[str, Any]
    folder: str

    @classmethod
    def of(cls, given: object) -> Self:
        """Read the file of a catalogue, or take its tables.

        Raises:
            InvalidCatalogue: the file cannot be read, or is no TOML.
            InvalidRequest: this is neither a file nor tables (field `models`).
        """
        match given:
            case {"tables": Mapping() as tables, "folder": str() as folder, **rest} if not rest:
                return cls(tables, folder)  # as `as_dict` has written it
            case Mapping():
                return cls(given, str(Path.cwd()))
            case str() | Path():
                read_catalogue(given)  # of a mistake it knows the line
                tables, file, _ = tables_in(given)
                return cls(tables, str(file.parent))
        message = f"models is {given!r}: give the file of a catalogue, or its tables"
        raise InvalidRequest.because(message, field="models")

    def as_dict(self) -> dict[str, Any]:
        return {"tables": self.tables, "folder": self.folder}

    def read(self) -> Catalogue:
        """Return the catalogue. Raises InvalidCatalogue."""
        return catalogue_of(self.tables, self.folder)


@dataclass(frozen=True, slots=True)
class Catalogues:
    """Which models a node has: those whose labels it has, else those of all.

    Attributes:
        by_labels: The first of them whose labels a node has is its catalogue.
    """

    models: Models
    by_labels: tuple[tuple[Mapping[str, str], Models], ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Read `models` and `catalogues`, which has catalogues by labels (`"gpu=a100,zone=b"`).

        Raises:
            InvalidCatalogue, InvalidRequest: one of them cannot be used.
        """
        if unknown := next((name for name in given if name not in ("models", "catalogues")), None):
            raise unknown_field(unknown, ("models", "catalogues"))
        if "models" not in given:
            message = "models is missing: give the file of a catalogue, or its tables"
            raise InvalidRequest.because(message, field="models")
        others = _mapping("catalogues", given.get("catalogues") or {})
        return cls(
            Models.of(given["models"]),
            tuple((_labels(labels), Models.of(models)) for labels, models in others.items()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as the `user_config` of a deployment, which `of` reads."""
        others = {
            ",".join(f"{name}={value}" for name, value in labels.items()): models.as_dict()
            for labels, models in self.by_labels
        }
        return {"models": self.models.as_dict(), "catalogues": others}

    @property
    def all(self) -> tuple[Models, ...]:
        return (self.models, *(models for _, models in self.by_labels))

    def on(self, node: Mapping[str, str]) -> Models:
        """Return the models of a node with these labels."""
        for labels, models in self.by_labels:
            if labels.items() <= node.items():
                return models
        return self.models


@dataclass(frozen=True, slots=True)
class Wanted:
    """The arguments of `build_app`.

    Attributes:
        resources: Custom resources that a replica takes, by name.
        num_gpus: GPUs of a replica; of a fraction its pool has that part of the memory.
        fronts: How many replicas route requests.
        held_s: How long a request waits for a replica, seconds.
        claim_s: How long a replica waits for its slot, seconds.
        options: Of a pool.
    """

    catalogues: Catalogues
    num_replicas: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    fronts: int = 2
    held_s: float = 60.0
    claim_s: float = 120.0
    allowed_hosts: tuple[str, ...] = ()
    slot: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Check the arguments and read the catalogues. Nothing is started.

        Raises:
            InvalidCatalogue: a catalogue has a mistake; the message says where.
            InvalidRequest: an argument cannot be used; `field` names it.
        """
        given = dict(_mapping("args", args))
        catalogues: dict[str, Any] = {
            n: given.pop(n) for n in ("models", "catalogues") if n in given
        }
        known = {*_OPTIONS, *_CHECKS, "models", "catalogues"}
        if unknown := next((str(name) for name in given if name not in known), None):
            raise unknown_field(unknown, known)
        options: dict[str, Any] = {
            n: _typed(n, value) for n, value in given.items() if n in _OPTIONS
        }
        options.setdefault("drain_timeout_s", DRAIN_S)
        slot = options.pop("slot", "default")
        checked = {n: _CHECKS[n](n, value) for n, value in given.items() if n in _CHECKS}
        made = cls(Catalogues.of(catalogues), slot=slot, options=options, **checked)
        made.check()
        return made

    def check(self) -> None:
        """Make each pool, without starting it, nor reading keys that only its node may have."""
        slot_of(self.slot, "0" * 56)
        for models in self.catalogues.all:
            models.read()
            tables = {name: table for name, table in models.tables.items() if name != "keys"}
            AsyncModelPool(tables, folder=models.folder, slot=self.slot, **self.options)

    @property
    def drained_within_s(self) -> float:
        """How long a replica takes at most to stop."""
        grace_s = self.options.get("kill_grace_s", _OPTIONS["kill_grace_s"])
        return float(self.options["drain_timeout_s"] + grace_s + MARGIN_S)

    @property
    def most_requests(self) -> int:
        """How many requests the replicas take: those at the servers' slots, and those that wait."""
        return self.num_replicas * max(
            catalogue.pool.max_waiting
            + sum(_slots_of(entry.request) for entry in catalogue.models.values())
            for catalogue in (models.read() for models in self.catalogues.all)
        )


def _slots_of(request: Any) -> int:
    return (request.n_parallel if request is not None else None) or _SLOTS


def slot_of(slot: str, node: str) -> str:
    """Return the name of the slot on a node; a long name leaves room for a part of the node's id.

    Raises:
        InvalidRequest: the name is too long (field `slot`).
    """
    if not isinstance(slot, str) or len(slot) > LONGEST_NAME // 2:
        message = f"slot is {slot!r}: use a name of at most {LONGEST_NAME // 2} characters"
        raise InvalidRequest.because(message, field="slot")
    return f"{slot}-{node}"[:LONGEST_NAME]


def budget_of(models: Models, memory: object, totals: Mapping[str, int], num_gpus: float) -> Any:
    """Return the budget of a replica that has only a fraction of a GPU: that part of its memory.

    Args:
        memory: The option; with a budget of its own, here or in the catalogue, nothing changes.
        totals: MiB by device.
    """
    own = _mapping("pool", models.tables.get("pool") or {}).get("memory", "auto")
    if memory != "auto" or own != "auto" or not 0 < num_gpus < 1:
        return memory
    gpus = {device: mib for device, mib in totals.items() if device != HOST}
    return {device: f"{int(mib * num_gpus)} MiB" for device, mib in gpus.items()} or memory


# ------------------------------------------------------------------------------------------ checks


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        message = f"{name} is {value!r}: use a table with names as keys"
        raise InvalidRequest.because(message, field=name)
    return value


def _labels(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        message = f"catalogues has {text!r}: name labels as label=value, with commas between them"
        raise InvalidRequest.because(message, field="catalogues")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(value: object) -> object:
    """Return what a text on a command line means."""
    if isinstance(value, str):
        try:
            return cast("object", json.loads(value))
        except ValueError:
            pass
    return value


def _typed(name: str, value: object) -> object:
    """Return an option; where its default is no text, a text is read."""
    is_text = isinstance(_OPTIONS[name], str) or _OPTIONS[name] in (None, ())
    return value if is_text else _read(value)


def _count(name: str, value: object) -> int:
    number = _read(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        message = f"{name} is {value!r}: use a whole number of at least 1"
        raise InvalidRequest.because(message, field=name)
    return number


def _amount(name: str, value: object) -> float:
    number = _read(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0 <= cast("float", number) < math.inf:
        message = f"{name} is {value!r}: use a number of at least 0"
        raise InvalidRequest.because(message, field=name)
    return float(cast("float", number))


def _gpus(name: str, value: object) -> float:
    number = _amount(name, value)
    if number > 1 and number != int(number):
        message = f"{name} is {value!r}: use a whole number, or a part of one GPU"
        raise InvalidRequest.because(message, field=name)
    return number


def _resources(name: str, value: object) -> dict[str, float]:
    return {key: _amount(f"{name}.{key}", n) for key, n in _mapping(name, _read(value)).items()}


def _hosts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, str | Sequence):
        message = f"{name} is {value!r}: use a list of host names"
        raise InvalidRequest.because(message, field=name)
    return tuple(sorted(checked_hosts(value)))


_CHECKS: Final[Mapping[str, Any]] = {
    "num_replicas": _count,
    "resources": _resources,
    "num_cpus": _amount,
    "num_gpus": _gpus,
    "fronts": _count,
    "held_s": _amount,
    "claim_s": _amount,
    "allowed_hosts": _hosts,
}
