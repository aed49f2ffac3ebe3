"""Layer A: the shipped pool keeps every invariant in every order of events; faulty pools do not.

`pytest -s` prints the sizes and the counterexamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

from orchestrator.pool.actions import Step
from orchestrator.pool.context import Waiter
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.states import OF_ENTRIES, State
from orchestrator.pool.table import TABLE, Row
from tests.kit.pool import checker
from tests.kit.pool.checker import Report, TracedPool, explore
from tests.kit.pool.explorations import DEEP, SCENARIOS, explored
from tests.kit.pool.faults import Fault, changed, pool_with
from tests.kit.pool.moves import Moves
from tests.kit.pool.slots import after_stop
from tests.kit.pool.world import PROBLEMS, Slot, World, gates_of

A, S, R, P, X, _ = State


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SCENARIOS)
def test_shipped_pool_keeps_every_invariant(name: str) -> None:
    """Every known bug of a pool was an order of events that no test had tried."""
    report = explored(name)
    print(f"\n{report}")
    assert report.violation is None, report
    assert report.worlds > 100


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DEEP)
def test_larger_scenarios_break_no_invariant(name: str) -> None:
    report = explore(DEEP[name], name=name)
    print(f"\n{report}")
    assert report.violation is None, report
    assert report.worlds > 1000


@pytest.mark.timeout(300)
def test_every_row_fires_in_some_exploration() -> None:
    """A row that never fires is dead, or guards against something that was not explored."""
    fired = {fired for name in SCENARIOS for fired in explored(name).rows_fired}
    never = [row for index, row in enumerate(TABLE) if index not in {row for row, _ in fired}]
    assert not never, "unreachable rows:\n" + "\n".join(map(str, never))


def test_exploration_raises_at_its_bound() -> None:
    """A silent cut-off would call an unexplored pool correct."""
    with pytest.raises(MemoryError, match="more than 100 worlds"):
        explore(SCENARIOS["one fits"], max_worlds=100)


def test_exploration_is_deterministic() -> None:
    first, second = (explore(SCENARIOS["max_resident"]) for _ in range(2))
    assert (first.worlds, first.edges) == (second.worlds, second.edges)


# --------------------------------------------------------------------------------- seeded faults
REASON = frozenset({"inv_a_refusal_has_its_reason"})
STARVES = frozenset({"nobody_starves"})
NO_REST = frozenset({"everything_comes_to_rest", "nobody_starves"})
VICTIM = frozenset({"inv_a_server_is_stopped_for_a_reason"})
AGAIN = frozenset({"looking_again_does_nothing"})
RESERVED = frozenset({"inv_reserved_until_verified_empty", "inv_memory_is_reserved"})
ANSWERED = frozenset({"inv_everybody_is_answered_once"})

FAULTS: dict[str, Fault] = {
    "B93 servers in use are never evicted": Fault(
        "policy",
        "and (with_busy or not uses[entry.name].is_inside)",
        "and not uses[entry.name].is_inside",
        "one fits",
        STARVES,
    ),
    "a queue for places keeps a server for ever": Fault(
        "policy",
        "_before(ctx, overdue, at)}",
        "ctx.waiting}",
        "a queue at a server",
        STARVES,
    ),
    "who is overdue passes those who waited longer": Fault(
        "policy",
        "_before(ctx, overdue, at)}",
        "_before(ctx, None, at) if not with_busy}",
        "places",
        VICTIM,
    ),
    "a request waits on beside a free place": Fault(
        "actions",
        "admitted = [by_ticket[ticket] for ticket in s.fact.admitted]",
        "admitted = [by_ticket[ticket] for ticket in s.fact.admitted][1:]",
        "places",
        frozenset({"inv_a_resident_has_no_waiters", "inv_healthy_grants_all_who_waited"}),
    ),
    "every request is granted at once": Fault(
        "actions",
        'if one.kind != "request"]\n    for waiter in others',
        "]\n    for waiter in others",
        "places",
        frozenset({"a_grant_enters_an_open_gate", "step_raised"}),
    ),
    "a cancel of a load ends the queue at its server": Fault(
        "guards",
        'waiter.kind != "request" or not is_resident for waiter',
        "True for waiter",
        "places by hand",
        frozenset({"inv_a_cancel_says_whether_it_has_ended_anything"}),
    ),
    "B92 room counts as free when a stop begins": Fault(
        "actions",
        "self.change(name, state=State.STOPPING)",
        "self.change(name, state=State.STOPPING)\n"
        "        self.put(ledger=self.ctx.ledger.releasing(name))",
        "one fits",
        RESERVED,
    ),
    "B92, and what it leads to": Fault(
        "actions",
        "self.change(name, state=State.STOPPING)",
        "self.change(name, state=State.STOPPING)\n"
        "        self.put(ledger=self.ctx.ledger.releasing(name))",
        "one fits",
        frozenset({"inv_memory_is_within_the_budget"}),
        RESERVED | AGAIN,
    ),
    "reserved when Healthy, not at the start": Fault(
        "step",
        "s.put(ledger=s.ctx.ledger.reserving(name, claim), generation=generation)",
        "s.put(generation=generation)",
        "one fits",
        RESERVED | {"inv_a_start_reserves"},
    ),
    "B91 no minimal stay": Fault(
        "policy", "and at >= stays_until(ctx, entry)", "", "loads by hand", VICTIM
    ),
    "B97 min_resident yields to max_wait": Fault(
        "policy",
        "and at >= stays_until(ctx, entry)",
        "and (with_busy or at >= stays_until(ctx, entry))",
        "min_resident 2",
        VICTIM,
    ),
    "the evidence of use is older than the grants": Fault(
        "actions",
        "self.uses[waiter.name] = Use(waiter.name, True, self.fact.at)",
        "pass",
        "min_resident 0",
        VICTIM,
    ),
    "a pinned one is evicted": Fault(
        "policy", "and not entry.definition.is_pinned", "", "pinned", VICTIM
    ),
    "a Starting one is evicted": Fault(
        "policy",
        "if entry.state is State.RESIDENT\n"
        "        and not entry.definition.is_pinned\n"
        "        and entry.name in uses\n"
        "        and entry.name not in waited_for",
        "if entry.state in (State.RESIDENT, State.STARTING) and entry.name in uses",
        "min_resident 0",
        VICTIM,
    ),
    "promised room is not set aside": Fault(
        "step", "room.take(claimed[0])", "pass", "big and small", NO_REST | AGAIN
    ),
    "a start takes free room that a model before it counts on": Fault(
        "step",
        "is_free = claimed[0].fits(room.free)",
        "is_free = claimed[0].fits(s.ctx.ledger.free)",
        "big among three small, with room left",
        STARVES,
    ),
    "who is overdue and cannot be placed loses its room": Fault(
        "step",
        "if is_overdue or s.entry_of(wait.name).retries:",
        "if False:",
        "big among three small",
        STARVES,
    ),
    "the newest waiter tells the wait of its model": Fault(
        "step",
        "min(waiter.since, longest.get(waiter.name, waiter.since))",
        "waiter.since",
        "max_wait 2",
        STARVES | AGAIN,
    ),
    "last come, first served": Fault(
        "policy", "return sorted(waits, key=rank)", "return [*waits][::-1]", "one fits", STARVES
    ),
    "smallest first": Fault(
        "step",
        "in in_order(waits, s.ctx.policy.max_wait_s, s.fact.at):",
        "in sorted(waits, key=lambda w: str(s.entry_of(w.name).claim)):",
        "big among three small",
        STARVES,
    ),
    "the weight counts past max_wait": Fault(
        "policy",
        "(1.0 if is_overdue else wait.weight)",
        "wait.weight",
        "weights, bounded",
        frozenset({"inv_nobody_waits_too_long"}),
    ),
    "no timer for the wait": Fault(
        "step", "room.wakes.append(overdue_at)", "pass", "one fits", AGAIN | STARVES
    ),
    "no timer for the stay": Fault(
        "step",
        "room.wakes += [stays_until(s.ctx, entry) for entry in residents]",
        "pass",
        "one fits",
        AGAIN | STARVES,
    ),
    "no timer for the idle time": Fault(
        "step", "is not None]\n    first", "is not None and False]\n    first", "idle", AGAIN
    ),
    "no timer for the longest wait": Fault(
        "step",
        "waiting if waiter.gets_in]\n    wakes",
        'waiting if waiter.kind == "load"]\n    wakes',
        "held",
        AGAIN | {"inv_nobody_waits_too_long"},
    ),
    "no timer for a restart": Fault(
        "step",
        "wakes += [waiter.since for waiter in s.ctx.waiting]",
        "wakes += []",
        "restarts",
        AGAIN,
    ),
    "a figure over the reservation is believed to fit": Fault(
        "guards",
        "entry is not None and grows_by(ctx, entry, fact.figure).fits(ctx.ledger.free)",
        "entry is not None",
        "estimate too low",
        frozenset({"inv_paper_is_within_the_budget"}),
    ),
    "a server that outgrows its fitting is believed to fit": Fault(
        "guards",
        "not grows_by(ctx, entry, fact.figure).fits(ctx.ledger.free)",
        "False",
        "a fitting that fails",
        VICTIM | {"inv_paper_is_within_the_budget"},
    ),
    "a fitted server keeps what it does not use": Fault(
        "actions",
        'if s.entry.basis == "fitted":',
        "if False:",
        "fitted to less",
        frozenset({"inv_a_fitted_server_holds_its_figure"}),
    ),
    "a declared figure ends its server": Fault(
        "guards",
        'in ("declared", "fitted")',
        'in ("fitted",)',
        "declared",
        VICTIM | {"inv_a_declared_figure_is_believed"},
    ),
    "out of memory is tried for ever": Fault(
        "guards",
        "if entry is None or entry.retries or not is_wanted:",
        "if entry is None or not is_wanted:",
        "out of memory",
        frozenset({"inv_a_failure_is_told"}),
    ),
    "a second try outlives its waiters": Fault(
        "step",
        "if entry.retries and not is_under_way:",
        "if False:",
        "out of memory",
        frozenset({"inv_a_try_belongs_to_its_waiters"}),
    ),
    "a second try starts before the others are gone": Fault(
        "step",
        "and not entry.after:",
        ":",
        "out of memory, three",
        frozenset({"inv_a_try_belongs_to_its_waiters"}),
    ),
    "a second try waits for whatever stops": Fault(
        "step",
        "and not entry.after:",
        "and not (entry.retries and any(e.state is State.STOPPING for e in s.ctx.entries)):",
        "big among three small, out of memory",
        STARVES,
    ),
    "who cannot fit beside the pinned waits": Fault(
        "step", "if not claim.fits(allowed):", "if False:", "too large beside a pinned one", REASON
    ),
    "who cannot fit beside what does not die waits": Fault(
        "step", "elif not claim.fits(allowed - stuck):", "elif False:", "does not die", NO_REST
    ),
    "too large is asked once, at the call": Fault(
        "step",
        "if _is_placed(entry) or claimed is None:",
        'if _is_placed(entry) or claimed is None or s.fact.trigger != "wanted":',
        "too low beside a pinned one",
        NO_REST,
    ),
    "the limits of places are only looked at when they are full": Fault(
        "step",
        "is_free = claimed[0].fits(room.free)",
        "is_free = claimed[0].of_devices().fits(room.free.of_devices())",
        "a group",
        frozenset({"inv_a_group_has_one_server", "inv_paper_is_within_the_budget"}),
    ),
    "no generation on reports": Fault(
        "guards",
        "entry is not None and entry.generation == fact.generation",
        "entry is not None",
        "late reports",
        frozenset({"late_reports_are_dropped"}),
    ),
    "a preload evicts": Fault(
        "step",
        'return all(waiter.kind == "preload"',
        'return all(waiter.kind == "never"',
        "preloads",
        VICTIM,
    ),
    "a preload evicts after out of memory": Fault(
        "guards",
        "if entry is None or entry.retries or not is_wanted:",
        "if entry is None or entry.retries:",
        "preload, out of memory",
        VICTIM,
    ),
    "a start goes on after the last request has given up": Fault(
        "step",
        "if not is_wanted and",
        "if False and",
        "held",
        frozenset({"inv_a_start_is_wanted"}),
    ),
    "a smaller budget is never looked at": Fault(
        "step",
        "over = _soon(s).debt",
        "over = Amounts().beyond(_soon(s))",
        "a smaller budget",
        frozenset({"inv_a_smaller_budget_is_kept"}),
    ),
    "a restart has no backoff": Fault(
        "actions",
        "s.fact.at + backoff_s(s.ctx.policy.restart, s.entry.restarts)",
        "s.fact.at",
        "restarts",
        frozenset({"inv_a_restart_is_bounded"}),
    ),
    "a restart is tried for ever": Fault(
        "guards",
        'any(waiter.kind == "restart" for waiter in ctx.waiters_of(fact.name))\n'
        "        and restarts_in_a_row(ctx, entry, fact.at) <= ctx.policy.restart.limit",
        'any(waiter.kind == "restart" for waiter in ctx.waiters_of(fact.name))',
        "restarts",
        frozenset({"inv_a_restart_is_bounded"}),
    ),
    "a load by hand is refused while its model cools down": Fault(
        "guards",
        'return is_cool and fact.kind != "load"',
        "return is_cool",
        "loads by hand",
        REASON,
    ),
    "a failed start does not cool down": Fault(
        "actions",
        "cool_s = min(2.0 ** min(entry.failures, 6), MAX_COOL_DOWN_S)",
        "cool_s = 0.0",
        "failed starts",
        frozenset({"inv_a_cool_down_follows_a_failed_start"}),
    ),
    "what the policy leaves to the next step": Fault(
        "step", "    _stop_unused(s)\n", "", "idle", AGAIN
    ),
}


def _by_night(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.deep) if FAULTS[name].scenario in DEEP else name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*map(_by_night, FAULTS)])
def test_checker_finds_a_fault_in_the_source(name: str) -> None:
    fault = FAULTS[name]
    with pool_with(fault.file, fault.old, fault.new) as module:
        report = explore(
            {**SCENARIOS, **DEEP}[fault.scenario],
            name=fault.scenario,
            machine=TracedPool(TABLE, module),
            without=fault.without,
        )
    _caught(report, fault.breaks)


def _caught(report: Report, invariants: frozenset[str]) -> None:
    print(f"\n{report}")
    assert report.violation is not None, "the fault was not found"
    assert report.violation.invariant in invariants, report


@dataclass(frozen=True, slots=True)
class TableFault:
    """A fault in one row of the table."""

    row: tuple[str, str, State]
    changes: dict[str, Any]
    scenario: str
    breaks: frozenset[str]


TABLE_FAULTS: dict[str, TableFault] = {
    "B91 Healthy leaves its waiters for the next step": TableFault(
        ("healthy", "is_current has_entered", S),
        {"actions": "take_figure begin_stay"},
        "one fits",
        frozenset({"inv_healthy_grants_all_who_waited"}),
    ),
    "a figure over the reservation is only noted": TableFault(
        ("sized", "is_current", S),
        {"actions": "learn_figure", "dest": None},
        "estimate too low",
        frozenset({"inv_memory_is_reserved"}),
    ),
    "a figure over the reservation is forgotten": TableFault(
        ("sized", "is_current", S), {"actions": "stop_outgrown"}, "exact is too large", NO_REST
    ),
    "an old failure is told to new waiters": TableFault(
        ("emptied", "is_current", P),
        {"actions": "release cool_down fail_waiters answer_emptied"},
        "one fits",
        REASON,
    ),
    "the last waiter's load goes on": TableFault(
        ("withdrawn", "is_last_waiter", S),
        {"actions": "forget_ticket", "dest": None},
        "one fits",
        frozenset({"inv_a_start_is_wanted"}),
    ),
    "any waiter's leaving ends the load": TableFault(
        ("withdrawn", "is_last_waiter", S),
        {"guards": ""},
        "one fits",
        VICTIM,
    ),
    "a failed start keeps its waiters": TableFault(
        ("emptied", "is_current", S),
        {"actions": "release cool_down"},
        "failed starts",
        frozenset({"inv_a_failure_is_told"}),
    ),
    "granted by the book, not by the gate": TableFault(
        ("wanted", "has_entered", R),
        {"guards": ""},
        "crashes",
        frozenset({"a_grant_enters_an_open_gate"}),
    ),
    "Healthy is believed though the gate is closed": TableFault(
        ("healthy", "is_current has_entered", S),
        {"guards": "is_current"},
        "crashes",
        frozenset({"a_grant_enters_an_open_gate"}),
    ),
    "what does not die counts as free": TableFault(
        ("stuck", "is_current", P),
        {"dest": A, "actions": "release refuse_waiters_occupied refuse_emptying_occupied"},
        "does not die",
        frozenset({"inv_absent_is_empty", "inv_memory_is_reserved"}),
    ),
    "an unload of a Stopping one is not answered": TableFault(
        ("unload", "", P), {"actions": "cancel_waiters"}, "unloads by hand", ANSWERED
    ),
    "an unload leaves the waiters": TableFault(
        ("unload", "", R),
        {"actions": "await_empty stop_as_asked"},
        "unloads by hand",
        frozenset({"inv_an_unload_cancels"}),
    ),
    "an unload of a stuck one is never answered": TableFault(
        ("stuck", "is_current", P),
        {"actions": "refuse_waiters_occupied"},
        "hands and a stuck one",
        frozenset({"everything_comes_to_rest", "inv_an_emptying_is_going_on"}),
    ),
    "a removed one keeps its waiters": TableFault(
        ("removed", "", R),
        {"actions": "await_empty mark_removed stop_removed"},
        "removed and added",
        frozenset({"inv_only_the_catalogue_is_waited_for"}),
    ),
    "a removed one is forgotten while it runs": TableFault(
        ("removed", "", R),
        {"dest": A, "actions": "refuse_waiters_unknown await_empty answer_emptied forget_entry"},
        "removed and added",
        RESERVED | {"an_empty_slot_is_empty"},
    ),
    "a changed one is never reloaded": TableFault(
        ("wanted", "must_reload", R),
        {"dest": None, "actions": "enqueue"},
        "changed",
        frozenset({"nobody_starves", "inv_a_resident_has_no_waiters"}),
    ),
    "an adopted server is not reserved": TableFault(
        ("adopted", "has_entered", A), {"actions": "begin_stay"}, "adopted", RESERVED
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TABLE_FAULTS)
def test_checker_finds_a_fault_in_the_table(name: str) -> None:
    fault = TABLE_FAULTS[name]
    table = changed(*fault.row, fault.changes)
    scenario = SCENARIOS[fault.scenario]
    _caught(explore(scenario, name=fault.scenario, machine=TracedPool(table)), fault.breaks)


# ------------------------------------------------------------------- faults that are no one row
def test_checker_finds_a_figure_that_fails_its_waiters() -> None:
    """The pool knows better now, and nobody who waits has done anything wrong."""

    def stop_outgrown(s: Step[Any]) -> None:
        s.change(s.fact.name, cool_until=s.fact.at + 1.0)
        s.give_up(s.fact.name, PROBLEMS["failed"])
        s.stop(s.fact.name, "figure")

    machine = TracedPool(stop_outgrown=stop_outgrown)
    report = explore(SCENARIOS["estimate too low"], machine=machine)
    _caught(report, frozenset({"inv_a_figure_fails_nobody"}))


def test_checker_finds_a_victim_whose_gate_stays_open() -> None:
    """B94: new requests keep it alive, and the eviction waits for all of its drain time."""

    def leaves_open(slot: Slot, stop: Any) -> Slot:
        return after_stop(slot, stop)._replace(gate=slot.gate)

    with mock.patch.object(checker, "after_stop", leaves_open):
        report = explore(SCENARIOS["one fits"])
    _caught(report, frozenset({"inv_only_residents_are_open"}))


@dataclass(frozen=True, slots=True)
class Reopen:
    """A command that the pool does not have: let requests in again."""

    number: int

    def carry_out(self, world: World) -> World:
        slot = world.slots[self.number]
        return world.with_slot(self.number, slot._replace(phase="up", gate="open"))


def test_checker_finds_a_victim_that_is_brought_back_by_a_request() -> None:
    """Who waits for its room starves."""

    def gates(slots: tuple[Slot, ...]) -> Any:
        """Tell of a drain, too."""
        known = gates_of(slots)
        return tuple(
            ("drain", None) if slot.phase == "drain" else gate
            for slot, gate in zip(slots, known, strict=True)
        )

    def is_draining(ctx: Any, fact: Any) -> bool:
        return fact.kind == "lease" and any(use.name == fact.name for use in fact.uses)

    def reopen(s: Step[Any]) -> None:
        s.emit(Reopen("ABC".index(s.fact.name)))  # type: ignore[arg-type]
        s.grant(Waiter(s.fact.name, "lease", s.fact.at, s.fact.ticket))

    row = Row("wanted", (P,), ("is_draining",), R, ("reopen",))
    first = next(index for index, row_ in enumerate(TABLE) if row_.guards == ("has_entered",))
    table = [*TABLE[:first], row, *TABLE[first:]]
    machine = TracedPool(table, is_draining=is_draining, reopen=reopen)
    without = frozenset({"a_grant_enters_an_open_gate"})
    with mock.patch.object(checker, "gates_of", gates):
        report = explore(SCENARIOS["one fits"], machine=machine, without=without)
    _caught(report, STARVES)


CLAIMS = """
def _place(s):
    wakes = []
    for wait in in_order(_waits(s), s.ctx.policy.max_wait_s, s.fact.at):
        entry, claimed = s.entry_of(wait.name), {v for e in s.ctx.entries for v in e.after}
        others = [e for e in s.ctx.entries if e.name != wait.name]
        kept = Amounts.total(
            s.entry_of(v).claim
            for e in others for v in e.after if s.entry_of(v).state is State.ABSENT
        )
        if any(s.entry_of(v).state is not State.ABSENT for v in entry.after):
            continue
        if entry.state is State.ABSENT and entry.claim.fits(s.ctx.ledger.free - kept):
            s.change(wait.name, after=frozenset())
            _start(s, wait.name, entry.claim, "exact")
            continue
        overdue_at = wait.overdue_at(s.ctx.policy.max_wait_s)
        free = [
            one
            for one in evictable(
                s.ctx,
                s.uses,
                s.fact.at,
                overdue=wait.name if s.fact.at >= overdue_at else None,
            )
            if one.name not in claimed
        ]
        for one in free[:1]:
            s.stop(one.name, "room", if_idle=not s.uses[one.name].is_inside, room_for=wait.name)
            s.change(wait.name, after=entry.after | {one.name})
        wakes.append(overdue_at)
        wakes += [stays_until(s.ctx, e) for e in s.ctx.entries if e.state is State.RESIDENT]
    return wakes


