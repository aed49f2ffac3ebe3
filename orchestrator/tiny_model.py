"""The door to the tiny model that demos and tests make: `write_tiny_model`."""

from __future__ import annotations

from orchestrator.demo.tiny_model import write_tiny_model

__all__ = ["write_tiny_model"]
