"""Who is next, and which set of residents goes: pure functions of values.

Of the models that wait the one with the largest weight times longest wait is next; past
`max_wait_s` the longest wait, whatever the weight. Among the sets of residents that make room the
one with the smallest sum of file bytes / (1 s + time since the last use) goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

from orchestrator.pool.context import Context, Entry, Turns, Waiter
from orchestrator.pool.facts import Use
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.states import State

EXHAUSTIVE: Final = 12  # 4096 sets; more candidates than that are chosen greedily


class Wait(NamedTuple):
    """The longest wait for one model."""

    name: str
    since: float
    weight: float = 1.0

    def overdue_at(self, max_wait_s: float) -> float:
        return self.since + max_wait_s


class Candidate(NamedTuple):
    """A resident that may go."""

    name: str
    frees: Amounts
    cost: float


def in_order(waits: Iterable[Wait], max_wait_s: float, at: float) -> list[Wait]:
    """Return who is next first; `waits` are in order of arrival, which decides between equals."""

    def rank(wait: Wait) -> tuple[bool, float]:
        is_overdue = at >= wait.overdue_at(max_wait_s)
        return not is_overdue, (wait.since - at) * (1.0 if is_overdue else wait.weight)

    return sorted(waits, key=rank)


def cost_of(size_bytes: int, unused_s: float) -> float:
    """Return what it costs to have the model no longer, in bytes per second."""
    return size_bytes / (1.0 + unused_s)


def cheapest(lack: Amounts, candidates: Sequence[Candidate]) -> tuple[str, ...] | None:
    """Return the cheapest set that frees at least `lack`, or None if all of them do not.

    Of sets with the same cost the one with fewer servers goes. The search is exhaustive up to
    `EXHAUSTIVE` candidates.
    """
    accounts = [account for account, _ in lack.by_account]
    wanted = tuple(n for _, n in lack.by_account)
    useful = [
        (one.cost, one.name, tuple(one.frees[account] for account in accounts))
        for one in candidates
    ]
    useful = sorted(one for one in useful if any(one[2]))
    if not _covers(wanted, (frees for _, _, frees in useful)):
        return None
    search = _exhaustive if len(useful) <= EXHAUSTIVE else _greedy
    return search(wanted, useful)


_Useful = Sequence[tuple[float, str, tuple[int, ...]]]


def _covers(wanted: tuple[int, ...], freed: Iterable[tuple[int, ...]]) -> bool:
    left = wanted
    for frees in freed:
        left = tuple(n - f for n, f in zip(left, frees, strict=True))
    return all(n <= 0 for n in left)


def _exhaustive(wanted: tuple[int, ...], useful: _Useful) -> tuple[str, ...]:
    """Search all sets, without those that cost more than the best so far, or cannot be enough."""
    best: tuple[float, int, tuple[str, ...]] = (float("inf"), 0, ())

    def search(at: int, left: tuple[int, ...], cost: float, names: tuple[str, ...]) -> None:
        nonlocal best
        if (cost, len(names)) >= best[:2]:
            return
        if all(n <= 0 for n in left):
            best = cost, len(names), names
        elif _covers(left, (frees for _, _, frees in useful[at:])):
            costs, name, frees = useful[at]
            rest = tuple(n - f for n, f in zip(left, frees, strict=True))
            search(at + 1, rest, cost + costs, (*names, name))
            search(at + 1, left, cost, names)

    search(0, wanted, 0.0, ())
    return best[2]


def _greedy(wanted: tuple[int, ...], useful: _Useful) -> tuple[str, ...]:
    """Take the cheapest for what it frees, one by one, then return those that are superfluous."""
    left, others = wanted, list(useful)
    chosen: list[tuple[float, str, tuple[int, ...]]] = []
    while any(n > 0 for n in left):
        _, best = min((_price(one[0], one[2], left), one) for one in others)
        others.remove(best)
        chosen.append(best)
        left = tuple(n - f for n, f in zip(left, best[2], strict=True))
    for one in sorted(chosen, reverse=True):
        rest = [other for other in chosen if other is not one]
        if _covers(wanted, (frees for _, _, frees in rest)):
            chosen = rest
    return tuple(name for _, name, _ in chosen)


def _price(cost: float, frees: tuple[int, ...], left: tuple[int, ...]) -> float:
    """Return the cost for the part of what is missing that this one frees."""
    part = sum(min(f, n) / n for f, n in zip(frees, left, strict=True) if n > 0)
    return cost / part if part else float("inf")


def in_turn(waiters: Iterable[Waiter], turns: Turns) -> Iterator[Waiter]:
    """Yield the requests for one model in the order in which they get its places.

    Keys take turns by weight, and the requests of a key come in their order: next is the key that
    has had least for its weight, and of equals the one whose request is the oldest.
    """
    had, left = dict(turns), list(waiters)
    while left:
        at = min(range(len(left)), key=lambda i: had.get(left[i].turn.key, 0.0))
        waiter = left.pop(at)
        had[waiter.turn.key] = had.get(waiter.turn.key, 0.0) + 1.0 / waiter.turn.weight
        yield waiter


def after_turns(turns: Turns, admitted: Iterable[Waiter], left: Iterable[Waiter]) -> Turns:
    """Return what keys have had when these are admitted and others wait on.

    It counts from the key that has had least, so a key that comes back has no credit for its
    absence; nothing is remembered when nobody waits.
    """
    had, waiting = dict(turns), {waiter.turn.key for waiter in left}
    for waiter in admitted:
        had[waiter.turn.key] = had.get(waiter.turn.key, 0.0) + 1.0 / waiter.turn.weight
    least = min((had.get(key, 0.0) for key in waiting), default=0.0)
    more = {key: n - least for key, n in had.items() if n > least} if waiting else {}
    return tuple(sorted(more.items(), key=lambda one: (one[0] is not None, one[0])))


def unused_since(entry: Entry, use: Use) -> float:
    """Return when a resident was used last, or became Healthy; monotonic seconds."""
    return entry.healthy_at if use.last_used_at is None else use.last_used_at


def stays_until(ctx: Context, entry: Entry) -> float:
    return entry.healthy_at + ctx.policy.min_resident_s


def evictable(
    ctx: Context, uses: Mapping[str, Use], at: float, *, overdue: str | None
) -> list[Candidate]:
    """Return who may be evicted for a waiter; `overdue` names its model if it is overdue.

    A victim is resident, not pinned, at least `min_resident_s` old and has served those who waited
    for it: all of them, or if the waiter is overdue, those who came before it. Without evidence its
    gate is closed: it ends by itself.
    """
    with_busy = overdue is not None
    waited_for = {waiter.name for waiter in _before(ctx, overdue, at)}
    return [
        candidate(ctx, entry, uses[entry.name], at)
        for entry in ctx.entries
        if entry.state is State.RESIDENT
        and not entry.definition.is_pinned
        and entry.name in uses
        and entry.name not in waited_for
        and at >= stays_until(ctx, entry)
        and (with_busy or not uses[entry.name].is_inside)
    ]


def _before(ctx: Context, name: str | None, at: float) -> Iterable[Waiter]:
    """Return who has waited longer than the first that waits for this model; None: everybody."""
    if name is None:
        return ctx.waiting
    due = sorted((one for one in ctx.waiting if one.since <= at), key=lambda one: one.since)
    return takewhile(lambda one: one.name != name, due)


def candidate(ctx: Context, entry: Entry, use: Use, at: float) -> Candidate:
    unused_s = 0.0 if use.is_inside else at - unused_since(entry, use)
    cost = cost_of(entry.definition.size_bytes, unused_s)
    return Candidate(entry.name, ctx.ledger.of(entry.name), cost)
