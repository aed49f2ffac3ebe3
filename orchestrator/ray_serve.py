"""Several machines, by Ray Serve (extra `ray`): `build_app` is an application builder."""

from orchestrator.cluster.app import build_app

__all__ = ["build_app"]
