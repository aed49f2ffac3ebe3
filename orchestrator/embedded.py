"""The embedded server: `python -m orchestrator.embedded` takes the flags of llama-server."""

from __future__ import annotations

from orchestrator.server.embedded import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
