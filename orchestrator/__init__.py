"""llama-orchestrator: owns one llama-server process, from Idle to Healthy and back.

The public names are imported on first use, which keeps `import orchestrator` cheap for child
processes that need one module only.
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
        InvalidCatalogue,
        InvalidModel,
        InvalidRequest,
        MalformedRequest,
        ModelNotFound,
        NameTaken,
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
        TooLarge,
        TooManyWaiting,
        Unavailable,
        UnknownGeneration,
        Unreachable,
        WrongKind,
        WrongProcess,
    )
    from orchestrator.machine.plan import Plan
    from orchestrator.machine.recovery import RestartPolicy
    from orchestrator.machine.states import State
    from orchestrator.models.variants import Variant
    from orchestrator.pool.catalogue import Changes
    from orchestrator.pool.context import Turn
    from orchestrator.pool.pool import AsyncModelPool, AsyncModelView, ModelPool, ModelView
    from orchestrator.pool.remote import (
        AsyncRemoteModelPool,
        AsyncRemoteModelView,
        RemoteModelPool,
        RemoteModelView,
    )
    from orchestrator.pool.status import ModelStatus, PoolStatus
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
    from orchestrator.runtime.remote import AsyncRemoteOrchestrator, RemoteOrchestrator
    from orchestrator.settings.fields import LoadFields
    from orchestrator.settings.memory import Memory
    from orchestrator.settings.request import LoadRequest
    from orchestrator.settings.target import ReloadReason

__version__ = "0.1.0"

__all__ = [
    "AsyncModelPool",
    "AsyncModelView",
    "AsyncOrchestrator",
    "AsyncRemoteModelPool",
    "AsyncRemoteModelView",
    "AsyncRemoteOrchestrator",
    "Busy",
    "CacheDirError",
    "Cancelled",
    "Changes",
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
    "InvalidCatalogue",
    "InvalidModel",
    "InvalidRequest",
    "LeasedServer",
    "LoadFields",
    "LoadOutcome",
    "LoadProgress",
    "LoadRequest",
    "MalformedRequest",
    "Memory",
    "ModelNotFound",
    "ModelPool",
    "ModelStatus",
    "ModelView",
    "NameTaken",
    "NotLoaded",
    "Options",
    "Orchestrator",
    "OrchestratorError",
    "PastLoad",
    "Plan",
    "PoolStatus",
    "PrefetchOutcome",
    "Problem",
    "RefusedArgument",
    "ReloadReason",
    "RemoteModelPool",
    "RemoteModelView",
    "RemoteOrchestrator",
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
    "TooLarge",
    "TooManyWaiting",
    "Turn",
    "Unavailable",
    "UnknownGeneration",
    "UnloadOutcome",
    "Unreachable",
    "Variant",
    "Variants",
    "WrongKind",
    "WrongProcess",
    "__version__",
]


_HOMES = {
    "runtime.events": "Event",
    "runtime.orchestrator": "AsyncOrchestrator Orchestrator",
    "runtime.remote": "AsyncRemoteOrchestrator RemoteOrchestrator",
    "machine.plan": "Plan",
    "machine.recovery": "RestartPolicy",
    "machine.states": "State",
    "models.variants": "Variant",
    "pool.catalogue": "Changes",
    "pool.pool": "AsyncModelPool AsyncModelView ModelPool ModelView",
    "pool.remote": ("AsyncRemoteModelPool AsyncRemoteModelView RemoteModelPool RemoteModelView"),
    "pool.context": "Turn",
    "pool.status": "ModelStatus PoolStatus",
    "settings.fields": "LoadFields",
    "settings.memory": "Memory",
    "settings.request": "LoadRequest",
    "settings.target": "ReloadReason",
    "runtime.answers": (
        "LeasedServer LoadOutcome LoadProgress Options PastLoad PrefetchOutcome Status "
        "UnloadOutcome Variants"
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME_OF.get(name, 'errors')}")
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return __all__
