"""Metrics of a pool: those of every model with a label `model`, and those of the pool itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Container, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from orchestrator.errors import ModelNotFound
from orchestrator.http.metrics import NAMESPACE, SECONDS, Metrics
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.runtime.answers import Status
from orchestrator.runtime.snapshot import Observer, StepReport

_MIB: Final = 1 << 20


class _Model:
    """One model of the pool, as `Metrics` sees it."""

    def __init__(self, pool: AsyncModelPool, name: str) -> None:
        self._pool = pool
        self._name = name
        self.observers: list[Observer] = []

    def status(self) -> Status:
        return self._pool.slot_status(self._name)

    def observe(self, observer: Observer) -> None:
        self.observers.append(observer)

    def waiting(self) -> int:
        with contextlib.suppress(ModelNotFound):  # it has just been removed
            return self._pool.model_status(self._name).waiting
        return 0

    @property
    def lease_count(self) -> int:
        return self._pool.facade_of(self._name).lease_count


class PoolMetrics(Collector):
    """Metrics of a pool from now on. A model that is removed takes its series along."""

    def __init__(self, pool: AsyncModelPool) -> None:
        self._pool = pool
        self._guard = threading.Lock()  # of the models: slots report on threads of their own
        self._models: dict[str, tuple[_Model, Metrics]] = {}
        self._registry = CollectorRegistry()
        self._waits = Histogram(
            "pool_wait_seconds",
            "How long requests have waited for their model.",
            ("model",),
            namespace=NAMESPACE,
            registry=self._registry,
            buckets=SECONDS,
        )
        self._registry.register(self)
        pool.feed.observe(self._count)

    def render(self, names: Container[str] | None = None) -> bytes:
        """Return the text of a scrape; with names, only what is of these models."""
        with self._guard:
            for gone in self._models.keys() - set(self._names()):
                del self._models[gone]
                with contextlib.suppress(KeyError):
                    self._waits.remove(gone)
        return generate_latest(self._registry if names is None else _Only(self._registry, names))

    def _names(self) -> list[str]:
        return [entry.name for entry in self._pool.catalogue.models.values() if entry.request]

    def waited(self, name: str, seconds: float) -> None:
        """Count a request that has got its model."""
        self._waits.labels(name).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield what changes without being counted here, and the metrics of every model."""
        by_model = {name: list(self._of(name)[1].families()) for name in self._names()}
        yield from _merged(by_model)
        yield from self._own()

    def _own(self) -> Iterator[Metric]:
        status = self._pool.status()
        budget = _gauge("pool_budget_bytes", "Memory that the models may have.", "device")
        reserved = _gauge("pool_reserved_bytes", "Memory that models hold on paper.", "device")
        for device in status.budget:
            budget.add_metric([device.device], device.total_mib * _MIB)
            reserved.add_metric([device.device], device.reserved_mib * _MIB)
        waiting = _gauge("pool_waiting", "Requests that wait for a model.", "model")
        for model in status.models:
            waiting.add_metric([model.name], model.waiting)
        about = "Models that were stopped for others, or because they were not used."
        name = f"{NAMESPACE}_pool_evictions"
        evictions = CounterMetricFamily(name, about, labels=("reason",))
        for reason, count in self._pool.evictions.items():
            evictions.add_metric([reason], count)
        yield from (budget, reserved, waiting, evictions)

    def _count(self, name: str, report: StepReport) -> None:
        for observer in self._of(name)[0].observers:
            observer(report)

    def _of(self, name: str) -> tuple[_Model, Metrics]:
        with self._guard:
            if (found := self._models.get(name)) is None:
                model = _Model(self._pool, name)
                found = self._models[name] = model, Metrics(model, model.waiting)
            return found


class _Only(CollectorRegistry):
    """The samples of some models."""

    def __init__(self, whole: CollectorRegistry, names: Container[str]) -> None:
        super().__init__()
        self._whole = whole
        self._seen = names

    def collect(self) -> Iterator[Metric]:
        for family in self._whole.collect():
            only = Metric(family.name, family.documentation, family.type)
            only.samples = [one for one in family.samples if one.labels.get("model") in self._seen]
            if only.samples:
                yield only


def _gauge(name: str, about: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", about, labels=(label,))


def _merged(by_model: dict[str, list[Metric]]) -> Iterable[Metric]:
    """Return one family for each name, whose samples have the model they are of."""
    merged: dict[str, Metric] = {}
    for model, families in by_model.items():
        for family in families:
            about = family.name, family.documentation, family.type
            one = merged.setdefault(family.name, Metric(*about))
            for sample in family.samples:
                one.samples.append(sample._replace(labels={"model": model, **sample.labels}))
    return merged.values()
