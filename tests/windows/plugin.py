"""Lets tests that were written for Linux run on the Windows Python: `-p tests.windows.plugin`.

What does not apply there is taken out by name, with the reason, and told at the end of the run. The
shims are for the kit, which names signals in its defaults; that the package does without them is
checked by the type checker (`make lint`).
"""

from __future__ import annotations

import collections
import signal
import sys
from typing import Final

import pytest

ELSEWHERE: Final = {  # beginning of a test's id: reason
    "tests/core/test_catalogue.py::test_every_flag_of_the_real": "asks a llama-server of Linux",
    "tests/core/test_catalogue.py::test_flag_whose_value": "asks a llama-server of Linux",
    "tests/core/test_catalogue.py::test_the_real_server": "asks a llama-server of Linux",
    "tests/core/test_catalogue.py::test_no_variable_that": "asks a llama-server of Linux",
    "tests/core/test_catalogue.py::test_help_is_parsed_in_linear": "Wine's CPU clock is too coarse",
    "tests/core/test_variants.py::test_large_listing_takes_lin": "Wine's CPU clock is too coarse",
    "tests/core/test_failures.py::test_the_message_is_one": "names signals, which it lacks",
    "tests/core/test_memory.py::test_limits_are_those": "control groups are Linux's",
    "tests/core/test_warm.py": "reading ahead is Linux's",
    "tests/core/test_request.py::test_case_and_padding": "expects paths with slashes",
    "tests/core/test_keeper.py": "the keeper's loop over Linux's sockets",
    "tests/core/test_mutants.py": "pure, and long",
    "tests/core/test_checker.py": "pure, and long",
    "tests/pool/test_mutants.py": "pure, and long",
    "tests/pool/test_checker.py": "pure, and long",
    "tests/pool/test_schema.py": "needs a package that is not there",
    "tests/pool/test_elsewhere.py::test_status_of_a_pool_tells": "starts a llama-server of Linux",
    "tests/pool/test_catalogue.py::test_the_example_of_the": "expects paths with slashes",
    "tests/pool/test_catalogue.py::test_a_relative_path_starts": "expects paths with slashes",
    "tests/pool/test_catalogue.py::test_every_other_file": "expects paths with slashes",
    "tests/pool/test_catalogue.py::test_a_path_object_is": "expects paths with slashes",
    "tests/pool/test_mistakes.py::test_the_folder_of_the_file": "sets HOME, which Windows has not",
}
_SIGNALS: Final = {"SIGKILL": 9, "SIGBUS": 7, "SIGUSR1": 10}
_told: collections.Counter[str] = collections.Counter()

if sys.platform == "win32":
    for name, number in _SIGNALS.items():
        setattr(signal, name, number)


def _why(name: str) -> str | None:
    return next((why for start, why in ELSEWHERE.items() if name.startswith(start)), None)


def pytest_ignore_collect(collection_path: object, config: pytest.Config) -> bool | None:
    """Do not import a file that is out as a whole."""
    path = str(collection_path).replace("\\", "/")
    for start, why in ELSEWHERE.items():
        if start.endswith(".py") and path.endswith(start):
            _told[f"{start}: {why}"] += 1
            return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if _why(item.nodeid) is not None]
    for item in out:
        _told[f"{item.nodeid.partition('[')[0]}: {_why(item.nodeid)}"] += 1
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line, count in sorted(_told.items()):
        terminalreporter.write_line(f"not under Wine: {line} ({count})")
