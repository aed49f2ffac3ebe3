"""What is worth remembering about this machine: small JSON files, whole or not there.

A note is never needed: one that cannot be written costs its writer some time the next time.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, members: Any) -> None:
    """Write a note in one step, so that who reads it meanwhile finds the old one or the new."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(members), encoding="utf-8")
        os.replace(temporary, path)
