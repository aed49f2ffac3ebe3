"""llama-orchestrator: owns one llama-server process, from Idle to Healthy and back.

The public names are below; they are imported on first use, so that `import orchestrator` is cheap
and a child process that needs one module does not pay for all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.errors import (
        Busy,
        CacheDirError,
        Cancelled,
        DeadlineExceeded,
        DiskFull,
        HubCorrupt,
        HubError,
        HubGated,
        HubRateLimited,
        HubUnauthorized,
        HubUnreachable,
        Interrupted,
        InvalidModel,
        InvalidRequest,
        MalformedRequest,
        ModelNotFound,
        NotLoaded,
        OrchestratorError,
        Problem,
        RefusedArgument,
        ServerExited,
        ServerStartFailed,
        ServerUnavailable,
        ShuttingDown,
        SlotOccupied,
        SlotOwned,
        Stalled,
        StateDirError,
        Superseded,
        TimedOut,
        Unavailable,
        UnsupportedPlatform,
        WrongKind,
        WrongProcess,
    )
    from orchestrator.machine.plan import Plan
    from orchestrator.machine.recovery import RestartPolicy
    from orchestrator.machine.states import State
    from orchestrator.models.variants import Variant
    from orchestrator.runtime.answers import (
        LeasedServer,
        LoadOutcome,
        LoadProgress,
        Options,
        PastLoad,
        PrefetchOutcome,
        Status,
        UnloadOutcome,
        Variants,
    )
    from orchestrator.runtime.events import Event
    from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
    from orchestrator.settings.fields import LoadFields
    from orchestrator.settings.request import LoadRequest
    from orchestrator.settings.target import ReloadReason

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "Busy CacheDirError Cancelled DeadlineExceeded DiskFull HubCorrupt HubError HubGated "
        "HubRateLimited HubUnauthorized HubUnreachable Interrupted InvalidModel InvalidRequest "
        "MalformedRequest ModelNotFound NotLoaded OrchestratorError Problem RefusedArgument "
        "ServerExited ServerStartFailed ServerUnavailable ShuttingDown SlotOccupied SlotOwned "
        "Stalled StateDirError Superseded TimedOut Unavailable UnsupportedPlatform WrongKind "
        "WrongProcess"
    ),
    "runtime.events": "Event",
    "runtime.orchestrator": "AsyncOrchestrator Orchestrator",
    "machine.plan": "Plan",
    "machine.recovery": "RestartPolicy",
    "settings.fields": "LoadFields",
    "settings.request": "LoadRequest",
    "settings.target": "ReloadReason",
    "machine.states": "State",
    "models.variants": "Variant",
    "runtime.answers": (
        "LeasedServer LoadOutcome LoadProgress Options PastLoad PrefetchOutcome Status "
        "UnloadOutcome Variants"
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AsyncOrchestrator",
    "Busy",
    "CacheDirError",
    "Cancelled",
    "DeadlineExceeded",
    "DiskFull",
    "Event",
    "HubCorrupt",
    "HubError",
    "HubGated",
    "HubRateLimited",
    "HubUnauthorized",
    "HubUnreachable",
    "Interrupted",
    "InvalidModel",
    "InvalidRequest",
    "LeasedServer",
    "LoadFields",
    "LoadOutcome",
    "LoadProgress",
    "LoadRequest",
    "MalformedRequest",
    "ModelNotFound",
    "NotLoaded",
    "Options",
    "Orchestrator",
    "OrchestratorError",
    "PastLoad",
    "Plan",
    "PrefetchOutcome",
    "Problem",
    "RefusedArgument",
    "ReloadReason",
    "RestartPolicy",
    "ServerExited",
    "ServerStartFailed",
    "ServerUnavailable",
    "ShuttingDown",
    "SlotOccupied",
    "SlotOwned",
    "Stalled",
    "State",
    "StateDirError",
    "Status",
    "Superseded",
    "TimedOut",
    "Unavailable",
    "UnloadOutcome",
    "UnsupportedPlatform",
    "Variant",
    "Variants",
    "WrongKind",
    "WrongProcess",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
