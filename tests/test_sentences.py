"""The file of sentences has exactly those that tests ask for."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.kit.sentences import FILE, recorded


def test_every_recorded_sentence_is_asserted_by_a_test() -> None:
    """A sentence that no code says any more would be read, and translated, for nothing."""
    constants: set[object] = set()
    for path in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert set(recorded()) <= constants


def test_the_file_is_sorted_and_has_every_key_once() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines)
    assert len(lines) == len(recorded())
