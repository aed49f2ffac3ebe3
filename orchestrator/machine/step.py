"""`step(state, ctx, fact) -> (state, ctx, commands)`: the table, interpreted by `transitions`.

Only this module imports `transitions`; the pool's table has the same interpreter. One synchronous
machine interprets every step. The model that it moves exists for one step and is never registered,
so nothing is shared: the same arguments give the same result. A fact for which no row fires is an
error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from transitions import Machine

from orchestrator.machine import guards
from orchestrator.machine.actions import ACTIONS
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import Command
from orchestrator.machine.context import Context
from orchestrator.machine.facts import Fact
from orchestrator.machine.rows import Row as AnyRow
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row

logging.getLogger("transitions").setLevel(logging.WARNING)  # it logs every step, 21 us each


class Stepped(NamedTuple):
    """The result of one fact."""

    state: State
    ctx: Context
    commands: tuple[Command, ...]


S = TypeVar("S", bound=StrEnum)


class InProgress(Protocol):
    """A step in progress: guards read its context and its fact, actions change it."""

    @property
    def ctx(self) -> Any: ...
    @property
    def fact(self) -> Any: ...


class Interpreter(Generic[S]):
    """An interpreter of a table over these states; `functions` has its guards and actions."""

    def __init__(
        self,
        states: type[S],
        table: Sequence[AnyRow[S]],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._states = states
        self._machine = Machine(
            model=None,
            states=[state.value for state in states],
            initial=next(iter(states)).value,
            auto_transitions=False,
            send_event=True,
        )
        for row in table:
            self._machine.add_transition(
                row.trigger,
                [source.value for source in row.sources],
                None if row.dest is None else row.dest.value,
                conditions=[_condition(functions[name]) for name in row.guards],
                before=[_callback(functions[name]) for name in row.actions],
            )

    def fire(self, state: S, step: InProgress) -> S:
        """Fire the first row whose guards all hold, and return the next state.

        Raises:
            LookupError: the table has no row for this fact in this state, which is a bug.
        """
        model, trigger = SimpleNamespace(state=state.value, step=step), step.fact.trigger
        event = self._machine.events.get(trigger)
        if event is None or state.value not in event.transitions:
            raise LookupError(f"no row for {trigger} in {state}")
        if not event.trigger(model):
            raise LookupError(f"no row of {trigger} in {state} fires")
        return self._states(model.state)


class Lifecycle:
    """An interpreter of a table; `replaced` guards and actions are used in place of the shipped."""

    def __init__(self, table: Sequence[Row] = TABLE, /, **replaced: Callable[..., Any]) -> None:
        functions = {**vars(guards), **ACTIONS, **replaced}
        self._interpreter = Interpreter(State, table, functions)

    def step(self, state: State, ctx: Context, fact: Fact) -> Stepped:
        """Return the next state, the next context and the commands to carry out.

        Raises:
            LookupError: the table has no row for this fact in this state, which is a bug.
        """
        step = Step(ctx, fact, ctx.is_due)
        after = self._interpreter.fire(state, step)
        return Stepped(after, step.ctx, tuple(step.emitted))


def _condition(guard: Callable[[Any, Any], bool]) -> Callable[[Any], bool]:
    return lambda event: guard(event.model.step.ctx, event.model.step.fact)


def _callback(action: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda event: action(event.model.step)


@cache
def lifecycle() -> Lifecycle:
    """Return the interpreter of the shipped table, built once."""
    return Lifecycle()


def step(state: State, ctx: Context, fact: Fact) -> Stepped:
    """Step the shipped table; see `Lifecycle.step`."""
    return lifecycle().step(state, ctx, fact)
