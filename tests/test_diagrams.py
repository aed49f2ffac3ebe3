"""The committed diagrams are those that the table generates, and they are complete."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from orchestrator.machine import diagram
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE

DIAGRAMS = Path(__file__).parents[1] / "diagrams"


@pytest.mark.parametrize("name", diagram.FILES)
def test_committed_diagram_is_up_to_date(name: str) -> None:
    """`make diagrams` writes them."""
    assert (DIAGRAMS / name).read_text(encoding="utf-8") == diagram.FILES[name]()


def test_diagrams_folder_has_generated_files_only() -> None:
    assert {path.name for path in DIAGRAMS.iterdir()} == set(diagram.FILES)


def test_every_edge_of_the_table_is_in_every_diagram() -> None:
    pairs = {(s, row.dest) for row in TABLE for s in row.sources if row.dest is not None}
    ids = {element.get("id") for element in ET.fromstring(diagram.svg()).iter()}
    for source, dest in pairs:
        assert f"edge-{source}-{dest}" in ids
        assert f"{source} --> {dest} : " in diagram.mermaid()
        assert f"{source} -> {dest} [" in diagram.dot()


def test_markdown_table_has_every_row_in_order() -> None:
    lines = diagram.markdown().splitlines()[2:]
    assert [line.split(" | ")[0].lstrip("| ") for line in lines] == [row.trigger for row in TABLE]


@pytest.mark.parametrize("state", State)
def test_only_the_current_state_is_marked(state: State) -> None:
    root = ET.fromstring(diagram.svg(state))
    lit = [e.get("id") for e in root.iter() if "current" in (e.get("class") or "").split()]
    assert lit == [f"state-{state}"]
    assert f"class {state} current" in diagram.mermaid(state)
