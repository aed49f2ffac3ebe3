"""What is explored of a pool: the programs of its clients, its models, and what may fail.

Clients are separated by `|`, the calls of one client by `;`:

    lease A; release | load B; withdraw | unload A

A client does not wait for its answers, except that a lease is released only after it was granted.
`request A` is the lease of a request, of which only as many are at a server as it has places;
`reload A` loads it anew, `cut A` unloads it without waiting for leases, and `withdraw` interrupts
the client's last call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from orchestrator.pool.owner import PoolOwner
from orchestrator.pool.slot import PoolSlot
from tests.kit.pool.world import Model, Scenario

if TYPE_CHECKING:
    from tests.kit.shell.pool_stage import Choose, PoolStage

# fmt: off
Verb = Literal[
    "lease", "request", "load", "reload", "unload", "cut", "cancel", "remove", "add", "shutdown",
    "withdraw", "release",
]
# fmt: on
Mishap = Literal["crash", "probe", "kill"]
ALL: Final[frozenset[Mishap]] = frozenset({"crash", "probe", "kill"})
_OF_CALLS: Final = ("withdraw", "release")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a client; `refers` is the index of the call it is about, or its own."""

    verb: Verb
    text: str
    index: int
    refers: int
    model: str = ""


@dataclass(frozen=True)
class PoolScene:
    """What is the same in all schedules.

    Attributes:
        program: What the clients do.
        sizes: Of the models A, B, C … in MiB.
        budget: MiB.
        warm: Models that are resident at the start.
        places: How many requests may be at a server.
        mishaps: How many failures one schedule may have.
        kinds: Their kinds.
        pairs: How often something may come before what would come by itself at once.
        ticks: How often a timer may fire while something else could still happen.
        owner, slot: Under test; a seeded fault is a subclass.
        stage: The kind of stage, by facade.
    """

    program: str
    stage: type[PoolStage]
    sizes: tuple[int, ...] = (1, 1)
    budget: int = 1
    warm: str = ""
    places: int = 1
    mishaps: int = 0
    kinds: frozenset[Mishap] = ALL
    pairs: int = 1
    ticks: int = 0
    owner: type[PoolOwner] = PoolOwner
    slot: type[PoolSlot] = PoolSlot

    def on(self, stage: type[PoolStage]) -> PoolScene:
        """Return the same scene for another facade."""
        return replace(self, stage=stage)

    def with_fault(self, **parts: Any) -> PoolScene:
        """Return the same scene with another owner or slot."""
        return replace(self, **parts)

    def begin(self, choose: Choose) -> PoolStage:
        return self.stage(self, choose)

    def simpler(self) -> Iterator[PoolScene]:
        """Yield smaller scenes, in which a counterexample is shorter."""
        texts = self.program.split("|")
        for left_out in range(len(texts) if len(texts) > 1 else 0):
            rest = "|".join(text for n, text in enumerate(texts) if n != left_out).strip()
            yield replace(self, program=rest)
        for name in ("mishaps", "pairs", "ticks"):
            if count := getattr(self, name):
                yield replace(self, **{name: count - 1})

    @property
    def names(self) -> str:
        return "ABCDEFGH"[: len(self.sizes)]

    @cached_property
    def scenario(self) -> Scenario:
        """The same for the invariants of the machine."""
        models = tuple(Model((size,)) for size in self.sizes)
        return Scenario(models, ((self.budget,),))

    @cached_property
    def clients(self) -> tuple[tuple[Action, ...], ...]:
        found: list[tuple[Action, ...]] = []
        count = 0
        for client in self.program.split("|"):
            actions: list[Action] = []
            for text in client.split(";"):
                verb, _, model = text.strip().partition(" ")
                assert verb in get_args(Verb), verb
                refers = count
                if verb in _OF_CALLS:
                    refers = next(a.index for a in reversed(actions) if a.verb not in _OF_CALLS)
                actions.append(Action(cast("Verb", verb), text.strip(), count, refers, model))
                count += 1
            found.append(tuple(actions))
        return tuple(found)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for client in self.clients for action in client)
