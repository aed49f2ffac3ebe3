"""Seeded faults: the pool with one piece of its source, or one row of its table, made wrong.

Each is what a tired developer would write, or has written. A fault names the text that it replaces,
which must be in the source exactly once, so that none of them rots in silence.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from unittest import mock

import orchestrator.pool
from orchestrator.pool.states import State
from orchestrator.pool.table import TABLE, Row

_IN_ORDER: Final = ("policy", "guards", "actions", "step")
"""The modules with decisions; the others are data, and shared with the shipped pool."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in the source of one module, and where it is to be found.

    Attributes:
        file: The module of the pool.
        old, new: The text that is replaced, and by what.
        scenario: Of `explorations`.
        breaks: The invariants one of which must be broken.
        without: Invariants to leave out, to see what it leads to.
    """

    file: str
    old: str
    new: str
    scenario: str
    breaks: frozenset[str]
    without: frozenset[str] = frozenset()


@contextmanager
def pool_with(file: str, old: str, new: str) -> Iterator[ModuleType]:
    """Yield a copy of `orchestrator.pool.step` and its parts, one of which has the fault."""
    package = "orchestrator.pool"
    shipped = {name: importlib.import_module(f"{package}.{name}") for name in _IN_ORDER}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules))
        for name in _IN_ORDER:
            path = Path(str(shipped[name].__file__))
            source = path.read_text(encoding="utf-8")
            if name == file:
                assert source.count(old) == 1, f"{source.count(old)} times in {name}: {old}"
                source = source.replace(old, new)
            copy = ModuleType(f"{package}.{name}")
            sys.modules[copy.__name__] = copy
            stack.enter_context(mock.patch.object(orchestrator.pool, name, copy))
            exec(compile(source, str(path), "exec"), vars(copy))
        module = sys.modules[f"{package}.step"]
    yield module


def changed(trigger: str, when: str, source: State, changes: dict[str, Any]) -> list[Row]:
    """Return the table with one row changed; actions and guards are texts, as in the table."""
    (index,) = [
        index
        for index, row in enumerate(TABLE)
        if (row.trigger, row.guards) == (trigger, tuple(when.split())) and source in row.sources
    ]
    row = TABLE[index]
    row = replace(
        row,
        guards=tuple(changes.get("guards", when).split()),
        dest=changes.get("dest", row.dest),
        actions=tuple(changes.get("actions", " ".join(row.actions)).split()),
    )
    return [*TABLE[:index], row, *TABLE[index + 1 :]]
