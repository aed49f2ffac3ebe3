"""Actions of the pool's table: each replaces the frozen context and appends commands. No I/O.

The order of the actions in a row matters: first what ends and what is released, then what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar

from orchestrator.errors import Problem
from orchestrator.machine.recovery import backoff_s
from orchestrator.pool import commands, facts
from orchestrator.pool.context import Context, Entry, Need, Waiter
from orchestrator.pool.facts import Fact, Use
from orchestrator.pool.guards import resized, restarts_in_a_row
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.policy import after_turns, evictable
from orchestrator.pool.states import State

MAX_COOL_DOWN_S: Final = 60.0
NOT_STARTED: Final = Problem("server_start_failed", "the server ended before it was ready")

F_co = TypeVar("F_co", bound=Fact, covariant=True)


@dataclass(slots=True)
class Step(Generic[F_co]):
    """One fact being processed: the context and the commands so far.

    The type argument in an action's signature lists the facts it may be used with; a test compares
    it with the table.
    """

    ctx: Context
    fact: F_co
    emitted: list[commands.Command] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)  # the evidence, and the grants of this step

    def __post_init__(self) -> None:
        self.uses = {use.name: use for use in self.fact.uses}

    @property
    def entry(self: Step[facts.OfEntry]) -> Entry:
        """The entry that the fact is about.

        Raises:
            LookupError: it is not there, which means that the table is wrong.
        """
        return self.entry_of(self.fact.name)

    def entry_of(self, name: str) -> Entry:
        entry = self.ctx.find(name)
        if entry is None:
            raise LookupError(f"no guard of this row has checked that {name} is there")
        return entry

    def put(self, **changes: Any) -> None:
        self.ctx = self.ctx.updated(**changes)

    def change(self, name: str, **changes: Any) -> None:
        self.ctx = self.ctx.changing(replace(self.entry_of(name), **changes))

    def emit(self, *new: commands.Command) -> None:
        self.emitted.extend(new)

    def stop(self, name: str, reason: commands.Reason, **how: Any) -> None:
        """Stop the server of an entry; from now on it is a victim like any other."""
        self.emit(commands.Stop(name, self.entry_of(name).generation, reason, **how))
        self.change(name, state=State.STOPPING)

    def enqueue(self, waiter: Waiter) -> None:
        self.put(waiting=(*self.ctx.waiting, waiter))

    def grant(self, waiter: Waiter) -> None:
        """Answer a caller; its lease counts as use in this very step."""
        if waiter.ticket is not None:
            self.emit(commands.Grant(waiter.ticket, waiter.name))
        if waiter.gets_in:
            self.uses[waiter.name] = Use(waiter.name, True, self.fact.at)

    def refuse(self, refused: Iterable[Waiter], problem: Problem) -> None:
        """Answer these waiters with a problem, and forget them."""
        gone = tuple(refused)
        for waiter in gone:
            if waiter.ticket is not None:
                self.emit(commands.Refuse(waiter.ticket, waiter.name, problem))
        self.put(waiting=tuple(waiter for waiter in self.ctx.waiting if waiter not in gone))

    def give_up(self, name: str, problem: Problem) -> None:
        """Refuse everybody who waits for a model; what the house wanted gets a warning."""
        for waiter in self.ctx.waiters_of(name):
            if waiter.kind == "preload" or waiter.kind == "restart":
                self.emit(commands.GiveUp(name, waiter.kind, problem))
        self.refuse(self.ctx.waiters_of(name), problem)


# ------------------------------------------------------------------------------ who wants a model
def refuse_shutting_down(s: Step[facts.Wanted]) -> None:
    s.emit(commands.Refuse(s.fact.ticket, s.fact.name, _SHUTTING_DOWN))


def refuse_unknown(
    s: Step[facts.Wanted | facts.UnloadRequested | facts.CancelRequested | facts.Removed],
) -> None:
    if s.fact.ticket is not None:
        s.emit(commands.Refuse(s.fact.ticket, s.fact.name, _unknown(s.fact.name)))


def refuse_failed(s: Step[facts.Wanted]) -> None:
    s.emit(commands.Refuse(s.fact.ticket, s.fact.name, _failed(s.entry, s.fact.at)))


def refuse_too_many(s: Step[facts.Wanted]) -> None:
    message = f"{s.ctx.policy.max_waiting} requests wait for a model already: try again later"
    later = max(1.0, s.ctx.policy.min_resident_s)  # before that hardly anything can change
    problem = Problem("too_many_waiting", message, retry_after_s=later)
    s.emit(commands.Refuse(s.fact.ticket, s.fact.name, problem))


def grant(s: Step[facts.Wanted]) -> None:
    s.grant(_waiter(s.fact))


def enqueue(s: Step[facts.Wanted]) -> None:
    """The caller waits. A load by hand ends a cool-down."""
    s.enqueue(_waiter(s.fact))
    if s.fact.kind == "load":
        s.change(s.fact.name, cool_until=None)


def _waiter(fact: facts.Wanted) -> Waiter:
    return Waiter(fact.name, fact.kind, fact.at, fact.ticket, fact.turn)


def enqueue_preload(s: Step[facts.Preloaded]) -> None:
    s.enqueue(Waiter(s.fact.name, "preload", s.fact.at))


def reserve_larger(s: Step[facts.Wanted]) -> None:
    """Until the old server is gone, a reload holds the larger of old and new, if there is room."""
    held, claim = s.ctx.ledger.of(s.fact.name), s.entry.claim
    if claim is not None and claim.larger(held).fits(s.ctx.ledger.free + held):
        s.put(ledger=s.ctx.ledger.reserving(s.fact.name, claim.larger(held)))


def stop_to_reload(s: Step[facts.Wanted]) -> None:
    s.stop(s.fact.name, "reload")


def stop_again(s: Step[facts.Wanted]) -> None:
    s.stop(s.fact.name, "stuck")


def forget_ticket(s: Step[facts.Withdrawn]) -> None:
    """Also one of a call that waits for an empty slot."""
    ticket = s.fact.ticket
    s.put(waiting=tuple(waiter for waiter in s.ctx.waiting if waiter.ticket != ticket))
    if (entry := s.ctx.find(s.fact.name)) is not None and ticket in entry.emptying:
        s.change(entry.name, emptying=tuple(one for one in entry.emptying if one != ticket))


def stop_unwanted(s: Step[facts.Withdrawn | facts.CancelRequested]) -> None:
    s.stop(s.fact.name, "withdrawn")


def answer_cancelled(s: Step[facts.CancelRequested]) -> None:
    s.emit(commands.AnswerCancelled(s.fact.ticket, is_cancelled=True))


def answer_not_cancelled(s: Step[facts.CancelRequested]) -> None:
    s.emit(commands.AnswerCancelled(s.fact.ticket, is_cancelled=False))


def cancel_waiters(s: Step[facts.UnloadRequested | facts.CancelRequested]) -> None:
    how = "unloaded" if isinstance(s.fact, facts.UnloadRequested) else "cancelled"
    message = f"{s.fact.name} was {how} while this call waited for it"
    s.refuse(s.ctx.waiters_of(s.fact.name), Problem("cancelled", message))


def await_empty(s: Step[facts.UnloadRequested | facts.Removed]) -> None:
    if s.fact.ticket is not None:
        s.change(s.fact.name, emptying=(*s.entry.emptying, s.fact.ticket))


def stop_as_asked(s: Step[facts.UnloadRequested]) -> None:
    s.stop(s.fact.name, "unload", cut=s.fact.cut)


def answer_emptied(s: Step[facts.UnloadRequested | facts.Removed | facts.Emptied]) -> None:
    s.emit(*(commands.AnswerEmptied(ticket, s.fact.name) for ticket in s.entry.emptying))
    s.change(s.fact.name, emptying=())


# --------------------------------------------------------------------------------- the catalogue
def put_definition(s: Step[facts.Defined]) -> None:
    """A figure that was learned stays, unless the server is another one, or one is declared."""
    fact, known, edition = s.fact, s.ctx.find(s.fact.name), s.ctx.edition + 1
    if known is None:
        entry = Entry(fact.name, fact.definition, edition=edition)
        s.put(entries=(*s.ctx.entries, entry), edition=edition)
    elif not fact.is_other_server:
        was, now = known.definition.need, fact.definition.need
        learned = was if was is not None and was.source != "declared" else None
        size_bytes = fact.definition.size_bytes or known.definition.size_bytes
        need = now if now is not None and now.source == "declared" else learned or now
        definition = replace(fact.definition, need=need, size_bytes=size_bytes)
        s.change(fact.name, definition=definition, is_removed=False)
    else:
        s.put(edition=edition)
        s.change(
            fact.name,
            definition=fact.definition,
            is_removed=False,
            edition=edition,
            is_measuring=False,
            is_changed=known.state in (State.STARTING, State.RESIDENT),
            cool_until=None,
            failures=0,
        )
    s.ctx = s.ctx.with_budget()


def refuse_waiters_unknown(s: Step[facts.Removed]) -> None:
    s.refuse(s.ctx.waiters_of(s.fact.name), _unknown(s.fact.name))


def mark_removed(s: Step[facts.Removed]) -> None:
    s.change(s.fact.name, is_removed=True)


def stop_removed(s: Step[facts.Removed]) -> None:
    s.stop(s.fact.name, "removed")


def forget_entry(s: Step[facts.Removed | facts.Emptied]) -> None:
    s.put(entries=tuple(entry for entry in s.ctx.entries if entry.name != s.fact.name))
    s.ctx = s.ctx.with_budget()


def take_need(s: Step[facts.Measured]) -> None:
    """A declared need stays; the size of the files is measured in any case."""
    entry = s.entry
    need = entry.definition.need or s.fact.need
    size_bytes = s.fact.size_bytes or entry.definition.size_bytes
    definition = replace(entry.definition, need=need, size_bytes=size_bytes)
    s.change(s.fact.name, definition=definition, is_measuring=False)


def end_measuring(s: Step[facts.MeasureFailed]) -> None:
    s.change(s.fact.name, is_measuring=False)


def reserve_adopted(s: Step[facts.Adopted]) -> None:
    s.change(s.fact.name, generation=s.fact.generation, basis="exact", is_changed=False)
    held = s.fact.reserved + s.entry.places
    newest = max(s.ctx.generation, s.fact.generation)
    s.put(ledger=s.ctx.ledger.reserving(s.fact.name, held), generation=newest)


# ---------------------------------------------------------------------------------- Starting
def note_figure(s: Step[facts.Sized]) -> None:
    s.change(s.fact.name, server=s.fact.figure)


def learn_figure(s: Step[facts.Sized]) -> None:
    """The next start needs exactly this, unless it will be of another server."""
    if not s.entry.is_changed:
        known = s.entry.definition.need
        least = known.least if known is not None else None
        s.ctx = s.ctx.changing(s.entry.with_need(Need(s.fact.figure, "exact", least)))


def reserve_figure(s: Step[facts.Sized]) -> None:
    held = resized(s.ctx, s.entry, s.fact.figure)
    s.put(ledger=s.ctx.ledger.reserving(s.fact.name, held))
    s.change(s.fact.name, basis="exact")


def stop_outgrown(s: Step[facts.Sized | facts.BecameHealthy]) -> None:
    s.stop(s.fact.name, "figure")


def fail_outgrown(s: Step[facts.BecameHealthy]) -> None:
    held = s.ctx.ledger.of(s.fact.name)
    message = (
        f"the server of {s.fact.name} took {s.fact.figure or Amounts()}, "
        f"but it had only {held}: set max_seq_length"
    )
    s.change(s.fact.name, **_cooled(s.entry, Problem("too_large", message), s.fact.at))
    s.give_up(s.fact.name, _failed(s.entry, s.fact.at))


def take_figure(s: Step[facts.BecameHealthy]) -> None:
    """Of a server that has fitted itself the figure after loading counts."""
    if (figure := s.fact.figure) is None:
        return
    s.change(s.fact.name, server=figure)
    if s.entry.basis == "fitted":
        held = resized(s.ctx, s.entry, figure)
        s.put(ledger=s.ctx.ledger.reserving(s.fact.name, held))


def begin_stay(s: Step[facts.BecameHealthy | facts.Adopted]) -> None:
    """Its gate has been opened: from this step on it is used, and may go, like any resident."""
    s.uses.setdefault(s.fact.name, Use(s.fact.name, False, None))
    s.change(
        s.fact.name,
        healthy_at=s.fact.at,
        retries=False,
        after=frozenset(),
        failures=0,
        failure=None,
        cool_until=None,
    )


def grant_waiters(s: Step[facts.BecameHealthy | facts.Adopted]) -> None:
    """Grant everybody but the requests for which there is no place yet."""
    others = [one for one in s.ctx.waiters_of(s.fact.name) if one.kind != "request"]
    for waiter in others:
        s.grant(waiter)
    s.put(waiting=tuple(waiter for waiter in s.ctx.waiting if waiter not in others))


def grant_admitted(s: Step[facts.BecameHealthy | facts.Adopted | facts.Looked]) -> None:
    """Grant the requests that have got a place; the others of each model wait for their turn."""
    by_ticket = {waiter.ticket: waiter for waiter in s.ctx.waiting}
    admitted = [by_ticket[ticket] for ticket in s.fact.admitted]
    for waiter in admitted:
        s.grant(waiter)
    s.put(waiting=tuple(waiter for waiter in s.ctx.waiting if waiter not in admitted))
    for name in {waiter.name for waiter in admitted}:
        mine = [waiter for waiter in admitted if waiter.name == name]
        left = [waiter for waiter in s.ctx.waiters_of(name) if waiter.kind == "request"]
        s.change(name, turns=after_turns(s.entry_of(name).turns, mine, left))


# ------------------------------------------------------------------------------- a server ends
def release(s: Step[facts.Emptied]) -> None:
    """The slot is verified empty; nothing of the last start is left but its outcome."""
    name = s.fact.name
    s.put(ledger=s.ctx.ledger.releasing(name))
    s.change(name, is_changed=False, server=None, retries=False, after=frozenset())
    for other in s.ctx.entries:
        if name in other.after:
            s.change(other.name, after=other.after - {name})


def evict_idle(s: Step[facts.Emptied]) -> None:
    """Out of memory: everything idle goes, and then it is tried once more."""
    for victim in evictable(s.ctx, s.uses, s.fact.at, overdue=None):
        s.stop(victim.name, "memory", if_idle=True, room_for=s.fact.name)
    going = frozenset(e.name for e in s.ctx.entries if e.state is State.STOPPING)
    s.change(s.fact.name, retries=True, after=going)


def cool_down(s: Step[facts.Emptied | facts.MeasureFailed]) -> None:
    """For 1, 2, 4 … 60 s requests get the same problem, without a new start."""
    s.change(s.fact.name, **_cooled(s.entry, s.fact.problem or NOT_STARTED, s.fact.at))


def _cooled(entry: Entry, failure: Problem, at: float) -> dict[str, Any]:
    cool_s = min(2.0 ** min(entry.failures, 6), MAX_COOL_DOWN_S)
    return {"failures": entry.failures + 1, "failure": failure, "cool_until": at + cool_s}


def fail_callers(s: Step[facts.Emptied]) -> None:
    """The house goes on waiting."""
    callers = [one for one in s.ctx.waiters_of(s.fact.name) if one.ticket is not None]
    s.refuse(callers, _failed(s.entry, s.fact.at))


def fail_waiters(s: Step[facts.Emptied | facts.MeasureFailed]) -> None:
    s.give_up(s.fact.name, _failed(s.entry, s.fact.at))


def count_restart(s: Step[facts.Leaving | facts.Emptied]) -> None:
    s.change(s.fact.name, restarts=restarts_in_a_row(s.ctx, s.entry, s.fact.at))


def enqueue_restart(s: Step[facts.Leaving | facts.Emptied]) -> None:
    """The house waits for it, and begins to wait when the backoff is over."""
    name = s.fact.name
    due_at = s.fact.at + backoff_s(s.ctx.policy.restart, s.entry.restarts)
    s.put(waiting=tuple(w for w in s.ctx.waiting if w.name != name or w.ticket is not None))
    s.enqueue(Waiter(name, "restart", due_at))


def refuse_waiters_occupied(s: Step[facts.BecameStuck]) -> None:
    s.give_up(s.fact.name, _stuck(s.fact.name))


def refuse_emptying_occupied(s: Step[facts.BecameStuck]) -> None:
    problem = _stuck(s.fact.name)
    s.emit(*(commands.Refuse(one, s.fact.name, problem) for one in s.entry.emptying))
    s.change(s.fact.name, emptying=())


def drop_stale(s: Step[facts.OfEntry]) -> None:
    s.emit(commands.DropStale(s.fact.name, s.fact.trigger))


# ------------------------------------------------------------------------------ the whole pool
def take_policy(s: Step[facts.Configured]) -> None:
    s.put(policy=s.fact.policy, devices=s.fact.budget)
    s.ctx = s.ctx.with_budget()


def latch_shutdown(s: Step[facts.ShutdownRequested]) -> None:
    s.put(is_shutting_down=True)
    s.refuse(s.ctx.waiting, _SHUTTING_DOWN)
    for entry in s.ctx.entries:
        if entry.state in (State.STARTING, State.RESIDENT, State.STUCK):
            s.stop(entry.name, "shutdown")


# -------------------------------------------------------------------------------------- problems
_SHUTTING_DOWN: Final = Problem("shutting_down", "the pool is shutting down")


def _unknown(name: str) -> Problem:
    message = f"there is no model {name!r}: add it to the catalogue, or use a name that it has"
    return Problem("model_not_found", message)


def _failed(entry: Entry, at: float) -> Problem:
    """Return the failure of the last start, with the rest of the cool-down."""
    until = at if entry.cool_until is None else entry.cool_until
    return replace(entry.failure or NOT_STARTED, retry_after_s=until - at)


def _stuck(name: str) -> Problem:
    return Problem("slot_occupied", f"the server of {name} could not be stopped: try again later")


ACTIONS: Final[dict[str, Callable[..., Any]]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value)
    and getattr(value, "__module__", None) == __name__
    and not name.startswith("_")
    and not isinstance(value, type)
}
"""Every public function of this module, by name."""
