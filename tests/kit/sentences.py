"""The sentences that users read, word for word: tests/sentences.txt.

A test asserts the category, the field and the values of an answer where it provokes it; the words
are here, so that a change of wording is one line, and all of them can be read in one go.
`REWRITE_SENTENCES=1 pytest ...` writes what the tests that run have seen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).parents[1] / "sentences.txt"


def recorded() -> dict[str, str]:
    """Return the recorded sentences by key."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines)


def sentence(key: str, **values: object) -> str:
    """Return a recorded sentence with its values, to wait for where a text is still to come."""
    return recorded()[key].format(**values)


def assert_sentence(key: str, text: str, **values: object) -> None:
    """Assert that a text is the recorded sentence.

    Args:
        key: Its name in the file, such as `slot.owned`; written out in the test, so that a
            sentence no test asks for is found.
        text: What was said.
        values: What differs from run to run, by the name it has in the file; in this order.
    """
    for name, value in values.items():
        text = text.replace(str(value), "{" + name + "}")
    assert "\n" not in text
    sentences = recorded()
    if os.environ.get("REWRITE_SENTENCES") and sentences.get(key) != text:
        rewritten = (sentences | {key: text}).items()
        FILE.write_text("".join(sorted(f"{k}: {s}\n" for k, s in rewritten)), encoding="utf-8")
        return
    assert text == sentences.get(key), f"{key}: update tests/sentences.txt if this is meant"
