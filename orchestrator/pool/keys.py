"""API keys and what each may do: the keys of a catalogue, read from their files.

Only digests are kept. They are of one length, so that a comparison tells nothing about a key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from orchestrator.base.key_file import keys_in_text
from orchestrator.errors import InvalidCatalogue
from orchestrator.pool.catalogue import Catalogue

_MAX_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Grant:
    """What the holder of a key may do; without arguments, everything.

    Attributes:
        name: Of the key; None where keys have no names.
        models: Entries that it sees and uses; None = all.
        admin: Whether it may change things, and read metrics.
        weight: Its share where several keys wait for one model.
    """

    name: str | None = None
    models: frozenset[str] | None = None
    admin: bool = True
    weight: float = 1.0
    digest: bytes = field(default=b"", repr=False)

    def sees(self, model: str) -> bool:
        return self.models is None or model in self.models


EVERYTHING: Final = Grant()


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def grants_of(catalogue: Catalogue) -> tuple[Grant, ...]:
    """Read the files of the keys of a catalogue.

    Raises:
        InvalidCatalogue: a file cannot be read, has no key, or has one of another table.
    """
    found: dict[bytes, Grant] = {}
    for key in catalogue.keys.values():
        models = None if key.models is None else frozenset(key.models)
        try:
            with open(key.key_file, encoding="ascii", errors="replace") as file:
                text = file.read(_MAX_BYTES)
        except (OSError, ValueError) as error:  # a name with a null character is a ValueError
            why = getattr(error, "strerror", None) or "the name cannot be used"
            raise _mistake(catalogue, key.name, f"cannot be read ({why})") from error
        try:
            keys = keys_in_text(text)
        except ValueError as error:
            raise _mistake(catalogue, key.name, str(error)) from None
        for digest in map(digest_of, keys):
            grant = Grant(key.name, models, key.admin, key.weight, digest)
            if found.setdefault(digest, grant).name != key.name:
                what = f"has a key of keys.{found[digest].name} too: give each table its own"
                raise _mistake(catalogue, key.name, what)
    return tuple(found.values())


def _mistake(catalogue: Catalogue, name: str, what: str) -> InvalidCatalogue:
    return catalogue.places.error(f"key_file {what}", ("keys", name), "key_file")
