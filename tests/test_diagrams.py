"""The committed diagrams are those that the tables generate, and they are complete."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from orchestrator.machine import diagram
from orchestrator.machine.drawing import Drawing
from orchestrator.machine.states import State
from orchestrator.pool import diagram as pool_diagram
from orchestrator.pool.states import State as PoolState
from tests.kit.pool.explorations import explored
from tests.kit.pool.world import Core

DIAGRAMS = Path(__file__).parents[1] / "diagrams"
FILES = diagram.FILES | pool_diagram.FILES
DRAWINGS = {"lifecycle": diagram.DRAWING, "pool": pool_diagram.DRAWING}
BOTH = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


@pytest.mark.parametrize("name", FILES)
def test_committed_diagram_is_up_to_date(name: str) -> None:
    """`make diagrams` writes them."""
    assert (DIAGRAMS / name).read_text(encoding="utf-8") == FILES[name]()


def test_diagrams_folder_has_generated_files_only() -> None:
    assert {path.name for path in DIAGRAMS.iterdir()} == set(FILES)


@BOTH
def test_every_edge_of_the_table_is_in_every_diagram(drawing: Drawing[Any]) -> None:
    rows = (*drawing.table, *drawing.beside)
    pairs = {(s, row.dest) for row in rows for s in row.sources if row.dest is not None}
    ids = {element.get("id") for element in ET.fromstring(drawing.svg()).iter()}
    for source, dest in pairs:
        assert f"edge-{source}-{dest}" in ids
        assert f"{source} --> {dest} : " in drawing.mermaid()
        assert f"{source} -> {dest} [" in drawing.dot()


@BOTH
def test_markdown_table_has_every_row_in_order(drawing: Drawing[Any]) -> None:
    lines = drawing.markdown().splitlines()[2:]
    triggers = [row.trigger for row in drawing.table]
    assert [line.split(" | ")[0].lstrip("| ") for line in lines] == triggers


@BOTH
def test_everything_drawn_is_within_the_picture(drawing: Drawing[Any]) -> None:
    root = ET.fromstring(drawing.svg())
    width, height = map(int, (root.get("viewBox") or "").split()[2:])
    texts = [element for element in root.iter() if element.tag.endswith("text")]
    assert len(texts) > len(drawing.order)
    for text in texts:
        assert 0 < float(text.get("x") or 0) < width
        assert 0 < float(text.get("y") or 0) < height
    for path in (element for element in root.iter() if element.tag.endswith("path")):
        numbers = [float(n) for n in (path.get("d") or "").translate(_NO_LETTERS).split()]
        assert min(numbers, default=0) >= 0


_NO_LETTERS = str.maketrans("MVHQLz", "      ")


@pytest.mark.parametrize("state", State)
def test_only_the_current_state_is_marked(state: State) -> None:
    root = ET.fromstring(diagram.svg(state))
    lit = [e.get("id") for e in root.iter() if "current" in (e.get("class") or "").split()]
    assert lit == [f"state-{state}"]
    assert f"class {state} current" in diagram.mermaid(state)


def changes(before: Core, after: Core) -> set[tuple[PoolState, PoolState]]:
    pairs = zip(before.by_model, after.by_model, strict=True)
    return {(a.state, b.state) for a, b in pairs if a and b and a.state is not b.state}


def test_edges_beside_the_table_are_those_that_the_policy_takes() -> None:
    """A look fires a row that changes nothing: what it does is the policy's alone."""
    taken = {"look": set[tuple[PoolState, PoolState]](), "shutdown": set()}
    for name in ("two fit", "idle", "held", "restarts", "shutdown"):
        for (core, key), steps in explored(name).steps.items():
            for step in steps if key.trigger in taken else ():
                taken[key.trigger] |= changes(core, step.core)
    beside = {
        trigger: {
            (s, row.dest)
            for row in pool_diagram.BESIDE
            for s in row.sources
            if (row.trigger == "shutdown") is (trigger == "shutdown")
        }
        for trigger in taken
    }
    assert taken == beside
