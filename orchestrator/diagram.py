"""Diagrams of the state machine. `python -m orchestrator.diagram FOLDER` writes all of them."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.machine.diagram import dot, markdown, mermaid, svg, write

__all__ = ["dot", "markdown", "mermaid", "svg", "write"]

if __name__ == "__main__":
    write(Path(sys.argv[1]))
