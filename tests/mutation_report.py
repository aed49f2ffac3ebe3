"""The second half of `make mutants`: the score of each module, and every surviving mutant.

Usage: python -m tests.mutation_report > docs/mutants.md
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_MUTANTS: Final = Path("mutants")
_SURVIVED: Final = (0, 33)  # every test passed, or no test reaches it
_MARK: Final = "__mutmut_"


@dataclass(slots=True)
class Score:
    """The results of the mutants of one module."""

    module: str
    killed: int = 0
    unchecked: int = 0
    survivors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = self.killed + len(self.survivors)
        share = f"{100 * self.killed / counted:.1f} %" if counted else "-"
        more = f", {self.unchecked} not run" if self.unchecked else ""
        return f"| {self.module} | {counted} | {self.killed} | {share}{more} |"


class _WithoutCasts(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_cast = isinstance(node.func, ast.Name) and node.func.id == "cast"
        return node.args[1] if is_cast and len(node.args) == 2 else node


def _functions(source: str) -> dict[str, ast.FunctionDef]:
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {function.name: function for function in found}


def _body(function: ast.FunctionDef) -> list[str]:
    return ast.unparse(_WithoutCasts().visit(ast.Module(function.body, []))).splitlines()


def _only_for_import(module: Path) -> set[str]:
    """Return the functions that are called by the body of the module or of a class alone."""
    tree = ast.parse(module.read_text())
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef)]
    outside = [
        n for body in bodies for n in body if not isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    return _called(outside) - _called(inside)


def _called(nodes: Iterable[ast.AST]) -> set[str]:
    calls = (n.func for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call))
    return {name.id for name in calls if isinstance(name, ast.Name)}


def _scores() -> Iterator[Score]:
    for meta in sorted(_MUTANTS.rglob("*.py.meta")):
        source = meta.with_suffix("")
        functions = _functions(source.read_text())
        score = Score(source.relative_to(_MUTANTS).as_posix())
        too_early = {f"x_{name}" for name in _only_for_import(Path(score.module))}
        for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            if code is None:
                score.unchecked += 1
                continue
            mutant = name.rpartition(".")[2]
            function = mutant.partition(_MARK)[0]
            original = functions[f"{function}{_MARK}orig"]
            before, after = _body(original), _body(functions[mutant])
            if before == after or function in too_early:
                continue
            if code not in _SURVIVED:
                score.killed += 1
                continue
            lines = difflib.unified_diff(before, after, lineterm="", n=0)
            changes = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
            score.survivors.append("\n".join([f"@@ {mutant.removeprefix('x_')}", *changes]))
        if score.killed or score.survivors or score.unchecked:
            yield score


_HEAD: Final = """\
# Mutants of the pure modules

`make mutants` changes every line of the deciding modules (mutmut), runs their tests on each change,
and writes this page. Two kinds are not counted: a mutant that only changes the type in a `cast` is
the same program, and a mutant of a function that runs at import is activated too late for any test.
The rows of the transition table are mutated by `tests/core/test_mutants.py`.
"""

_SURVIVORS: Final = """
## What survived

Each was reviewed. Most are equivalent: `None` for `False`, a bound that is never reached,
characters to strip that never occur, a default that is replaced before it is used. The others
change the wording of an error in a corner case, or are caught by tests that do not run here: the
checker over every order of events, and real processes.
"""


def main() -> None:
    scores = list(_scores())
    whole = Score(
        "all",
        sum(score.killed for score in scores),
        sum(score.unchecked for score in scores),
        [survivor for score in scores for survivor in score.survivors],
    )
    print(f"{_HEAD}\n| module | mutants | killed | score |\n|---|---|---|---|")
    print("\n".join(map(str, (*scores, whole))))
    print(_SURVIVORS)
    for score in scores:
        if score.survivors:
            print("\n".join([f"### {score.module}\n\n```diff", *score.survivors, "```\n"]))


if __name__ == "__main__":
    main()
