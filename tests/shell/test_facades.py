"""Both facades over gated effects: results, concurrent callers, older loads, and errors.

The machine decides what a load, an unload or a cancel does; here it is what callers see of that.
"""

from __future__ import annotations

import asyncio
import random
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest

from orchestrator import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LoadOutcome,
    LoadRequest,
    MalformedRequest,
    ModelNotFound,
    NotLoaded,
    OrchestratorError,
    Problem,
    ServerStartFailed,
    State,
    Superseded,
)
from orchestrator.base import log
from orchestrator.errors import UnknownGeneration
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.settings.fields import OnBusy
from tests.kit.shell.harness import PATIENCE_S, Harness, asyncio_test, error_of, run
from tests.kit.shell.records import Entry

# ------------------------------------------------------------------------------------------ results


def test_a_load_returns_the_running_server(harness: Harness) -> None:
    with harness.sync() as orch:
        outcome = orch.load("A", max_seq_length=4096)
        assert (outcome.status, outcome.generation, outcome.joined) == ("loaded", 1, False)
        assert outcome.pid in harness.os.alive
        assert outcome.requested_context_length == 4096
        again = orch.load("A", max_seq_length=4096)
        assert (again.status, again.pid) == ("already_loaded", outcome.pid)
        assert orch.status().loaded == outcome
        assert orch.unload().status == "unloaded"
        assert not harness.os.alive
    assert harness.effects.is_closed


def test_a_refused_request_leaves_the_running_model_alone(harness: Harness) -> None:
    with harness.sync() as orch:
        pid = orch.load("A").pid
        with pytest.raises(MalformedRequest):
            orch.load("B", colour="red")  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest):
            orch.load("B", n_parallel=0)
        with pytest.raises(ModelNotFound):
            orch.load("missing")
        with pytest.raises(InvalidRequest):
            orch.cancel()
        with pytest.raises(InvalidRequest):
            orch.cancel("x", generation=1)
        assert orch.load("A").pid == pid
        assert len(orch.status().story) == 5


def test_an_unexpected_error_in_a_look_up_ends_the_call(
    harness: Harness, failures: list[Entry]
) -> None:
    """An open call would stay in the owner's memory for ever."""
    with harness.sync() as orch:
        for call in (orch.load, orch.submit):
            with pytest.raises(OrchestratorError, match="PermissionError") as caught:
                call("unreadable")
            assert caught.value.problem.category == "internal"
        log.flush()
        assert [entry["event"] for entry in failures] == ["look_up.failed"] * 2
        failures.clear()
        assert not harness.owner._calls
        assert orch.load("A").status == "loaded"


# ------------------------------------------------------------------------------- concurrent callers


def test_many_threads_share_one_orchestrator(harness: Harness) -> None:
    """Every call is answered, and at most one server is alive."""
    with harness.sync() as orch, ThreadPoolExecutor(8) as threads:
        start = threading.Barrier(8)

        def caller(seed: int) -> int:
            choice = random.Random(seed)
            start.wait()
            return sum(_something(orch, choice) for _ in range(40))

        assert sum(threads.map(caller, range(8))) > 0
        assert orch.load("A").pid in harness.os.alive
        assert not harness.owner._calls
    assert harness.os.most_alive == 1
    assert not harness.os.alive


def _something(orch: Orchestrator, choice: random.Random) -> int:
    """Make a random call; return the number of loads that succeeded."""
    try:
        match choice.randrange(6):
            case 0 | 1 | 2:
                name = f"id-{choice.randrange(4)}"
                policy = choice.choice(get_args(OnBusy))
                orch.load(choice.choice("ABC"), on_busy=policy, load_request_id=name)
                return 1
            case 3:
                orch.unload(choice.choice((None, "A")))
            case 4:
                orch.cancel(f"id-{choice.randrange(4)}")
            case _:
                with orch.lease() as server:
                    assert server.pid
    except (Superseded, Cancelled, Busy, NotLoaded):
        pass
    return 0


