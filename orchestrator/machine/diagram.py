"""The transition table as Mermaid, Graphviz, SVG and Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from orchestrator.machine.drawing import STYLE, Drawing
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE

__all__ = ["DRAWING", "FILES", "STYLE", "dot", "markdown", "mermaid", "svg", "write"]

DRAWING: Final = Drawing(
    tuple(State), TABLE, "Lifecycle of a llama-server", "lifecycle", gated=State.SPAWNING
)
mermaid: Final = DRAWING.mermaid
dot: Final = DRAWING.dot
svg: Final = DRAWING.svg
markdown: Final = DRAWING.markdown

FILES: Final[dict[str, Callable[[], str]]] = {
    "lifecycle.mmd": mermaid,
    "lifecycle.dot": dot,
    "lifecycle.svg": svg,
    "lifecycle.md": markdown,
}
"""The generated files of `diagrams/`."""


def write(folder: Path, files: dict[str, Callable[[], str]] = FILES) -> None:
    """Write generated files into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, draw in files.items():
        (folder / name).write_text(draw(), encoding="utf-8")
