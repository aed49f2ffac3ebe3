"""The documents name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_a_page_names_exists(page: Path) -> None:
    """A claim that rests on a test which was renamed rests on nothing."""
    known = {
        name
        for file in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_a_page_links_to_or_names_exists(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in linked if not (page.parent / link).exists()]
    named = re.findall(r"`((?:orchestrator|tests|docs|diagrams)/[\w./-]+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_known_bug_is_answered_once_by_a_test() -> None:
    """67 bugs that real systems shipped: each has a rule and a test."""
    text = (ROOT / "docs" / "assurance.md").read_text()
    rows = re.findall(r"^\| (B\d\d) \|(.*)\|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == [f"B{number:02d}" for number in range(1, 68)]
    assert not [number for number, row in rows if not re.search(r"`test_\w+`", row)]
