"""The pool's table as Mermaid, Graphviz, SVG and Markdown.

What the policy does after every fact (`step.settle`), and what a fact about one entry, or about the
whole pool, does to others, is in no row of the entry: it is drawn dashed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from orchestrator.machine.drawing import Drawing
from orchestrator.machine.rows import row
from orchestrator.pool.states import OF_ENTRIES, State
from orchestrator.pool.table import TABLE, Row

BESIDE: Final[tuple[Row, ...]] = (
    row("start", State.ABSENT, "", State.STARTING, ""),
    row("evict", State.RESIDENT, "", State.STOPPING, ""),
    row("idle", State.RESIDENT, "", State.STOPPING, ""),
    row("held", State.STARTING, "", State.STOPPING, ""),
    row("shutdown", (State.STARTING, State.RESIDENT, State.STUCK), "", State.STOPPING, ""),
)
"""The edges of an entry that are in none of its rows."""

DRAWING: Final = Drawing(OF_ENTRIES, TABLE, "An entry of the pool", "pool", beside=BESIDE)

FILES: Final[dict[str, Callable[[], str]]] = {
    "pool.mmd": DRAWING.mermaid,
    "pool.dot": DRAWING.dot,
    "pool.svg": DRAWING.svg,
    "pool.md": DRAWING.markdown,
}
"""Its generated files of `diagrams/`."""
