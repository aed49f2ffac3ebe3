"""Transition table of the server lifecycle: the only place where an edge exists.

One owner thread feeds one fact at a time to this table. Rows are tried in order; the first whose
guards all hold fires: its actions replace the context and append commands, then the state changes
unless `dest` is None. The table is total: every trigger has a row without guards in every state.

At most one effect is in flight, and it belongs to the state: the kill ladder to Killing, the
download to Downloading, the spawn to Spawning, the probe to WaitingHealth. A cancel sets the token
of the load and waits until that effect has ended, because a cancelled spawn may still hand over a
live child, which must be killed. What follows (the next load, or nothing) is decided then.

Every load begins with a look-up of its model on disk, which no other load waits for. The call can
be cancelled, superseded, unloaded and withdrawn meanwhile, and its answer is dropped then.

The running server is stopped only for a model that is available. A load of a Hub model waits in
the queue until it is `resolved`, with `prefetch` until it is `fetched`, while the state stays; the
loads behind it wait too. When it is due it is promoted.

`is_current` drops completions of another generation. Spawning has one way in, guarded by
`slot_is_empty` and `token_is_unset`. Healthy has one way in, guarded by the same token and by
`child_is_alive`. Only `forget_child` clears the pid, and only `emptied` carries it: after a failed
kill the slot stays occupied, and every load passes through Killing before anything is started.

A load that fails ends in Idle, through Killing whenever a process may exist, and its callers are
answered when the slot is verified empty. Two kinds of load without a caller repair a failure: the
previous model comes back for a load with `restore_previous`, and a server that ended by itself is
started again when `restart_due`.

What a dead owner has left in the slot is the first fact. A server that its keeper has kept for the
next owner goes to WaitingHealth, as if it had just been started, and is believed after a probe that
also compares its files. Anything else goes to Killing. Such a load needs no caller, and cannot be
cancelled; a call that joins it while it fails gets a server of its own.

Leases are counted by a gate, which opens at the commit. Who enters it is no fact: facts are the
leases that wait for a load, and `drained`, from the last one inside a gate that has been closed.
Every step that decides to stop a Healthy server closes its gate.

A server without leases is stopped when `idle_expired`. The timer starts over at the commit, when a
load finds the server running, and for a server that has been used meanwhile.
"""

from __future__ import annotations

from typing import Final

from orchestrator.machine import rows
from orchestrator.machine.rows import row as _row
from orchestrator.machine.states import State

Row = rows.Row[State]

