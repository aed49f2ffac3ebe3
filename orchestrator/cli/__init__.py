"""The command line: `llama-orchestrator`, or `python -m orchestrator.cli` (extra `cli`).

This file can be imported without the extra and says in one line what is missing. It owns the exit
codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

_EXTRA: Final = frozenset(
    {"click", "rich", "aiohttp", "fastapi", "fastapi_offline", "httptools", "prometheus_client"}
    | {"pydantic", "starlette", "uvicorn", "uvloop"}
)
INTERRUPTED: Final = 130


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    Args:
        args: The command line without the program's name; None takes the process's own.
    """
    try:
        code = _run(args)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        remedy = 'pip install "llama-orchestrator[cli]"'
        sys.stderr.write(f"llama-orchestrator: the command line needs {missing}: {remedy}\n")
        code = 1
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    from orchestrator.cli import app

    return app.run(args)
