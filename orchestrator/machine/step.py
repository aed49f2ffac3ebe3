"""`step(state, ctx, fact) -> (state, ctx, commands)`: the table, interpreted by `transitions`.

The only import of `transitions`. One synchronous machine is built from TABLE and interprets every
step; the object it moves lives for one step and is never registered, so nothing is shared and
`step` is pure: the same arguments give the same answer, and a fact that fires no row is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from transitions import Machine

from orchestrator.machine import actions, guards
from orchestrator.machine.actions.working import Step
from orchestrator.machine.commands import Command
from orchestrator.machine.context import Context
from orchestrator.machine.facts import Fact
from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row

logging.getLogger("transitions").setLevel(logging.WARNING)  # it logs each step, 21 µs a time


class Stepped(NamedTuple):
    """The outcome of one fact."""

    state: State
    ctx: Context
    commands: tuple[Command, ...]


class _Moving:
    """What `transitions` moves: one step's state and working context."""

    __slots__ = ("state", "step")

    def __init__(self, state: State, step: Step[Fact]) -> None:
        self.state: str = state.value
        self.step = step


class Lifecycle:
    """An interpreter of one table. The shipped one is `LIFECYCLE`; tests make others."""

    def __init__(
        self,
        table: Sequence[Row] = TABLE,
        *,
        guard_names: ModuleType | dict[str, Callable[..., bool]] = guards,
        action_names: ModuleType | dict[str, Callable[..., None]] = actions,
    ) -> None:
        self._machine = Machine(
            model=None,
            states=[state.value for state in State],
            initial=State.IDLE.value,
            auto_transitions=False,
            send_event=True,
        )
        for row in table:
            self._machine.add_transition(
                row.trigger,
                [source.value for source in row.sources],
                None if row.dest is None else row.dest.value,
                conditions=[_condition(_named(guard_names, name)) for name in row.guards],
                before=[_callback(_named(action_names, name)) for name in row.actions],
            )

    def step(self, state: State, ctx: Context, fact: Fact) -> Stepped:
        """Return what one fact does: the next state, the next context, and what to carry out.

        Raises:
            LookupError: the table has no row for this fact in this state (a broken table).
        """
        moving = _Moving(state, Step(ctx, fact))
        event = self._machine.events.get(fact.trigger)
        if event is None or state.value not in event.transitions:
            raise LookupError(f"no row for {fact.trigger} in {state}")
        if not event.trigger(moving):
            raise LookupError(f"no row of {fact.trigger} in {state} fires")
        return Stepped(State(moving.state), moving.step.ctx, tuple(moving.step.commands))


def _named(names: ModuleType | dict[str, Any], name: str) -> Any:
    return names[name] if isinstance(names, dict) else getattr(names, name)


def _condition(guard: Callable[[Context, Any], bool]) -> Callable[[Any], bool]:
    return lambda event: guard(event.model.step.ctx, event.model.step.fact)


def _callback(action: Callable[[Step[Fact]], None]) -> Callable[[Any], None]:
    return lambda event: action(event.model.step)


@cache
def lifecycle() -> Lifecycle:
    """The interpreter of the shipped table, built once."""
    return Lifecycle()


def step(state: State, ctx: Context, fact: Fact) -> Stepped:
    """Step the shipped table; see `Lifecycle.step`."""
    return lifecycle().step(state, ctx, fact)
