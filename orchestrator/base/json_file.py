"""Small JSON files that cache what was learned about this machine.

A file is only a cache: one that cannot be written costs time the next time, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, members: Any) -> None:
    """Replace a file atomically; errors of the file system are ignored."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(members), encoding="utf-8")
        os.replace(temporary, path)
