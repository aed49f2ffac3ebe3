"""The folders say what a file may import: rooms import only from rooms below them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import orchestrator

HOUSE = Path(orchestrator.__file__).parent
LOWEST_FIRST = (
    *({"base"}, {"errors"}, {"settings"}, {"machine", "models"}, {"server"}),
    *({"runtime"}, {"pool"}, {"http"}, {"cli", "cluster"}, {"demo"}),
)
FLOOR = {room: floor for floor, rooms in enumerate(LOWEST_FIRST) for room in rooms}
NAMES = {path: path.relative_to(HOUSE).as_posix() for path in sorted(HOUSE.rglob("*.py"))}
FILES = [path for path, name in NAMES.items() if re.split("[/.]", name)[0] in FLOOR]
ONLY_IN = {
    "transitions": "machine/step.py",
    "jinja2": "settings/template.py",
    "huggingface_hub": "models/hub/fetcher",
    "psutil": "server/",
    "ray": "cluster/on_ray.py",
}
PURE = {"settings", "machine", "errors"}
PURE_FILES = {
    f"pool/{name}.py"
    for name in (
        *("states", "facts", "context", "commands", "guards", "table", "actions", "step"),
        *("policy", "ledger", "budget", "diagram"),
    )
}
IMPURE = {
    *("asyncio", "http", "io", "multiprocessing", "select", "selectors", "shutil", "socket"),
    *("subprocess", "tempfile", "threading", "time", "urllib"),
}


def imports(file: Path) -> set[str]:
    """Return every module that a file imports, also inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=NAMES.get)
def test_a_room_imports_only_from_rooms_below(file: Path) -> None:
    room = re.split("[/.]", NAMES[file])[0]
    is_pure = room in PURE or NAMES[file] in PURE_FILES
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "orchestrator" and (other := rest.partition(".")[0]) in FLOOR:
            assert other == room or FLOOR[other] < FLOOR[room], f"{name} is not below"
            is_data = rest.startswith(("machine.facts.", "machine.commands."))
            assert room != "server" or other != "machine" or is_data, f"{name} is not data"
        elif is_pure:
            assert top not in IMPURE, f"{NAMES[file]} does no I/O"
        where = ONLY_IN.get(top)
        assert where is None or NAMES[file].startswith(where), f"{top} belongs into {where}"
        is_known = top in {"orchestrator", *ONLY_IN, *sys.stdlib_module_names}
        assert not is_pure or is_known, f"{NAMES[file]} imports {name}"


def test_top_level_modules_only_re_export() -> None:
    """`orchestrator.diagram` and its like are public import paths."""
    doors = {p.name: p.read_text() for p in HOUSE.glob("*.py") if p.stem not in FLOOR}
    del doors["__init__.py"]
    assert set(doors) == {"diagram.py", "embedded.py", "ray_serve.py", "tiny_model.py"}
    assert all(text.count("\n") <= 15 for text in doors.values())
