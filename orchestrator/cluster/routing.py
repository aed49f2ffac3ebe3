"""Which replica a request goes to: pure functions of what the replicas report.

To one where the model is resident, else loading, else to one with room, else to the one that frees
it cheapest. This is a hint only: the replica decides. Fronts that see the same reports choose the
same replica for a model that is nowhere, so that it is loaded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from orchestrator.base.record import Record
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.policy import Candidate, cheapest, cost_of

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelReport(Record):
    """A model in one replica.

    Attributes:
        value: `loaded`, `loading`, `failed` or `unloaded`, as `/v1/models` lists it.
        requests: Those at its server, and those that wait for it.
        mib: What is reserved for it, or what it would need, by device; empty if unknown.
        unused_s: Seconds since its last use.
        is_ours: Whether it is loaded here, and not passed on to another server.
    """

    name: str
    value: str
    requests: int = 0
    mib: Mapping[str, int] = field(default_factory=dict)
    unused_s: float = 0.0
    pinned: bool = False
    is_ours: bool = True


@dataclass(frozen=True, slots=True)
class ReplicaReport(Record):
    """A replica at one moment.

    Attributes:
        replica: Its id.
        node: The id of its node.
        url: Where its listener is; None before it listens, and once it stops.
        key: What its listener wants from fronts.
        is_ready: Whether its preloads are settled.
        free: MiB by device that nothing has reserved.
        names: Entries by every name that a request may use.
        default: The entry for requests that name none.
        problem: Why it does not serve, or does not serve its newest catalogue.
    """

    replica: str
    node: str
    url: str | None = None
    key: str = field(default="", repr=False)
    is_ready: bool = False
    free: Mapping[str, int] = field(default_factory=dict)
    models: tuple[ModelReport, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    problem: Mapping[str, Any] | None = None

    def only(self, visible: Collection[str]) -> ReplicaReport:
        """Return what may be told to somebody who sees these models of the pool."""
        if all(model.name in visible for model in self.models):
            return self
        return ReplicaReport(
            self.replica,
            self.node,
            is_ready=self.is_ready,
            models=tuple(model for model in self.models if model.name in visible),
            names={name: entry for name, entry in self.names.items() if entry in visible},
            default=self.default if self.default in visible else None,
        )

    def find(self, asked: str | None) -> ModelReport | None:
        """Return the model that a request means; None is the default."""
        name = self.default if asked is None else self.names.get(asked)
        return next((model for model in self.models if model.name == name), None)


class Rank(IntEnum):
    """How good a replica is for a model; the lowest is the best."""

    RESIDENT = 0
    LOADING = 1
    ROOM = 2
    EVICTION = 3
    OTHER = 4


def choose(
    reports: Iterable[ReplicaReport], asked: str | None, tried: Collection[str] = ()
) -> ReplicaReport | None:
    """Return the replica to ask for a model; None if there is no other one that listens.

    Args:
        asked: The name in the request; None is the default.
        tried: Ids of replicas that could not answer it.
    """
    known = [report for report in reports if report.url is not None]
    left = [report for report in known if report.replica not in tried]
    return min(left, key=lambda report: _rank(report, asked, known), default=None)


def _rank(
    report: ReplicaReport, asked: str | None, known: Collection[ReplicaReport]
) -> tuple[Rank, float, bytes]:
    model, own = report.find(asked), _own_number(report, asked)
    match model:
        case None | ModelReport(value="failed"):
            return Rank.OTHER, 0.0, own
        case ModelReport(value="loaded"):
            return Rank.RESIDENT, model.requests, own
        case ModelReport(value="loading"):
            return Rank.LOADING, model.requests, own
    lack = _need(model, asked, known).beyond(Amounts.of(report.free))
    if not lack:
        return Rank.ROOM, 0.0, own
    cost = eviction_cost(report, lack)
    return (Rank.OTHER, 0.0, own) if cost is None else (Rank.EVICTION, cost, own)


def _own_number(report: ReplicaReport, asked: str | None) -> bytes:
    """Return what orders equals: the same in every front, another one for each model."""
    return hashlib.sha256(f"{asked}\0{report.replica}".encode()).digest()


def _need(model: ModelReport, asked: str | None, known: Iterable[ReplicaReport]) -> Amounts:
    """Return what a load would reserve, as this replica or another one knows it."""
    if not model.mib:
        others = (report.find(asked) for report in known)
        return Amounts.of(next((other.mib for other in others if other and other.mib), {}))
    return Amounts.of(model.mib)


def eviction_cost(report: ReplicaReport, lack: Amounts) -> float | None:
    """Return the cost of the cheapest set of idle models that makes room; None if none does."""
    costs = {
        model.name: cost_of(sum(model.mib.values()) * _MIB, model.unused_s)
        for model in report.models
        if model.value == "loaded" and model.is_ours and not (model.pinned or model.requests)
    }
    residents = [
        Candidate(model.name, Amounts.of(model.mib), costs[model.name])
        for model in report.models
        if model.name in costs
    ]
    gone = cheapest(lack, residents)
    return None if gone is None else sum(costs[name] for name in gone)
