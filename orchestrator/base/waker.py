"""A wait that other threads can end, for a cancel, an exit or new output."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from orchestrator.base.windows import Waker
else:
    from orchestrator.base.posix_waker import Waker

__all__ = ["Waker"]
