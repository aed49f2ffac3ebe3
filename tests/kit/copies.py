"""Copies of docs/examples in the pages, so that a page has its code wherever it is read.

The first block of code after a link to an example is that example. `make copies` writes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "docs" / "examples"
_COPY: Final = re.compile(
    r"(?P<before>\]\((?:[\w./]*/)?examples/(?P<name>[\w.-]+)\)(?:(?!\n```|examples/).)*\n```\w+\n)"
    r"(?P<code>.*?)(?=^```$)",
    re.DOTALL | re.MULTILINE,
)


def shown_in(page: str) -> set[str]:
    """Return the names of the examples that a page shows."""
    return {found["name"] for found in _COPY.finditer(page)}


def with_copies(page: str) -> str:
    """Return a page with every copy as its example is now."""
    return _COPY.sub(lambda it: it["before"] + (EXAMPLES / it["name"]).read_text(), page)


def main() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        page.write_text(with_copies(page.read_text()))


if __name__ == "__main__":
    main()
