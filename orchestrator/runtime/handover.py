"""What the next owner of a slot is told of a server that is kept for it.

It is JSON in the memory of the slot's keeper, with the server's key, and never on disk. What is not
of this version, or cannot be read, is not believed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from orchestrator.base.tokens import Generation
from orchestrator.errors import OrchestratorError
from orchestrator.models.local import identity_of
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is remembered of a server: the load that started it, and the key that it knows."""

    generation: Generation
    target: Target
    api_key: str | None

    def as_text(self) -> str:
        target = self.target
        return json.dumps(
            {
                "version": _VERSION,
                "generation": self.generation,
                "api_key": self.api_key,
                "request": target.request.as_dict(),
                "model": target.model.as_dict(),
                "model_names": target.model.names,
                "server": target.server.as_dict(),
                "server_names": target.server.names,
            }
        )


def recalled(text: bytes) -> Remembered | None:
    """Return what was remembered; None if it is of another version."""
    try:
        members = json.loads(text)
        if members["version"] != _VERSION:
            return None
        model = ModelFiles.from_dict(members["model"])
        server = ServerBinary.from_dict(members["server"])
        target = Target(
            LoadRequest.from_dict(members["request"]),
            replace(model, names=_names(members["model_names"])),
            replace(server, names=_names(members["server_names"])),
        )
        return Remembered(Generation(int(members["generation"])), target, members["api_key"])
    except (ValueError, TypeError, LookupError, AttributeError, OrchestratorError, RecursionError):
        return None


def first_changed(files: Iterable[FileIdentity]) -> str | None:
    """Return the path of the first file that is not as it was; None if all are."""
    for file in files:
        try:
            is_same = identity_of(file.path, keeps_name=True) == file
        except OSError:
            is_same = False
        if not is_same:
            return file.path
    return None


def _names(pairs: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(path), str(name)) for path, name in pairs)
