"""Names for parameters of a test: plain ASCII without a backslash.

pytest escapes anything else in a name each time it collects in one process, so that the second time
(`make mutants`) nobody finds a test by the name it had the first time.
"""

from __future__ import annotations


def label(value: object) -> str:
    """Return a value as it is written, or the words of several."""
    text = " ".join(value) if isinstance(value, tuple) else repr(value)
    return ascii(text)[1:-1].replace("\\", "/")
