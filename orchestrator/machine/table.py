"""Transition table of the server lifecycle: the only place where an edge exists.

Theory of operation. One owner thread feeds one fact at a time to this table. Rows are tried in
order; the first whose guards all hold fires: its actions replace the context and append commands,
then the state changes (or stays, where `dest` is None). The table is total: every trigger has a
row without guards in every state, so no fact is ever without an answer.

While a state is entered, at most one effect is in flight, and it is the state's own: Killing has
the kill ladder, Downloading the download, Spawning the spawn, WaitingHealth the probe. A cancel
sets the token of the load and waits for that effect to end by itself: a cancelled spawn may still
hand over a live child, and a child that has been handed over is killed, never forgotten. What
comes next (the newest wanted load, or nothing) is decided when the effect has ended.

Nothing is stopped for a model that may not be had. A load of a Hub model waits in the queue until
the Hub has `resolved` it, one with `prefetch` until its files are `fetched`: that is done beside the
state, which stays, and whatever is behind such a load waits too. When it is due it is promoted.

`is_current` fences completions of another generation: they are settled, never believed. Spawning
has exactly one way in, and `slot_is_empty` and `token_is_unset` guard it. Healthy has exactly one
way in, and the same token and the child's pulse guard that. The pid is forgotten by one action,
`forget_child`, and only `emptied` carries it; a kill that failed leaves the pid on record, so the
slot stays occupied and every load passes through Killing again before anything is started.

Failure is not a state. A load that fails ends in Idle, through Killing whenever a process may
exist, and its callers hear why when the slot is verified empty. Two kinds of load nobody asked for
make a failure good, by the same way as any other: what ran before comes back for a failed load
that said `restore_previous` (it takes the place of the next load in the queue, and the callers hear
of both), and a server that ended by itself is started again when `restart_due`.

A server nobody uses is stopped when `idle_expired`. Its timer is set anew whenever it becomes idle:
by the commit, by the last lease that is given back, by a load that finds it running. A lease and
the end of that time meet here, in one order or the other: a request is granted a server that stays,
or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orchestrator.machine.states import State

I, K, D, S, W, H = State  # noqa: E741 (the table is read by column)
ALL: Final = tuple(State)
DSW: Final = (D, S, W)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `dest` None keeps the state; guards and actions are names."""

    trigger: str
    sources: tuple[State, ...]
    guards: tuple[str, ...]
    dest: State | None
    actions: tuple[str, ...]


def _row(
    trigger: str,
    sources: State | tuple[State, ...],
    guards: str,
    dest: State | None,
    actions: str,
) -> Row:
    sources = sources if isinstance(sources, tuple) else (sources,)
    return Row(trigger, sources, tuple(guards.split()), dest, tuple(actions.split()))


