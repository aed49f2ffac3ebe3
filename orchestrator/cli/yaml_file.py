"""YAML files of other programs, with the lines of their keys (extra `yaml`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from orchestrator.cli.output import Failure
from orchestrator.pool.places import KeyPath

_MAX_DEPTH: Final = 5
_MAX_BYTES: Final = 4 << 20


def read_yaml(file: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Return what a file holds, and the line of each key near its top.

    Raises:
        Failure: It cannot be read, is no YAML, or the extra `yaml` is missing.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        detail = 'reading YAML needs PyYAML: pip install "llama-orchestrator[yaml]"'
        problem = {"category": "missing_package", "title": "Package missing", "detail": detail}
        raise Failure(problem) from error
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise _unusable(file, f"is larger than {_MAX_BYTES >> 20} MiB")
        loader = yaml.SafeLoader(data)
        try:
            top = loader.get_single_node()
            if top is None:
                return None, {}
            value = loader.construct_document(top)  # also puts `<<` members in their place
        finally:
            loader.dispose()
        return value, dict(_lines(top, (), yaml.MappingNode))
    except OSError as error:
        raise _unusable(file, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "it cannot be understood"
        line = "" if mark is None else f":{mark.line + 1}"
        raise _unusable(file, f"is no YAML: {what}", line) from error


def _lines(node: Any, path: KeyPath, mapping: type[Any]) -> Iterator[tuple[KeyPath, int]]:
    if not isinstance(node, mapping) or len(path) == _MAX_DEPTH:
        return
    for key, value in node.value:
        below = (*path, str(key.value))
        yield below, key.start_mark.line + 1
        yield from _lines(value, below, mapping)


def _unusable(file: Path, why: str, line: str = "") -> Failure:
    title = "File cannot be used"
    return Failure({"category": "unusable_file", "title": title, "detail": f"{file}{line} {why}"})
