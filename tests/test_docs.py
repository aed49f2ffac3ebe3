"""The documents name things that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import AsyncOrchestrator
from orchestrator.http.metrics import Metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_a_page_names_exists(page: Path) -> None:
    """A claim that rests on a test which was renamed rests on nothing."""
    known = {
        name
        for file in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_a_page_links_to_or_names_exists(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in linked if not (page.parent / link).exists()]
    assert not [link for link in missing if not _is_generated(page.parent / link)]
    named = re.findall(r"`((?:orchestrator|tests|docs|diagrams)/[\w./-]+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def _is_generated(page: Path) -> bool:
    """Is it a page of the site that is made from the code?"""
    name = page.resolve().relative_to(ROOT / "docs")
    return f'"{name}"' in (ROOT / "docs" / "generate.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_snippet_can_be_read(page: Path) -> None:
    """Those that are run are files of their own, or have a test of their own."""
    for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "--8<--" not in text:
            compile(text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_metric_is_listed_with_its_labels() -> None:
    """The names are part of the API, and the site's own page takes the labels from this table."""
    metrics = Metrics(AsyncOrchestrator())
    sampled = {
        family.name.removeprefix("llama_orchestrator_"): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in text_string_to_metric_families(metrics.render().decode())
        if not family.name.endswith("_created")  # the client's own
    }
    table = (ROOT / "docs" / "http.md").read_text().partition("## Metrics")[2]
    listed: dict[str, set[str]] = {}
    for names, labels in re.findall(r"^\|([^|]*`[^|]*)\|([^|]*)\|", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            listed[name.removesuffix("_total")] = set(re.findall(r"`(\w+)`", labels))
    assert sampled.keys() == listed.keys()
    for name, labels in sampled.items():
        assert labels <= listed[name], name


ANSWERED = (*range(1, 86), 90, *range(100, 111))
"""The rest of the list belongs to what is not built yet."""


def test_every_known_bug_is_answered_once_by_a_test() -> None:
    """Bugs that real systems, this one included, shipped: each has a rule and a test."""
    text = (ROOT / "docs" / "assurance.md").read_text()
    rows = re.findall(r"^\| (B\d+) \|(.*)\|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == [f"B{number:02d}" for number in ANSWERED]
    assert not [number for number, row in rows if not re.search(r"`test_\w+`", row)]
