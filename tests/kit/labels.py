"""Ids of test parameters in plain ASCII without a backslash.

pytest escapes other characters again each time it collects in one process, so that a second run
(`make mutants`) would not find a test by its first id.
"""

from __future__ import annotations


def label(value: object) -> str:
    """Return the repr of a value, or the words of a tuple."""
    text = " ".join(value) if isinstance(value, tuple) else repr(value)
    return ascii(text)[1:-1].replace("\\", "/")
