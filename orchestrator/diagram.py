"""Diagrams of both machines. `python -m orchestrator.diagram FOLDER` writes all of them."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.machine.diagram import FILES, dot, markdown, mermaid, svg, write
from orchestrator.pool import diagram as pool

__all__ = ["dot", "markdown", "mermaid", "svg", "write"]

if __name__ == "__main__":
    write(Path(sys.argv[1]), FILES | pool.FILES)
