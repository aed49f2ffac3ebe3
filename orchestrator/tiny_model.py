"""A tiny model for demos and tests."""

from __future__ import annotations

from orchestrator.demo.tiny_model import write_tiny_model

__all__ = ["write_tiny_model"]