def _shipped_place(s: Step[Fact]) -> list[float]:"""


def test_checker_finds_two_waiters_that_each_hold_a_victim() -> None:
    """B92: each has closed one resident for itself, needs another, and waits for ever."""

    def release(s: Step[Any]) -> None:
        s.put(ledger=s.ctx.ledger.releasing(s.fact.name))

    with pool_with("step", "def _place(s: Step[Fact]) -> list[float]:", CLAIMS) as module:
        report = explore(
            SCENARIOS["two big, two small"],
            machine=TracedPool(TABLE, module, release=release),
            without=AGAIN | {"inv_a_try_belongs_to_its_waiters"},
        )
    _caught(report, STARVES)


def test_checker_finds_that_nobody_tells_of_an_idle_server() -> None:
    """The last lease has ended, and who waits for room is not served before the timer."""

    def silently(self: Moves, world: World, number: int) -> Any:
        slot = world.slots[number]
        if slot.phase == "drain":
            yield from leave(self, world, number)
        else:
            after = world.with_slot(number, slot._replace(inside=slot.inside - 1))
            yield after._replace(idle=world.idle + 1)

    leave = Moves._leave
    with mock.patch.object(Moves, "_leave", silently):
        report = explore(SCENARIOS["one fits"])
    _caught(report, AGAIN)


def test_checker_finds_a_debt_that_is_not_made_good() -> None:
    """Evicting for the need alone leaves the debt, and the start does not fit."""

    def beyond(self: Amounts, room: Amounts) -> Amounts:
        lacking = {account: n - max(room[account], 0) for account, n in self.by_account}
        return Amounts.of({account: n for account, n in lacking.items() if n > 0})

    with mock.patch.object(Amounts, "beyond", beyond):
        report = explore(SCENARIOS["big among three small"])
    _caught(report, STARVES | NO_REST | AGAIN)


def test_seeded_faults_begin_with_the_shipped_source() -> None:
    """A copy without a fault is the shipped pool: what is found is the fault."""
    with pool_with("step", "def settle(", "def settle(") as module:
        assert module is not TracedPool().module
        copy = explore(SCENARIOS["held"], machine=TracedPool(TABLE, module))
    assert copy.violation is None
    assert (copy.worlds, copy.edges) == (explored("held").worlds, explored("held").edges)
    assert len(OF_ENTRIES) == 5
