"""The parts of an orchestrator without processes, files or worker threads.

A test replaces those that it watches; everything above them is the real library.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.runtime.effects import looked_up
from orchestrator.runtime.parts import Parts
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.world import target
from tests.kit.shell.gates import GatedEffects


def fake_parts(*, look_up: Any = lambda request: target(request).model, **replaced: Any) -> Parts:
    """Return fake parts.

    Args:
        look_up: What the model source answers to a request.
        **replaced: Other parts by name.
    """
    server = target(LoadRequest(model_path="A")).server
    parts: dict[str, Any] = {
        "slot": FakeSlot,
        "source": lambda *_: SimpleNamespace(look_up=look_up, check_args=lambda _: None),
        "server": lambda _: server,
        "catalogue": lambda *_: None,
        "effects": lambda _slot, post, *others: GatedEffects(
            post, look_ups=lambda command: post(looked_up(command, others[-1]))
        ),
        "at_exit": lambda _: None,
    }
    return Parts(**(parts | replaced))


class FakeSlot:
    directory = Path("/nowhere/slot")

    def __init__(self, name: str, state_dir: object = None) -> None:
        self.name = name

    def claim(self) -> None: ...

    def release(self) -> None: ...
