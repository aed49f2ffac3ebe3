"""Guards of the pool's table: pure predicates `(context, fact) -> bool`.

The annotation of `fact` lists the facts that a guard may be used with; a test compares it with the
table.
"""

from __future__ import annotations

from orchestrator.pool import facts
from orchestrator.pool.context import Context, Entry
from orchestrator.pool.ledger import Amounts, is_place
from orchestrator.pool.policy import evictable
from orchestrator.pool.states import State


# ------------------------------------------------------------------------- callers and catalogue
def is_shutting_down(ctx: Context, fact: facts.Wanted | facts.Preloaded | facts.Adopted) -> bool:
    return ctx.is_shutting_down


def is_unknown(
    ctx: Context,
    fact: facts.Wanted
    | facts.Preloaded
    | facts.UnloadRequested
    | facts.CancelRequested
    | facts.Removed
    | facts.Adopted,
) -> bool:
    """The catalogue has no such entry, or not any more."""
    entry = ctx.find(fact.name)
    return entry is None or entry.is_removed


def has_entered(ctx: Context, fact: facts.Wanted | facts.BecameHealthy | facts.Adopted) -> bool:
    return fact.has_entered


def is_cooling_down(ctx: Context, fact: facts.Wanted) -> bool:
    """Its last start has failed. A load by hand tries at once."""
    entry = ctx.find(fact.name)
    is_cool = entry is not None and entry.cool_until is not None and fact.at < entry.cool_until
    return is_cool and fact.kind != "load"


def room_is_full(ctx: Context, fact: facts.Wanted) -> bool:
    callers = sum(waiter.ticket is not None for waiter in ctx.waiting)
    return callers >= ctx.policy.max_waiting


def must_reload(ctx: Context, fact: facts.Wanted) -> bool:
    entry = ctx.find(fact.name)
    return fact.is_forced or (entry is not None and entry.is_changed)


def is_last_waiter(ctx: Context, fact: facts.Withdrawn) -> bool:
    """Nobody else waits for this model, not even the house."""
    return [waiter.ticket for waiter in ctx.waiters_of(fact.name)] == [fact.ticket]


def is_waited_for(ctx: Context, fact: facts.CancelRequested) -> bool:
    """Whether its load is; a restart that is planned counts, a request at a resident does not."""
    entry = ctx.find(fact.name)
    is_resident = entry is not None and entry.state is State.RESIDENT
    waiters = ctx.waiters_of(fact.name)
    return any(waiter.kind != "request" or not is_resident for waiter in waiters)


def cuts(ctx: Context, fact: facts.UnloadRequested) -> bool:
    return fact.cut


def is_of_this_edition(ctx: Context, fact: facts.Measured | facts.MeasureFailed) -> bool:
    """The entry has not been defined as another server since."""
    entry = ctx.find(fact.name)
    return entry is not None and entry.edition == fact.edition and entry.is_measuring


# ------------------------------------------------------------------------- what slots report
def is_current(ctx: Context, fact: facts.OfStart) -> bool:
    """It is about the last start of this entry."""
    entry = ctx.find(fact.name)
    return entry is not None and entry.generation == fact.generation


def is_believed(ctx: Context, fact: facts.Sized) -> bool:
    """The figure is only shown: the user has declared one, or the server fits itself later."""
    entry = ctx.find(fact.name)
    return entry is not None and entry.basis in ("declared", "fitted")


def figure_fits(ctx: Context, fact: facts.Sized) -> bool:
    entry = ctx.find(fact.name)
    return entry is not None and grows_by(ctx, entry, fact.figure).fits(ctx.ledger.free)


def figure_outgrows(ctx: Context, fact: facts.BecameHealthy) -> bool:
    """A server that was to fit itself into its reservation has not, and the rest does not fit."""
    entry = ctx.find(fact.name)
    if entry is None or entry.basis != "fitted" or fact.figure is None:
        return False
    return not grows_by(ctx, entry, fact.figure).fits(ctx.ledger.free)


def comes_back(ctx: Context, fact: facts.Leaving) -> bool:
    """The house wants it again after its exit."""
    entry = ctx.find(fact.name)
    return (
        entry is not None
        and (entry.definition.restarts or entry.definition.is_pinned)
        and restarts_in_a_row(ctx, entry, fact.at) <= ctx.policy.restart.limit
    )


def restarts_again(ctx: Context, fact: facts.Emptied) -> bool:
    """A restart by the house has failed, and there are tries left."""
    entry = ctx.find(fact.name)
    return (
        entry is not None
        and any(waiter.kind == "restart" for waiter in ctx.waiters_of(fact.name))
        and restarts_in_a_row(ctx, entry, fact.at) <= ctx.policy.restart.limit
    )


def is_out_of_memory(ctx: Context, fact: facts.Emptied) -> bool:
    return fact.problem is not None and fact.problem.reason == "out_of_memory"


def may_try_again(ctx: Context, fact: facts.Emptied) -> bool:
    """Once, and only if something idle can go for it, or is going. A preload evicts nobody."""
    entry = ctx.find(fact.name)
    is_wanted = any(waiter.kind != "preload" for waiter in ctx.waiters_of(fact.name))
    if entry is None or entry.retries or not is_wanted:
        return False
    uses = {use.name: use for use in fact.uses}
    is_going = any(other.state is State.STOPPING for other in ctx.entries)
    return is_going or bool(evictable(ctx, uses, fact.at, overdue=None))


def is_removed(ctx: Context, fact: facts.Emptied) -> bool:
    entry = ctx.find(fact.name)
    return entry is not None and entry.is_removed


# ------------------------------------------------------------- helpers, shared with actions
def resized(ctx: Context, entry: Entry, figure: Amounts) -> Amounts:
    """Return the reservation of an entry with this figure in place of its memory."""
    held = ctx.ledger.of(entry.name).by_account
    return figure + Amounts(tuple(one for one in held if is_place(one[0])))


def grows_by(ctx: Context, entry: Entry, figure: Amounts) -> Amounts:
    """Return what the figure has beyond what is reserved."""
    return resized(ctx, entry, figure).beyond(ctx.ledger.of(entry.name))


def restarts_in_a_row(ctx: Context, entry: Entry, at: float) -> int:
    """Return the number of the restart that would follow now; a stable server starts over."""
    was_stable = (
        entry.state is State.RESIDENT and at - entry.healthy_at >= ctx.policy.restart.stable_after_s
    )
    return 1 if was_stable else entry.restarts + 1
