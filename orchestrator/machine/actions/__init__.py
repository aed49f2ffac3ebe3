"""Actions of the table: each replaces the frozen context and appends commands. No I/O.

The order of the actions in a row matters: first what ends (supersede, cancel, fail), then what
follows (`take_next`), then the new effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from orchestrator.machine.actions import asking, effects, ending, looking

ACTIONS: Final[dict[str, Callable[..., Any]]] = {
    name: value
    for module in (asking, effects, ending, looking)
    for name, value in vars(module).items()
    if callable(value) and value.__module__ == module.__name__ and not name.startswith("_")
}
"""Every public function of these modules, by name."""
