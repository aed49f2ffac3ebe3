"""Several machines, by Ray Serve (extra `ray`): `build_app` is an application builder."""

from __future__ import annotations

from orchestrator.cluster.on_ray import without_extra

try:
    from orchestrator.cluster.app import build_app
except ModuleNotFoundError as _error:
    raise without_extra(_error) from _error

__all__ = ["build_app"]