I, K, D, S, W, H = State  # noqa: E741 (the table is read by column)
ALL: Final = tuple(State)
DSW: Final = (D, S, W)
STAY: Final = None
# fmt: off
TABLE: Final[tuple[Row, ...]] = (
    # ---- the model of a call is looked up -------------------------------------------------------
    _row("look_up", ALL, "is_shutting_down",                STAY, "refuse_shutting_down"),
    _row("look_up", ALL, "was_cancelled_early",             STAY, "refuse_cancelled"),
    _row("look_up", ALL, "look_ups_are_full",               STAY, "refuse_look_up"),
    _row("look_up", ALL, "",                                STAY, "begin_look_up"),
    _row("look_up_failed", ALL, "is_looked_up",             STAY, "fail_look_up"),
    _row("look_up_failed", ALL, "",                         STAY, "drop_late_look_up"),
    _row("look_up_expired", ALL, "look_up_is_late",         STAY, "time_out_look_up"),
    _row("look_up_expired", ALL, "",                        STAY, "drop_stale"),

    # ---- a load is requested --------------------------------------------------------------------
    _row("load", ALL,    "look_up_has_ended",               STAY, "drop_late_look_up"),
    _row("load", ALL,    "was_unloaded_since",              STAY, "refuse_cancelled"),
    _row("load", ALL,    "matches_newest",                  STAY, "join_newest"),
    _row("load", ALL,    "rejects_when_busy",               STAY, "refuse_busy"),
    _row("load", ALL,    "prefetches_are_full",             STAY, "refuse_full"),
    _row("load", ALL,    "queue_is_full",                   STAY, "refuse_full"),
    _row("load", ALL,    "queues_when_busy",                STAY, "enqueue"),
    _row("load", (K, D, S, W), "matches_job",               STAY, "supersede_queue join_loading"),
    _row("load", H,      "matches_running child_is_alive",  STAY, "supersede_queue answer_already_loaded start_idle_timer advance_queue"),
    _row("load", ALL,    "newer_load_was_accepted",         STAY, "refuse_superseded"),
    _row("load", (I, K), "is_cooling_down matches_failing", STAY, "refuse_cooling_down"),
    _row("load", (I, H), "awaits_model",                    STAY, "supersede_all enqueue"),
    _row("load", (I, H), "",                                K, "supersede_all enqueue take_next begin_kill"),
    _row("load", K,      "",                                STAY, "supersede_all enqueue take_next"),
    _row("load", DSW,    "",                                STAY, "supersede_all enqueue"),

    # ---- unload, cancel, withdrawal, deadline, shutdown -----------------------------------------
    _row("unload", ALL,  "names_absent_model",              STAY, "answer_unchanged"),
    _row("unload", (D, S, W, H), "names_only_queued",       STAY, "cancel_queued answer_unloaded advance_queue"),
    _row("unload", (I, H), "",                              K, "cancel_all take_next wait_for_empty cut_leases begin_kill"),
    _row("unload", K,    "",                                STAY, "cancel_all take_next wait_for_empty cut_leases kill_when_drained"),
    _row("unload", DSW,  "",                                STAY, "cancel_all wait_for_empty"),

    _row("cancel", K,    "cancels_job",                     STAY, "cancel_job cancel_callers take_next wait_for_cancel"),
    _row("cancel", DSW,  "cancels_job",                     STAY, "cancel_job cancel_callers wait_for_cancel"),
    _row("cancel", ALL,  "cancels_callers",                 STAY, "cancel_callers answer_cancelled advance_queue"),
    _row("cancel", ALL,  "",                                STAY, "remember_cancel"),

    _row("withdraw", K,   "abandons_job",                   STAY, "forget_ticket cancel_job take_next"),
    _row("withdraw", DSW, "abandons_job",                   STAY, "forget_ticket cancel_job"),
    _row("withdraw", ALL, "",                               STAY, "forget_ticket advance_queue"),

    _row("deadline_expired", K,   "is_job",                 STAY, "time_out_job take_next"),
    _row("deadline_expired", DSW, "is_job",                 STAY, "time_out_job"),
    _row("deadline_expired", ALL, "is_queued_job",          STAY, "time_out_queued advance_queue"),
    _row("deadline_expired", ALL, "is_prefetch",            STAY, "fail_prefetch"),
    _row("deadline_expired", ALL, "",                       STAY, "drop_stale"),

    _row("shutdown", H,   "keeps_server",                   STAY, "latch_shutdown cancel_all revoke_leases answer_waiters answer_kept"),
    _row("shutdown", (I, H), "",                            K, "latch_shutdown cancel_all wait_for_shutdown revoke_leases begin_kill"),
    _row("shutdown", K,   "",                               STAY, "latch_shutdown cancel_all take_next wait_for_shutdown revoke_leases kill_when_drained"),
    _row("shutdown", DSW, "",                               STAY, "latch_shutdown cancel_all wait_for_shutdown"),

    # ---- queued loads are resolved and fetched; the state stays ---------------------------------
    _row("resolved", ALL,     "is_awaited",                 STAY, "record_model advance_queue"),
    _row("resolved", ALL,     "",                           STAY, "drop_stale"),
    _row("fetched", ALL,      "is_awaited",                 STAY, "record_model advance_queue"),
    _row("fetch_failed", ALL, "is_awaited",                 STAY, "fail_queued advance_queue"),
    _row("promote", H,        "next_is_running child_is_alive", STAY, "answer_next_already_loaded start_idle_timer"),
    _row("promote", (I, H),   "next_is_due",                K, "take_next begin_kill"),
    _row("promote", K,        "next_is_due",                STAY, "take_next"),
    _row("promote", ALL,      "",                           STAY, "drop_stale"),

    # ---- prefetch: a download that no load follows ----------------------------------------------
    _row("prefetch", ALL,     "look_up_has_ended",          STAY, "drop_late_look_up"),
    _row("prefetch", ALL,     "model_is_local",             STAY, "answer_on_disk"),
    _row("prefetch", ALL,     "matches_prefetch",           STAY, "join_prefetch"),
    _row("prefetch", ALL,     "prefetches_are_full",        STAY, "refuse_full"),
    _row("prefetch", ALL,     "",                           STAY, "begin_prefetch"),
    _row("fetched", ALL,      "is_prefetch",                STAY, "answer_prefetched"),
    _row("fetch_failed", ALL, "is_prefetch",                STAY, "fail_prefetch"),

    # ---- leases ---------------------------------------------------------------------------------
    _row("lease", ALL,   "is_shutting_down",                STAY, "refuse_shutting_down"),
    _row("lease", H,     "child_is_alive",                  STAY, "grant_lease"),
    _row("lease", ALL,   "load_is_wanted",                  STAY, "wait_for_lease"),
    _row("lease", ALL,   "restart_is_planned",              STAY, "wait_for_lease"),
    _row("lease", ALL,   "is_cooling_down",                 STAY, "refuse_cooling_down"),
    _row("lease", ALL,   "",                                STAY, "refuse_lease"),
    _row("drained", K,   "is_current_drain",                STAY, "revoke_leases kill_when_drained"),
    _row("drained", ALL, "",                                STAY, "drop_stale"),
    _row("drain_expired", K,   "is_current_drain",          STAY, "revoke_leases kill_when_drained"),
    _row("drain_expired", ALL, "",                          STAY, "drop_stale"),

    # ---- Killing: terminate, reap, verify -------------------------------------------------------
    _row("emptied", K,       "is_current job_is_wanted",     D, "forget_child answer_waiters begin_download"),
    _row("emptied", K,       "is_current",                  I, "forget_child answer_waiters enter_idle"),
    _row("emptied", ALL,     "",                            STAY, "drop_stale"),
    _row("kill_failed", K,   "is_current",                  I, "fail_all answer_waiters_occupied enter_idle"),
    _row("kill_failed", ALL, "",                            STAY, "drop_stale"),

    # ---- Downloading: the only way into Spawning ------------------------------------------------
    _row("fetched", D,   "is_current token_is_unset slot_is_empty", S, "begin_spawn"),
    _row("fetched", D,   "is_current token_is_unset may_verify_again", K, "end_effect count_attempt begin_kill"),
    _row("fetched", D,   "is_current token_is_unset",       K, "fail_job_slot_occupied end_effect take_next begin_kill"),
    _row("fetched", D,   "is_current next_is_due",          K, "end_effect take_next begin_kill"),
    _row("fetched", D,   "is_current",                      I, "end_effect take_next answer_waiters enter_idle"),
    _row("fetched", ALL, "",                                STAY, "drop_stale"),
    _row("fetch_failed", D,   "is_current next_is_due",     K, "fail_job end_effect take_next begin_kill"),
    _row("fetch_failed", D,   "is_current restores_previous", K, "fail_job end_effect take_next begin_kill"),
    _row("fetch_failed", D,   "is_current",                 I, "fail_job end_effect answer_waiters enter_idle"),
    _row("fetch_failed", ALL, "",                           STAY, "drop_stale"),

    # ---- Spawning: a live child, wanted or not --------------------------------------------------
    _row("spawned", S,   "is_current token_is_unset",       W, "record_child begin_probe"),
    _row("spawned", S,   "is_current",                      K, "record_child take_next begin_kill"),
    _row("spawned", ALL, "",                                STAY, "drop_stale"),
    _row("spawn_failed", S,   "is_current",                 K, "fail_job end_effect take_next begin_kill"),
    _row("spawn_failed", ALL, "",                           STAY, "drop_stale"),

    # ---- what a server takes of memory, from its start until it is Healthy -----------------------
    _row("sized", (S, W), "is_job",                         STAY, "record_memory"),
    _row("sized", ALL, "",                                  STAY, "drop_stale"),

    # ---- what a dead owner has left: adopted, or ended ------------------------------------------
    _row("found", I,   "is_kept_for_us",                    W, "record_child adopt begin_probe"),
    _row("found", I,   "",                                  K, "record_child begin_kill"),
    _row("found", (K, D, S, W, H), "",                      STAY, "drop_stale"),

    # ---- WaitingHealth: the only way into Healthy -----------------------------------------------
    _row("ready", W,   "is_current token_is_unset child_is_alive", H, "commit grant_waiting_leases start_idle_timer"),
    _row("ready", W,   "is_current is_adoption",            K, "record_death give_up_adoption end_effect take_next begin_kill"),
    _row("ready", W,   "is_current",                        K, "record_death fail_job_exited end_effect take_next begin_kill"),
    _row("ready", ALL, "",                                  STAY, "drop_stale"),
    _row("not_ready", W,   "is_current is_adoption",        K, "record_death give_up_adoption end_effect take_next begin_kill"),
    _row("not_ready", W,   "is_current",                    K, "record_death fail_job end_effect take_next begin_kill"),
    _row("not_ready", ALL, "",                              STAY, "drop_stale"),

    # ---- Healthy: the server becomes idle or ends by itself -------------------------------------
    _row("idle_expired", H,   "is_idle",                    K, "begin_kill"),
    _row("idle_expired", H,   "is_used",                    STAY, "wait_until_idle"),
    _row("idle_expired", ALL, "",                           STAY, "drop_stale"),
    _row("exited", H,    "is_child",                        K, "record_exit report_exit plan_recovery revoke_leases take_next begin_kill"),
    _row("exited", I,    "is_child",                        K, "record_exit report_exit begin_kill"),
    _row("exited", K,    "is_child was_found_dead",         STAY, "record_exit report_exit"),
    _row("exited", K,    "is_child",                        STAY, "record_exit revoke_leases kill_when_drained"),
    _row("exited", W,    "is_child",                        STAY, "record_exit report_exit"),
    _row("exited", ALL,  "",                                STAY, "drop_stale"),

    _row("hung", H,      "is_child",                        K, "record_hang plan_recovery revoke_leases take_next begin_kill"),
    _row("hung", ALL,    "",                                STAY, "drop_stale"),

    # ---- after an exit: the restart policy ------------------------------------------------------
    _row("restart_due", ALL, "is_due_restart next_is_due",  STAY, "forget_restart"),
    _row("restart_due", I,   "is_due_restart",              K, "enqueue_restart take_next begin_kill"),
    _row("restart_due", K,   "is_due_restart",              STAY, "enqueue_restart take_next"),
    _row("restart_due", DSW, "is_due_restart",              STAY, "enqueue_restart"),
    _row("restart_due", ALL, "",                            STAY, "drop_stale"),
)
# fmt: on
