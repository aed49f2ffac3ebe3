"""The command line: `llama-orchestrator`, or `python -m orchestrator.cli` (extra `cli`).

Can be imported without the extra, and then reports the missing package in one line. Exit codes:
0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

_EXTRA: Final = frozenset(
    {"click", "rich", "aiohttp", "fastapi", "fastapi_swagger", "httptools", "multidict"}
    | {"prometheus_client", "pydantic", "starlette", "uvicorn", "uvloop", "yarl"}
)
INTERRUPTED: Final = 130


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    Args:
        args: The command line without the program's name; None means `sys.argv[1:]`.
    """
    try:
        from orchestrator.cli import app

        code = app.run(args)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        install = 'pip install "llama-orchestrator[cli]"'
        sys.stderr.write(f"llama-orchestrator: the command line needs {missing}: {install}\n")
        code = 1
    sys.exit(code)