STAY: Final = None
# fmt: off
TABLE: Final[tuple[Row, ...]] = (
    # ---- a load is asked for --------------------------------------------------------------------
    _row("load", ALL,    "is_shutting_down",                STAY, "refuse_shutting_down"),
    _row("load", ALL,    "was_cancelled_early",             STAY, "refuse_cancelled"),
    _row("load", ALL,    "an_unload_came_after",            STAY, "refuse_cancelled"),
    _row("load", ALL,    "same_as_newest",                  STAY, "join_newest"),
    _row("load", ALL,    "rejects_when_busy",               STAY, "refuse_busy"),
    _row("load", ALL,    "too_many_prefetch",               STAY, "refuse_full"),
    _row("load", ALL,    "too_many_wait",                   STAY, "refuse_full"),
    _row("load", ALL,    "queues_when_busy",                STAY, "enqueue"),
    _row("load", (K, D, S, W), "same_as_loading",           STAY, "supersede_queue join_loading"),
    _row("load", H,      "same_as_running child_is_alive",  STAY, "supersede_queue answer_already_loaded await_idle follow_queue"),
    _row("load", ALL,    "a_newer_load_came_first",         STAY, "refuse_superseded"),
    _row("load", (I, K), "is_cooling_down same_as_failing", STAY, "refuse_cooling_down"),
    _row("load", (I, H), "asks_first",                      STAY, "supersede_all enqueue"),
    _row("load", (I, H), "",                                K, "supersede_all enqueue take_next begin_kill"),
    _row("load", K,      "",                                STAY, "supersede_all enqueue take_next"),
    _row("load", DSW,    "",                                STAY, "supersede_all enqueue"),

    # ---- an unload, a cancel, a caller that leaves, the end -----------------------------------
    _row("unload", ALL,  "names_another_model",             STAY, "answer_unchanged"),
    _row("unload", (D, S, W, H), "names_only_what_waits",   STAY, "cancel_queued answer_unloaded follow_queue"),
    _row("unload", (I, H), "",                              K, "cancel_all take_next wait_for_empty begin_kill"),
    _row("unload", K,    "",                                STAY, "cancel_all take_next wait_for_empty"),
    _row("unload", DSW,  "",                                STAY, "cancel_all wait_for_empty"),

    _row("cancel", K,    "cancels_job",                     STAY, "cancel_job cancel_callers take_next wait_for_end"),
    _row("cancel", DSW,  "cancels_job",                     STAY, "cancel_job cancel_callers wait_for_end"),
    _row("cancel", ALL,  "cancels_callers",                 STAY, "cancel_callers answer_cancelled follow_queue"),
    _row("cancel", ALL,  "",                                STAY, "remember_cancel"),

    _row("withdraw", K,   "abandons_job",                   STAY, "forget_ticket cancel_job take_next"),
    _row("withdraw", DSW, "abandons_job",                   STAY, "forget_ticket cancel_job"),
    _row("withdraw", K,   "gives_back_the_last_lease",      STAY, "forget_ticket kill_when_drained"),
    _row("withdraw", H,   "gives_back_the_last_lease",      STAY, "forget_ticket await_idle"),
    _row("withdraw", ALL, "",                               STAY, "forget_ticket follow_queue"),

    _row("deadline_expired", K,   "is_job",                 STAY, "time_out_job take_next"),
    _row("deadline_expired", DSW, "is_job",                 STAY, "time_out_job"),
    _row("deadline_expired", ALL, "is_queued_job",          STAY, "time_out_queued follow_queue"),
    _row("deadline_expired", ALL, "is_prefetch",            STAY, "fail_prefetch"),
    _row("deadline_expired", ALL, "",                       STAY, "fence"),

    _row("shutdown", (I, H), "",                            K, "latch_shutdown cancel_all wait_for_shutdown revoke_leases begin_kill"),
    _row("shutdown", K,   "",                               STAY, "latch_shutdown cancel_all take_next wait_for_shutdown revoke_leases kill_when_drained"),
    _row("shutdown", DSW, "",                               STAY, "latch_shutdown cancel_all wait_for_shutdown"),

    # ---- what waits in the queue is asked for and fetched; the state stays, and so does what runs --
    _row("resolved", ALL,     "is_awaited",                 STAY, "note_answer follow_queue"),
    _row("resolved", ALL,     "",                           STAY, "fence"),
    _row("fetched", ALL,      "is_awaited",                 STAY, "note_answer follow_queue"),
    _row("fetch_failed", ALL, "is_awaited",                 STAY, "fail_awaiting follow_queue"),
    _row("promote", H,        "next_is_running child_is_alive", STAY, "answer_next_already_loaded await_idle"),
    _row("promote", (I, H),   "next_is_due",                K, "take_next begin_kill"),
    _row("promote", K,        "next_is_due",                STAY, "take_next"),
    _row("promote", ALL,      "",                           STAY, "fence"),

    # ---- a prefetch: a download that no load follows ---------------------------------------------
    _row("prefetch", ALL,     "is_shutting_down",           STAY, "refuse_shutting_down"),
    _row("prefetch", ALL,     "was_cancelled_early",        STAY, "refuse_cancelled"),
    _row("prefetch", ALL,     "same_as_prefetch",           STAY, "join_prefetch"),
    _row("prefetch", ALL,     "too_many_prefetch",          STAY, "refuse_full"),
    _row("prefetch", ALL,     "",                           STAY, "begin_prefetch"),
    _row("fetched", ALL,      "is_prefetch",                STAY, "answer_prefetched"),
    _row("fetch_failed", ALL, "is_prefetch",                STAY, "fail_prefetch"),

    # ---- leases -------------------------------------------------------------------------------
    _row("lease", ALL,   "is_shutting_down",                STAY, "refuse_shutting_down"),
    _row("lease", H,     "child_is_alive",                  STAY, "grant_lease"),
    _row("lease", ALL,   "load_is_wanted",                  STAY, "wait_for_lease"),
    _row("lease", ALL,   "restart_is_planned",              STAY, "wait_for_lease"),
    _row("lease", ALL,   "is_cooling_down",                 STAY, "refuse_cooling_down"),
    _row("lease", ALL,   "",                                STAY, "refuse_lease"),
    _row("release", K,   "gives_back_the_last_lease",       STAY, "drop_lease kill_when_drained"),
    _row("release", H,   "gives_back_the_last_lease",       STAY, "drop_lease await_idle"),
    _row("release", ALL, "",                                STAY, "drop_lease"),
    _row("drain_expired", K,   "is_draining_this",          STAY, "revoke_leases kill_when_drained"),
    _row("drain_expired", ALL, "",                          STAY, "fence"),

    # ---- Killing: terminate, reap, verify -------------------------------------------------------
    _row("emptied", K,       "is_current job_is_wanted",    D, "forget_child answer_waiters begin_download"),
    _row("emptied", K,       "is_current",                  I, "forget_child answer_waiters rest"),
    _row("emptied", ALL,     "",                            STAY, "fence"),
    _row("kill_failed", K,   "is_current",                  I, "fail_all answer_waiters_occupied rest"),
    _row("kill_failed", ALL, "",                            STAY, "fence"),

    # ---- Downloading: the model on disk, and the only way into Spawning -------------------------
    _row("fetched", D,   "is_current token_is_unset slot_is_empty",    S, "begin_spawn"),
    _row("fetched", D,   "is_current token_is_unset may_verify_again", K, "end_effect count_attempt begin_kill"),
    _row("fetched", D,   "is_current token_is_unset",       K, "fail_job_slot_occupied end_effect take_next begin_kill"),
    _row("fetched", D,   "is_current next_is_due",          K, "end_effect take_next begin_kill"),
    _row("fetched", D,   "is_current",                      I, "end_effect take_next answer_waiters rest"),
    _row("fetched", ALL, "",                                STAY, "fence"),
    _row("fetch_failed", D,   "is_current next_is_due",     K, "fail_job end_effect take_next begin_kill"),
    _row("fetch_failed", D,   "is_current restores_previous", K, "fail_job end_effect take_next begin_kill"),
    _row("fetch_failed", D,   "is_current",                 I, "fail_job end_effect answer_waiters rest"),
    _row("fetch_failed", ALL, "",                           STAY, "fence"),

    # ---- Spawning: a live child, wanted or not ---------------------------------------------------
    _row("spawned", S,   "is_current token_is_unset",       W, "record_child begin_probe"),
    _row("spawned", S,   "is_current",                      K, "record_child take_next begin_kill"),
    _row("spawned", ALL, "",                                STAY, "fence"),
    _row("spawn_failed", S,   "is_current",                 K, "fail_job end_effect take_next begin_kill"),
    _row("spawn_failed", ALL, "",                           STAY, "fence"),

    # ---- WaitingHealth: our own child answers, or it does not ------------------------------------
    _row("ready", W,   "is_current token_is_unset child_is_alive", H, "commit grant_waiting_leases await_idle"),
    _row("ready", W,   "is_current",                        K, "note_death fail_job_exited end_effect take_next begin_kill"),
    _row("ready", ALL, "",                                  STAY, "fence"),
    _row("not_ready", W,   "is_current",                    K, "note_death fail_job end_effect take_next begin_kill"),
    _row("not_ready", ALL, "",                              STAY, "fence"),

    # ---- Healthy: until something else is wanted, or the server ends by itself --------------------
    _row("idle_expired", H,   "is_idle",                    K, "begin_kill"),
    _row("idle_expired", ALL, "",                           STAY, "fence"),
    _row("exited", H,    "is_child",                        K, "record_exit tell_exit lose_server revoke_leases take_next begin_kill"),
    _row("exited", I,    "is_child",                        K, "record_exit tell_exit begin_kill"),
    _row("exited", K,    "is_child is_found_dead",          STAY, "record_exit tell_exit"),
    _row("exited", K,    "is_child",                        STAY, "record_exit revoke_leases kill_when_drained"),
    _row("exited", W,    "is_child",                        STAY, "record_exit tell_exit"),
    _row("exited", ALL,  "",                                STAY, "fence"),

    # ---- after an exit: the server is started again, by the policy of the orchestrator -----------
    _row("restart_due", I,   "is_due_restart",              K, "enqueue_restart take_next begin_kill"),
    _row("restart_due", K,   "is_due_restart",              STAY, "enqueue_restart take_next"),
    _row("restart_due", DSW, "is_due_restart",              STAY, "enqueue_restart"),
    _row("restart_due", ALL, "",                            STAY, "fence"),
)
# fmt: on
