"""Transition table of the pool: the only place where an edge of an entry exists.

One owner thread feeds one fact at a time to this table. The state is that of the entry which the
fact is about; an entry that is not there is Absent, and facts about the whole pool find their row
in Pool. Rows are tried in order; the first whose guards all hold fires. The table is total.

After whatever row fired, the policy runs once (`step.settle`): it refuses what can never fit, then
goes through the models that wait in order, and starts one, leaves it the room that is being
emptied, or makes room. Starting has no other way in. Nothing is claimed between two steps.

A victim is Stopping from the step that chooses it, and a new request for it waits like any other.
What leads out of Stopping and Stuck is `emptied`: only that releases a reservation. `is_current`
drops reports about an earlier start. Resident has one way in, on which everybody who waited is
granted in the same step, but for the requests that find no place at the server: these wait on, and
`look` grants them when a place is free. A server that was changed is stopped by the next request.
"""

from __future__ import annotations

from typing import Final

from orchestrator.machine import rows
from orchestrator.machine.rows import row as _row
from orchestrator.pool.states import OF_ENTRIES, State

Row = rows.Row[State]

A, S, R, P, X, POOL = State
ALL: Final = OF_ENTRIES
LIVE: Final = (S, R, X)
STAY: Final = None
# fmt: off
TABLE: Final[tuple[Row, ...]] = (
    # ---- a model is wanted ----------------------------------------------------------------------
    _row("wanted", ALL,    "is_shutting_down",              STAY, "refuse_shutting_down"),
    _row("wanted", ALL,    "is_unknown",                    STAY, "refuse_unknown"),
    _row("wanted", R,      "has_entered",                   STAY, "grant"),
    _row("wanted", ALL,    "is_cooling_down",               STAY, "refuse_failed"),
    _row("wanted", ALL,    "room_is_full",                  STAY, "refuse_too_many"),
    _row("wanted", (S, R), "must_reload",                   P,    "enqueue reserve_larger stop_to_reload"),
    _row("wanted", X,      "",                              P,    "enqueue stop_again"),
    _row("wanted", (A, S, R, P), "",                        STAY, "enqueue"),
    _row("preload", ALL,   "is_shutting_down",              STAY, "drop_stale"),
    _row("preload", ALL,   "is_unknown",                    STAY, "drop_stale"),
    _row("preload", A,     "",                              STAY, "enqueue_preload"),
    _row("preload", (S, R, P, X), "",                       STAY, "drop_stale"),

    # ---- callers leave, unload ------------------------------------------------------------------
    _row("withdrawn", S,   "is_last_waiter",                P,    "forget_ticket stop_unwanted"),
    _row("withdrawn", ALL, "",                              STAY, "forget_ticket"),
    _row("unload", ALL,    "is_unknown",                    STAY, "refuse_unknown"),
    _row("unload", A,      "",                              STAY, "cancel_waiters await_empty answer_emptied"),
    _row("unload", LIVE,   "",                              P,    "cancel_waiters await_empty stop_as_asked"),
    _row("unload", P,      "cuts",                          STAY, "cancel_waiters await_empty stop_as_asked"),
    _row("unload", P,      "",                              STAY, "cancel_waiters await_empty"),
    _row("cancel", ALL,    "is_unknown",                    STAY, "refuse_unknown"),
    _row("cancel", S,      "",                              P,    "cancel_waiters answer_cancelled stop_unwanted"),
    _row("cancel", (A, R, P, X), "is_waited_for",           STAY, "cancel_waiters answer_cancelled"),
    _row("cancel", (A, R, P, X), "",                        STAY, "answer_not_cancelled"),

    # ---- the catalogue --------------------------------------------------------------------------
    _row("defined", ALL,   "",                              STAY, "put_definition"),
    _row("removed", ALL,   "is_unknown",                    STAY, "refuse_unknown"),
    _row("removed", A,     "",                              STAY, "refuse_waiters_unknown await_empty answer_emptied forget_entry"),
    _row("removed", LIVE,  "",                              P,    "refuse_waiters_unknown await_empty mark_removed stop_removed"),
    _row("removed", P,     "",                              STAY, "refuse_waiters_unknown await_empty mark_removed"),
    _row("measured", ALL,  "is_of_this_edition",            STAY, "take_need"),
    _row("measured", ALL,  "",                              STAY, "drop_stale"),
    _row("measure_failed", ALL, "is_of_this_edition",       STAY, "end_measuring cool_down fail_waiters"),
    _row("measure_failed", ALL, "",                         STAY, "drop_stale"),
    _row("adopted", ALL,   "is_unknown",                    STAY, "drop_stale"),
    _row("adopted", ALL,   "is_shutting_down",              STAY, "drop_stale"),
    _row("adopted", A,     "has_entered",                   R,    "reserve_adopted begin_stay grant_waiters grant_admitted"),
    _row("adopted", ALL,   "",                              STAY, "drop_stale"),

    # ---- Starting -------------------------------------------------------------------------------
    _row("sized", S,       "is_current is_believed",        STAY, "note_figure"),
    _row("sized", S,       "is_current figure_fits",        STAY, "note_figure learn_figure reserve_figure"),
    _row("sized", S,       "is_current",                    P,    "learn_figure stop_outgrown"),
    _row("sized", ALL,     "",                              STAY, "drop_stale"),
    _row("healthy", S,     "is_current figure_outgrows",    P,    "fail_outgrown stop_outgrown"),
    _row("healthy", S,     "is_current has_entered",        R,    "take_figure begin_stay grant_waiters grant_admitted"),
    _row("healthy", ALL,   "",                              STAY, "drop_stale"),
    _row("emptied", S,     "is_current is_out_of_memory may_try_again", A, "release evict_idle"),
    _row("emptied", S,     "is_current restarts_again",     A,    "release cool_down fail_callers count_restart enqueue_restart"),
    _row("emptied", S,     "is_current",                    A,    "release cool_down fail_waiters"),

    # ---- a server ends --------------------------------------------------------------------------
    _row("leaving", R,     "is_current comes_back",         P,    "count_restart enqueue_restart"),
    _row("leaving", R,     "is_current",                    P,    ""),
    _row("leaving", ALL,   "",                              STAY, "drop_stale"),
    _row("emptied", (R, P, X), "is_current is_removed",     A,    "release answer_emptied forget_entry"),
    _row("emptied", (R, P, X), "is_current",                A,    "release answer_emptied"),
    _row("emptied", ALL,   "",                              STAY, "drop_stale"),
    _row("stuck", (S, R, P), "is_current",                  X,    "refuse_waiters_occupied refuse_emptying_occupied"),
    _row("stuck", ALL,     "",                              STAY, "drop_stale"),

    # ---- the whole pool -------------------------------------------------------------------------
    _row("look", POOL,       "",                            STAY, "grant_admitted"),
    _row("configured", POOL, "",                            STAY, "take_policy"),
    _row("shutdown", POOL,   "",                            STAY, "latch_shutdown"),
)
# fmt: on
