"""The documents name things that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import AsyncModelPool, AsyncOrchestrator
from orchestrator.http.metrics import Metrics
from orchestrator.http.pool.metrics import PoolMetrics
from orchestrator.machine.states import State
from tests.kit.copies import with_copies

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


@pytest.mark.parametrize(
    "file",
    [
        *("orchestrator/http/panel/words.js", "orchestrator/http/panel/steps.js"),
        *("docs/grafana-dashboard.json", "docs/lifecycle.md", "README.md"),
    ],
)
def test_every_state_is_where_the_states_are_listed(file: str) -> None:
    text = (ROOT / file).read_text()
    assert {state for state in State if state not in text} == set()


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
        compile(text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_copies_of_examples_are_equal_to_the_files(page: Path) -> None:
    """The tests run the files, readers copy the page. `make copies` writes them."""
    assert page.read_text() == with_copies(page.read_text())


def _sampled(text: bytes) -> dict[str, set[str]]:
    """Return the labels of every metric of a scrape."""
    return {
        family.name.removeprefix("llama_orchestrator_"): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in text_string_to_metric_families(text.decode())
        if not family.name.endswith("_created")  # the client's own
    }


def test_every_metric_is_listed_with_its_labels() -> None:
    """The names are part of the API, and the site's own page takes the labels from this table."""
    sampled = _sampled(Metrics(AsyncOrchestrator()).render())
    pool = AsyncModelPool({"models": {"chat": {"model_path": "a.gguf"}}})
    of_pool = _sampled(PoolMetrics(pool).render())
    for name, labels in sampled.items():
        assert of_pool.pop(name) in (labels | {"model"}, set()), name  # without samples none
    sampled |= of_pool
    table = (ROOT / "docs" / "http.md").read_text().partition("## Metrics")[2]
    listed: dict[str, set[str]] = {}
    for names, labels in re.findall(r"^\|([^|]*`[^|]*)\|([^|]*)\|", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            listed[name.removesuffix("_total")] = set(re.findall(r"`(\w+)`", labels))
    assert sampled.keys() == listed.keys()
    for name, labels in sampled.items():
        assert labels <= listed[name], name


def samples() -> dict[str, set[str]]:
    """Return the series of `/metrics` with their labels, as docs/http.md lists them."""
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    table = (ROOT / "docs" / "http.md").read_text().partition("## Metrics")[2]
    labels = {
        name.removesuffix("_total"): set(re.findall(r"`(\w+)`", row[2]))
        for row in re.finditer(r"^\|([^|]*`[^|]*)\|([^|]*)\|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row[1])
    }
    text = Metrics(AsyncOrchestrator()).render().decode()
    return {
        family.name + end: labels[family.name.removeprefix("llama_orchestrator_")]
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
        for end in ends[family.type]
    }


def queries() -> dict[str, str]:
    """Return the queries of the dashboard, its variables and the alerts, each with its legend."""
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    found = {
        target["expr"]: target["legendFormat"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["query"]["query"]] = ""
    rules = (ROOT / "docs" / "examples" / "prometheus-rules.yml").read_text()
    for expr in re.findall(r"expr: (?:\|\n)?(.*?)\n +annotations:", rules, re.DOTALL):
        found[expr] = ""
    return found


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    """A query for a metric that was renamed is an empty panel, and an alert that never comes."""
    known, asked = samples(), set()
    assert len(queries()) > 12
    for expr, legend in queries().items():
        names = set(re.findall(r"llama_orchestrator_\w+", expr))
        assert names
        assert names <= known.keys(), names - known.keys()
        used = set(re.findall(r'(\w+)(?:!=|=~|!~|=)"', expr))
        for group in re.findall(r"\b(?:by|without) \(([\w, ]+)\)", expr):
            used |= {label.strip() for label in group.split(",")}
        used |= set(re.findall(r"\{\{(\w+)\}\}", legend))
        labels = set.union(*(known[name] for name in names)) | {"instance", "le"}
        assert used <= labels, (expr, used - labels)
        asked |= {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    of_interest = {re.sub("_(bucket|sum|count)$", "", name) for name in known}
    assert of_interest - asked == {"llama_orchestrator_transitions_total"}, "shown nowhere"


ANSWERED = range(1, 111)


def test_every_known_bug_is_answered_once_by_a_test() -> None:
    """Bugs that real systems, this one included, shipped: each has a rule and a test."""
    text = (ROOT / "docs" / "assurance.md").read_text()
    rows = re.findall(r"^\| (B\d+) \|(.*)\|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == [f"B{number:02d}" for number in ANSWERED]
    assert not [number for number, row in rows if not re.search(r"`test_\w+`", row)]
