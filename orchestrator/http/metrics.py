"""Metrics for Prometheus, counted on the owner's thread as it steps.

A scrape is no use of a model. Names and labels are public: docs/http.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Protocol, get_args, get_type_hints

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

import orchestrator
from orchestrator.errors import CLASSES, Problem
from orchestrator.machine.commands import Concluded, Loaded, ServerEnded, Settle
from orchestrator.machine.facts import LoadRequested
from orchestrator.machine.states import TIMED, State
from orchestrator.runtime.answers import PromptsStatus, Status
from orchestrator.runtime.snapshot import Observer, StepReport

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
NAMESPACE: Final = "llama_orchestrator"
SECONDS: Final = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0),
    *(300.0, 600.0, 1800.0, 3600.0),
)


class Slot(Protocol):
    """What is counted: an orchestrator, or one model of a pool."""

    def status(self) -> Status: ...
    def observe(self, observer: Observer) -> None: ...
    @property
    def lease_count(self) -> int: ...


class Metrics(Collector):
    """Metrics of an orchestrator from now on.

    Args:
        orch: The orchestrator.
        held: Returns how many requests wait for a model.
    """

    def __init__(self, orch: Slot, held: Callable[[], int] = lambda: 0) -> None:
        self._orch = orch
        self._registry = registry = CollectorRegistry()
        self._spent_s = dict.fromkeys(State, 0.0)
        counter = partial(Counter, namespace=NAMESPACE, registry=registry)
        gauge = partial(Gauge, namespace=NAMESPACE, registry=registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=registry)

        self._transitions = counter(
            "transitions", "Transitions of the lifecycle.", ("source", "dest", "trigger")
        )
        self._loads = counter("loads", "Loads by outcome.", ("outcome",))
        self._reloads = counter("reloads", "Settings whose change caused a reload.", ("field",))
        self._exits = counter("server_exits", "Servers that ended, by cause.", ("how",))
        text = "Time spent in one phase of a load or an unload."
        self._phases = histogram("phase_seconds", text, ("phase",), buckets=SECONDS)
        gauge("info", "Constant 1.", ("version",)).labels(orchestrator.__version__).set(1)
        self._state = gauge("state", "1 for the current state, 0 for the others.", ("state",))
        gauge("generation", "Generation of the newest load.").set_function(
            lambda: orch.status().generation
        )
        gauge("leases", "Requests that use the server.").set_function(lambda: orch.lease_count)
        gauge("held_requests", "Requests that wait for a model.").set_function(held)
        registry.register(self)
        for phase in TIMED.values():
            self._phases.labels(phase)
        # A series that begins with 1 has not increased, for Prometheus: they begin with 0.
        for outcome in ("loaded", "already_loaded", *CLASSES):
            self._loads.labels(outcome)
        for how in get_args(get_type_hints(ServerEnded)["how"]):
            self._exits.labels(how)
        orch.observe(self._count_step)

    def render(self) -> bytes:
        """Return the text of a scrape."""
        self._mark_state()
        return generate_latest(self._registry)

    def families(self) -> Iterator[Metric]:
        """Yield what a scrape has, for a text of several slots."""
        self._mark_state()
        return iter(self._registry.collect())

    def _mark_state(self) -> None:
        current = self._orch.status().state
        for state in State:
            self._state.labels(state).set(state is current)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counters that also increase between two steps."""
        family = CounterMetricFamily(
            f"{NAMESPACE}_state_seconds", "Time spent in each state.", labels=("state",)
        )
        now = self._orch.status()
        for state, spent_s in self._spent_s.items():
            family.add_metric([state], spent_s + (now.uptime_s if state is now.state else 0.0))
        yield family
        yield from _of_prompts(now.prompts or PromptsStatus(0, 0, 0))

    def _count_step(self, step: StepReport) -> None:
        before, after = step.before, step.after
        if before.state is not after.state:
            took_s = after.entered_at - before.entered_at
            self._spent_s[before.state] += took_s
            self._transitions.labels(before.state, after.state, step.fact.trigger).inc()
            if before.state in TIMED:
                self._phases.labels(TIMED[before.state]).observe(took_s)
        for command in step.commands:
            match command:
                case Concluded(answer=Problem(category=category)):
                    self._loads.labels(category).inc()
                case Concluded(answer=Loaded() as loaded):
                    self._loads.labels("already_loaded" if loaded.already else "loaded").inc()
                    for reason in loaded.reload_reasons:
                        self._reloads.labels(reason.field).inc()
                case ServerEnded(how=how):
                    self._exits.labels(how).inc()
                case Settle(answer=Loaded(already=True)) if isinstance(step.fact, LoadRequested):
                    self._loads.labels("already_loaded").inc()


def _of_prompts(prompts: PromptsStatus) -> Iterator[CounterMetricFamily]:
    for name, value in prompts.as_dict().items():
        what = name.removeprefix("tokens_")
        about = f"Tokens of prompts that keep_prompts has {what}."
        yield CounterMetricFamily(f"{NAMESPACE}_prompt_tokens_{what}", about, value=value)