def test_many_event_loops_share_one_orchestrator(harness: Harness) -> None:
    """An answer must wake its caller in the loop that it called from."""
    orch = harness.asynchronous()
    start = threading.Barrier(4)

    async def several(seed: int) -> list[object]:
        choice = random.Random(seed)
        start.wait()
        calls = [orch.load(choice.choice("ABC")) for _ in range(25)]
        return await asyncio.gather(*calls, orch.unload(), return_exceptions=True)

    with ThreadPoolExecutor(4) as threads:
        loops = list(threads.map(lambda seed: run(lambda: several(seed)), range(4)))
    for answer in (answer for loop in loops for answer in loop):
        assert not isinstance(answer, Exception) or isinstance(answer, Superseded | Cancelled)
    assert harness.claims == 1

    async def end() -> None:
        outcome = await orch.load("A")
        assert outcome.pid in harness.os.alive
        await orch.close()

    run(end)
    assert harness.os.most_alive == 1
    assert not harness.os.alive
    assert not harness.owner._calls


@asyncio_test
async def test_a_thousand_identical_loads_share_one_spawn(harness: Harness) -> None:
    """Every caller gets the same generation, and all but one of them joined."""
    harness.open_gates = frozenset()
    async with harness.asynchronous() as orch:
        loads = [asyncio.create_task(orch.load("A")) for _ in range(1000)]
        await asyncio.to_thread(harness.until_callers, 1000)
        harness.effects.open()
        outcomes = await asyncio.gather(*loads)
        assert {outcome.generation for outcome in outcomes} == {1}
        assert len({outcome.pid for outcome in outcomes}) == 1
        assert [outcome.joined for outcome in outcomes].count(False) == 1
        assert {outcome.status for outcome in outcomes} == {"loaded"}
    assert [process.model for process in harness.os.started] == ["A"]


def test_status_is_always_consistent(harness: Harness) -> None:
    """A reader gets one snapshot, whatever the owner is doing."""
    with harness.sync() as orch, ThreadPoolExecutor(2) as threads:
        is_over = threading.Event()

        def read() -> int:
            count = 0
            while not is_over.is_set():
                status = orch.status()
                assert (status.loaded is not None) == (status.state is State.HEALTHY)
                if status.loaded:
                    assert status.loaded.model_path in "AB"
                    assert status.loaded.generation <= status.generation
                if status.story:
                    assert f"-> {status.state} on" in status.story[-1]
                assert status.as_dict()["state"] == status.state.value
                orch.progress().as_dict()
                count += 1
            return count

        readers = [threads.submit(read) for _ in range(2)]
        for number in range(20):
            orch.load("AB"[number % 2])
        is_over.set()
        assert all(reader.result() for reader in readers)


# --------------------------------------------------------------------------------------- cancelling


