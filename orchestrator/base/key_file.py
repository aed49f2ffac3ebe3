"""The text of a file with API keys, one a line."""

from __future__ import annotations


def keys_in_text(text: str) -> tuple[str, ...]:
    """Return the keys in the text.

    Raises:
        ValueError: it has none, or one that no client can send; says which.
    """
    keys = tuple(key for line in text.splitlines() if (key := line.strip()))
    if not keys:
        raise ValueError("contains no key: write one key a line")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError("has a key that does not consist of printable ASCII characters")
    return keys
