"""What Prometheus may ask, counted as the owner steps.

Every step is seen once, on the owner's thread; a scrape only reads, and is no use of a model.
Names and labels are part of the API: docs/http.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

import orchestrator
from orchestrator.errors import Problem
from orchestrator.machine.commands import Concluded, Loaded, ServerEnded, Settle
from orchestrator.machine.facts import LoadRequested
from orchestrator.machine.states import TIMED, State
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.runtime.snapshot import StepReport

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_NAMESPACE: Final = "llama_orchestrator"
_SECONDS: Final = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0),
    *(300.0, 600.0, 1800.0, 3600.0),
)


class Metrics:
    """Counts what an orchestrator does from now on.

    Args:
        orch: Whose.
        held: How many requests wait for a model right now.
    """

    def __init__(self, orch: AsyncOrchestrator, held: Callable[[], int] = lambda: 0) -> None:
        self._orch = orch
        self._registry = registry = CollectorRegistry()
        self._spent: dict[str, float] = dict.fromkeys(State, 0.0)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=_NAMESPACE, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=_NAMESPACE, registry=registry)

        self._transitions = counter(
            "transitions", "Transitions of the lifecycle.", "source", "dest", "trigger"
        )
        self._loads = counter("loads", "Loads, by what became of them.", "outcome")
        self._reasons = counter("reloads", "What made a running server the wrong one.", "field")
        self._exits = counter("server_exits", "Servers that ended, and how.", "how")
        self._phases = Histogram(
            "phase_seconds",
            "Time spent in one phase of a load or an unload.",
            ("phase",),
            namespace=_NAMESPACE,
            registry=registry,
            buckets=_SECONDS,
        )
        gauge("info", "Constant 1.", "version").labels(orchestrator.__version__).set(1)
        self._state = gauge("state", "1 for the present state, 0 for the others.", "state")
        gauge("generation", "Number of the newest load.").set_function(
            lambda: float(orch.status().generation)
        )
        gauge("leases", "Requests that use the server now.").set_function(
            lambda: float(orch.lease_count)
        )
        gauge("held_requests", "Requests that wait for a model now.").set_function(
            lambda: float(held())
        )
        registry.register(_StateSeconds(self.spent_s))
        for phase in TIMED.values():
            self._phases.labels(phase)
        for outcome in ("loaded", "already_loaded"):
            self._loads.labels(outcome)
        orch.observe(self._see)

    def render(self) -> bytes:
        """Return the text a scrape gets."""
        now = self._orch.status().state
        for state in State:
            self._state.labels(state).set(state is now)
        return generate_latest(self._registry)

    def spent_s(self) -> dict[str, float]:
        """Return the seconds spent in each state so far, the present one included."""
        now, spent = self._orch.status(), dict(self._spent)
        spent[now.state] += now.uptime_s
        return spent

    def _see(self, step: StepReport) -> None:
        """Count one step. On the owner's thread."""
        before, after = step.before, step.after
        if before.state is not after.state:
            took_s = after.entered_at - before.entered_at
            self._spent[before.state] += took_s
            self._transitions.labels(before.state, after.state, step.fact.trigger).inc()
            if before.state in TIMED:
                self._phases.labels(TIMED[before.state]).observe(took_s)
        for command in step.commands:
            match command:
                case Concluded(answer=answer):
                    self._count(answer)
                case ServerEnded(how=how):
                    self._exits.labels(how).inc()
                case Settle(answer=Loaded(already=True)) if isinstance(step.fact, LoadRequested):
                    self._loads.labels("already_loaded").inc()

    def _count(self, outcome: Loaded | Problem) -> None:
        if isinstance(outcome, Problem):
            self._loads.labels(outcome.category).inc()
            return
        self._loads.labels("already_loaded" if outcome.already else "loaded").inc()
        for reason in outcome.reload_reasons:
            self._reasons.labels(reason.field).inc()


class _StateSeconds(Collector):
    """The counter that goes on while nothing happens."""

    def __init__(self, spent_s: Callable[[], dict[str, float]]) -> None:
        self._spent_s = spent_s

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            f"{_NAMESPACE}_state_seconds", "Time spent in each state.", labels=("state",)
        )
        for state, seconds in self._spent_s().items():
            family.add_metric([state], seconds)
        yield family