def test_a_cancel_ends_a_load_whose_look_up_does_not(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    """B73: the disk may never answer."""
    harness.hold_look_ups_of("A")
    with harness.sync() as orch:
        load = pool.submit(orch.load, "A", load_request_id="x")
        harness.until_look_up_of("A")
        assert orch.cancel("x") is True
        assert isinstance(error_of(load), Cancelled)
        harness.release_look_ups_of("A")
        assert not harness.os.started
        assert orch.load("A", load_request_id="y").status == "loaded"


def test_an_early_cancel_is_remembered_for_a_minute(harness: Harness) -> None:
    with harness.sync() as orch:
        for name in ("x", "y"):
            assert orch.cancel(name) is False
        harness.pass_time(60.0)
        with pytest.raises(Cancelled):
            orch.load("A", load_request_id="x")
        harness.pass_time(0.001)
        assert orch.load("A", load_request_id="y").status == "loaded"


def test_at_most_256_early_cancels_are_remembered(harness: Harness) -> None:
    """Clients choose the ids, so their number must be bounded."""
    with harness.sync() as orch:
        for number in range(257):
            assert orch.cancel(f"id-{number}") is False
        assert len(harness.owner.snapshot.ctx.cancelled_ids) == 256
        assert orch.load("A", load_request_id="id-0").status == "loaded"
        with pytest.raises(Cancelled):
            orch.load("B", load_request_id="id-256")


def test_a_cancel_never_unloads_a_loaded_model(harness: Harness, pool: ThreadPoolExecutor) -> None:
    harness.open_gates = frozenset({"kill"})
    with harness.sync() as orch:
        load = pool.submit(orch.load, "A", load_request_id="x")
        harness.effects.wait_for("download")
        cancel = pool.submit(orch.cancel, "x")
        harness.until(lambda shown: shown.ctx.job is not None and shown.ctx.job.token is not None)
        assert not load.done()
        harness.effects.open()
        assert cancel.result(PATIENCE_S) is True
        assert isinstance(error_of(load), Cancelled)
        pid = orch.load("A", load_request_id="z").pid
        assert orch.cancel("z") is False
        assert orch.cancel(generation=2) is False
        assert orch.load("A").pid == pid


# -------------------------------------------------------------------------------------- older loads


def test_supersede_queue_and_reject(harness: Harness, pool: ThreadPoolExecutor) -> None:
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        first = pool.submit(orch.load, "A")
        harness.effects.wait_for("kill", 1)
        with pytest.raises(Busy) as busy:
            orch.load("B", on_busy="reject")
        assert busy.value.generation == 1
        second = pool.submit(orch.load, "B")
        assert isinstance(error_of(first), Superseded)
        third = pool.submit(orch.load, "C", on_busy="queue")
        harness.until(lambda shown: len(shown.ctx.queue) == 1)
        fourth = pool.submit(orch.load, "C", on_busy="queue")
        harness.until(
            lambda shown: len(shown.ctx.queue) == 1 and len(shown.ctx.queue[0].callers) == 2
        )
        assert not second.done()
        harness.effects.open()
        assert second.result(PATIENCE_S).model_path == "B"
        assert third.result(PATIENCE_S).model_path == "C"
        assert fourth.result(PATIENCE_S).generation == third.result().generation == 3
        assert [process.model for process in harness.os.started] == ["B", "C"]
    assert harness.os.most_alive == 1


def test_a_deadline_ends_a_longer_load(harness: Harness, pool: ThreadPoolExecutor) -> None:
    harness.open_gates = frozenset({"kill"})
    with harness.sync() as orch:
        load = pool.submit(orch.load, "A", deadline_s=30)
        download = harness.effects.wait_for("download")
        harness.pass_time(29.9)
        assert not download.token.is_set()
        harness.pass_time(0.2)
        assert download.token.reason == "deadline"
        download.fail()
        error = error_of(load)
        assert isinstance(error, DeadlineExceeded)
        assert error.field == "deadline_s"
        assert orch.status().state is State.IDLE


def test_a_deadline_has_no_effect_after_the_load(harness: Harness) -> None:
    with harness.sync() as orch:
        pid = orch.load("A", deadline_s=30).pid
        harness.pass_time(31)
        assert orch.load("A", deadline_s=30).pid == pid


def test_a_swap_waits_for_a_lease_until_the_drain_timeout(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    with harness.sync(drain_timeout_s=5) as orch:
        pid = orch.load("A").pid
        with orch.lease() as server:
            assert (server.pid, server.generation) == (pid, 1)
            swap = pool.submit(orch.load, "B")
            harness.until(lambda shown: shown.state is State.KILLING)
            assert pid in harness.os.alive
        assert swap.result(PATIENCE_S).model_path == "B"
        with orch.lease():
            swap = pool.submit(orch.load, "A")
            harness.until(lambda shown: shown.state is State.KILLING)
            harness.pass_time(5.1)
            assert swap.result(PATIENCE_S).model_path == "A"
    with pytest.raises(NotLoaded), harness.sync() as orch, orch.lease():
        pass


def test_the_owner_can_wait_for_the_longest_timeouts(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    """A wait longer than the platform supports would end the owner's thread."""
    month_s = 30 * 24 * 3600.0
    with pytest.raises(InvalidRequest):
        harness.sync(drain_timeout_s=1e300)
    with harness.sync(drain_timeout_s=month_s) as orch:
        orch.load("A", deadline_s=month_s)
        with orch.lease():
            swap = pool.submit(orch.load, "B", deadline_s=month_s)
            harness.until(lambda shown: shown.state is State.KILLING)
            harness.catch_up()
        assert swap.result(PATIENCE_S).model_path == "B"


# ------------------------------------------------------------------------------------------- errors


def test_an_error_has_its_story_and_generation(harness: Harness, pool: ThreadPoolExecutor) -> None:
    """An error in a log must be understandable without another log."""
    harness.open_gates = frozenset({"kill", "download", "spawn"})
    with harness.sync() as orch:
        load = pool.submit(orch.load, "A")
        harness.effects.wait_for("probe").fail(
            Problem("server_start_failed", "it ended", log_tail=("bad tensor",), reason="exited")
        )
        error = error_of(load)
        assert isinstance(error, ServerStartFailed)
        assert (error.generation, error.reason, error.log_tail) == (1, "exited", ("bad tensor",))
        assert [line.split(" on ")[0] for line in error.story] == [
            "Idle -> Killing",
            "Killing -> Downloading",
            "Downloading -> Spawning",
            "Spawning -> WaitingHealth",
            "WaitingHealth -> Killing",
            "Killing -> Idle",
        ]
        assert str(error) == "it ended"
        assert "bad tensor" in "".join(traceback.format_exception(error))
        status = orch.status()
        assert status.last_error is not None
        assert status.last_error.message == "it ended"
        assert status.story == error.story


def test_a_refusal_has_the_story_so_far(harness: Harness) -> None:
    with harness.sync() as orch:
        orch.load("A")
        with pytest.raises(ModelNotFound) as missing:
            orch.load("missing")
        assert missing.value.story == orch.status().story


def test_outcome_is_that_of_the_load_not_of_its_last_caller(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset({"kill", "download", "spawn"})
    with harness.sync() as orch:
        with pytest.raises(UnknownGeneration):
            orch.outcome(1)
        generation = orch.submit("A")
        joined = pool.submit(orch.load, "A", load_request_id="x")
        harness.until_callers(2)
        assert orch.cancel("x") is True
        assert isinstance(error_of(joined), Cancelled)
        assert orch.outcome(generation) is None
        harness.effects.let_through("probe")
        harness.until(lambda shown: shown.state is State.HEALTHY)
        harness.catch_up()
        first = orch.outcome(generation)
        assert isinstance(first, LoadOutcome)
        assert first.status == "loaded"
        assert orch.load("A").status == "already_loaded"
        assert orch.outcome(generation) == first

        harness.effects.open_gates = frozenset({"download", "spawn"})
        other = orch.submit("B")
        harness.effects.let_through("kill")
        harness.effects.wait_for("probe").fail()
        kill = harness.effects.wait_for("kill")
        assert orch.outcome(other) is None  # settled when the slot is empty again
        kill.succeed()
        harness.until(lambda shown: shown.state is State.IDLE)
        failed = orch.outcome(other)
        assert isinstance(failed, Problem)
        assert failed.category == "server_start_failed"
        assert failed.story == orch.status().story
        harness.effects.open()


def test_a_refused_submit_raises(harness: Harness) -> None:
    with harness.sync() as orch:
        with pytest.raises(ModelNotFound):
            orch.submit("missing")
        assert orch.submit("A") == 1


@asyncio_test
async def test_a_refused_async_submit_raises(harness: Harness) -> None:
    async with harness.asynchronous() as orch:
        with pytest.raises(ModelNotFound):
            await orch.submit("missing")
        assert await orch.submit("A") == 1
        await asyncio.to_thread(harness.until, lambda shown: shown.state is State.HEALTHY)
        await orch.load("A", load_request_id="x")
        assert not await orch.cancel("early")
        with pytest.raises(Cancelled):
            await orch.submit("B", load_request_id="early")


# ---------------------------------------------------------------------------------- failures inside


def test_an_effect_that_cannot_start_fails_only_its_load(
    harness: Harness, failures: list[Entry]
) -> None:
    with harness.sync() as orch:

        def refuse(effect: object, _: object) -> None:
            if type(effect).__name__ == "Download":
                raise MemoryError("no room")

        harness.effects.watch = refuse
        with pytest.raises(OrchestratorError, match="no room") as error:
            orch.load("A")
        assert error.value.generation == 1
        log.flush()
        assert [entry["event"] for entry in failures] == ["effect.failed"]
        failures.clear()
        harness.effects.watch = lambda _, __: None
        assert orch.load("A").status == "loaded"


def test_the_owner_survives_a_fact_it_cannot_process(
    harness: Harness, failures: list[Entry]
) -> None:
    """The call of that fact is answered, and so is the next one."""
    with harness.sync() as orch:
        orch.start()
        owner = harness.owner
        call = owner.call()
        owner.ask(call, LoadRequest(model_path="A", load_request_id="x"))  # type: ignore[arg-type]
        broken = owner.call()
        nonsense: Any = type("Nonsense", (), {"trigger": "look_up", "ticket": broken.ticket})()
        owner.post(nonsense)
        answer = broken.settled.result(PATIENCE_S)
        assert isinstance(answer, Problem)
        assert answer.category == "internal"
        log.flush()
        assert {entry["event"] for entry in failures} == {"owner.failed"}
        failures.clear()
        assert orch.load("A").status == "loaded"
        call.settled.cancel()
