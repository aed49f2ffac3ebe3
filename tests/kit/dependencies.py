"""The packages that pyproject.toml declares, and the versions of them that uv chooses."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = "llama-orchestrator"
EVERYTHING = "all"
"""The extra that contains every other one of run time."""


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Return what is required at run time, by name; with an extra, also what that adds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, Requirement] = {}
    for line in _lines(project, extra):
        requirement = Requirement(line)
        found[canonicalize_name(requirement.name)] = requirement
    return found


def _lines(project: dict[str, dict[str, list[str]]], extra: str | None) -> Iterator[str]:
    yield from project["dependencies"]
    for line in project["optional-dependencies"][extra] if extra else ():
        requirement = Requirement(line)
        if requirement.name != OURS:
            yield line
        for other in requirement.extras if requirement.name == OURS else ():
            yield from _lines(project, other)


def floor(requirement: Requirement) -> str:
    """Return the lowest version that is allowed."""
    (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return lowest


def chosen(*options: str) -> dict[str, str]:
    """Return the versions that uv chooses for everything of run time, indirect ones too.

    Args:
        options: Of `uv pip compile`.
    """
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--python"]
    command += [sys.executable, "--extra", EVERYTHING, *options, "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = (line.partition(";")[0].strip() for line in done.stdout.splitlines())
    return dict(line.split("==") for line in lines if line)
