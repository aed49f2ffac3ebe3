"""What is explored: the programs of the clients, what may fail, and the owner and machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import Fact
from orchestrator.machine.states import State
from orchestrator.machine.step import Lifecycle, Stepped
from orchestrator.machine.table import TABLE, Row
from orchestrator.runtime.owner import Owner
from tests.kit.machine.programs import Action, parse

if TYPE_CHECKING:
    from tests.kit.shell.stage import Choose, Stage

Mishap = Literal[
    "kill", "download", "spawn", "probe", "crash", "stray", "keeper", "look-up", "hang", "host"
]

USUAL_MISHAPS: Final[frozenset[Mishap]] = frozenset({"kill", "download", "spawn", "probe", "crash"})
ALL_MISHAPS: Final[frozenset[Mishap]] = USUAL_MISHAPS | {"stray", "look-up"}
WITH_KEEPER: Final[frozenset[Mishap]] = frozenset({"keeper", "probe"})
WITH_HANG: Final[frozenset[Mishap]] = frozenset({"hang", "probe"})
WITH_HOST: Final[frozenset[Mishap]] = frozenset({"host", "probe"})


class RecordedLifecycle(Lifecycle):
    """A machine that remembers its last step, and every step: it is pure, so each is taken once.

    Args:
        table: The shipped one or a mutant.
        **names: Guards and actions to replace.
    """

    def __init__(self, table: Sequence[Row] = TABLE, **names: Callable[..., Any]) -> None:
        super().__init__(table, **names)
        self._last: Stepped | None = None
        self._steps: dict[tuple[State, Context, Fact], Stepped] = {}

    def step(self, state: State, ctx: Context, fact: Fact) -> Stepped:
        key = (state, ctx, fact)
        self._last = self._steps.get(key)
        if self._last is None:
            self._last = self._steps[key] = super().step(state, ctx, fact)
        return self._last

    @property
    def last(self) -> Stepped | None:
        """The step taken since the last `take_last`."""
        return self._last

    def take_last(self) -> Stepped | None:
        """Return the step taken since the last call of this, if there was one."""
        last, self._last = self._last, None
        return last


SHIPPED: Final = RecordedLifecycle()


@dataclass(frozen=True)
class Scene:
    """What is the same in all schedules.

    Attributes:
        program: What the clients do (see `tests.kit.machine.programs`).
        warm: A model that is Healthy at the start.
        mishaps: How many failures one schedule may have.
        kinds: Their kinds.
        pairs: How often a fact may arrive while the inbox holds another one.
        owner: The owner under test; a seeded fault is a subclass.
        machine: The machine it steps; a seeded fault is another table, guard or action.
        stage: The kind of stage; None = clients call the owner, without a facade.
    """

    program: str
    warm: str | None = None
    mishaps: int = 1
    kinds: frozenset[Mishap] = USUAL_MISHAPS
    pairs: int = 1
    policy: Policy = field(default_factory=Policy)
    owner: type[Owner] = Owner
    machine: RecordedLifecycle = SHIPPED
    stage: type[Stage] | None = None

    def begin(self, choose: Choose) -> Stage:
        from tests.kit.shell.stage import Stage

        return (self.stage or Stage)(self, choose)

    def simpler(self) -> Iterator[Scene]:
        """Yield smaller scenes, in which a counterexample is shorter."""
        texts = self.program.split("|")
        if len(texts) > 1:
            for left_out in range(len(texts)):
                rest = "|".join(text for n, text in enumerate(texts) if n != left_out).strip()
                yield replace(self, program=rest)
        if self.mishaps:
            yield replace(self, mishaps=self.mishaps - 1)
        if self.pairs:
            yield replace(self, pairs=self.pairs - 1)

    @cached_property
    def clients(self) -> tuple[tuple[Action, ...], ...]:
        return parse(self.program)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for client in self.clients for action in client)
