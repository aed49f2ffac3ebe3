"""What the package imports is what pyproject.toml declares, in both directions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from orchestrator import cli
from tests.kit.dependencies import EVERYTHING, ROOT, declared, floor

PACKAGE = ROOT / "orchestrator"
EXTRAS = {
    "cli/yaml_file.py": "yaml",
    "cli/": "cli",
    "cluster/": "ray",
    "demo/": "demo",
    "http/": "http",
    "server/embedded": "embedded",
    "settings/template.py": "http",  # it does without jinja2
}
"""The extra that brings what the files with this beginning import; the others have none."""
DISTRIBUTIONS: Mapping[str, list[str]] = packages_distributions()


def imported(text: str) -> Iterator[str]:
    """Yield the packages that a file imports, inside of functions too, or reads files of."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "resources.files":
            names = [ast.literal_eval(node.args[0])]
        else:
            continue
        yield from (name.partition(".")[0] for name in names)


def foreign(file: Path) -> dict[str, str]:
    """Return the distribution of each foreign package that a file imports."""
    known = {"orchestrator", *sys.stdlib_module_names}
    names = set(imported(file.read_text())) - known
    return {name: canonicalize_name(DISTRIBUTIONS.get(name, [name])[0]) for name in names}


def extra_of(file: Path) -> str | None:
    name = file.relative_to(PACKAGE).as_posix()
    return next((extra for start, extra in EXTRAS.items() if name.startswith(start)), None)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("extra", [None, *sorted(set(EXTRAS.values()))])
def test_every_import_is_declared_where_it_is_used(extra: str | None) -> None:
    """What only another package brings is gone, or of any version, when that one changes."""
    files = [file for file in FILES if extra_of(file) == extra]
    assert files
    allowed = declared(extra)
    for file in files:
        missing = {name for name, package in foreign(file).items() if package not in allowed}
        assert not missing, f"{file.relative_to(ROOT)} imports {missing}: not declared"


def test_every_declared_package_is_imported() -> None:
    """Everything that is installed can have a hole."""
    used = {package for file in FILES for package in foreign(file).values()}
    assert not declared(EVERYTHING).keys() - used


def test_every_declared_package_has_a_lowest_version() -> None:
    """CI runs tests with these, and looks them up."""
    for requirement in declared(EVERYTHING).values():
        assert floor(requirement), requirement
    assert "make floors" in (ROOT / ".ci" / "run").read_text()
    assert "make advisories" in (ROOT / ".ci" / "run").read_text()


def test_command_line_knows_what_its_extra_brings() -> None:
    """Without one of these it says what to install; without another package it is broken."""
    rooms = [file for file in FILES if extra_of(file) in {"cli", "http"}]
    used = {
        name
        for file in rooms
        for name, package in foreign(file).items()
        if package not in declared() and name != "jinja2"
    }
    assert used == cli._EXTRA


def test_imports_are_found_wherever_they_are() -> None:
    text = (
        "import os, a.b\nfrom c.d import e\n"
        "def f():\n    import g\n    resources.files('h.i')\n    return other('j')\n"
    )
    assert set(imported(text)) == {"os", "a", "c", "g", "h"}
