"""Checks of the public API by type checkers."""
