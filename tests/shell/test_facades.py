"""Both facades over gated effects: many threads, many event loops, callers that leave.

What a load, an unload or a cancel does is the machine's business and tested there; here it is what
a caller sees of it, from whichever thread or loop it calls.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
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
from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.settings.fields import OnBusy
from tests.kit.shell.facade import (
    PATIENCE_S,
    House,
    ctrl_c,
)
from tests.kit.shell.records import Entry


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine, but not for ever."""

    async def bounded() -> Any:
        return await asyncio.wait_for(main(), PATIENCE_S)

    return asyncio.run(bounded())


def error_of(caller: Future[Any]) -> OrchestratorError:
    error = caller.exception(PATIENCE_S)
    assert isinstance(error, OrchestratorError), error
    return error


# ------------------------------------------------------------------------------ what a load answers


def test_a_load_answers_with_what_runs(house: House) -> None:
    with house.sync() as orch:
        outcome = orch.load("A", max_seq_length=4096)
        assert (outcome.status, outcome.generation, outcome.joined) == ("loaded", 1, False)
        assert outcome.pid in house.os.alive
        assert outcome.requested_context_length == 4096
        again = orch.load("A", max_seq_length=4096)
        assert (again.status, again.pid) == ("already_loaded", outcome.pid)
        assert orch.status().loaded == outcome
        assert orch.unload().status == "unloaded"
        assert not house.os.alive
    assert house.effects.is_closed


def test_a_refused_request_costs_the_running_model_nothing(house: House) -> None:
    """What cannot succeed is found out before anything is stopped."""
    with house.sync() as orch:
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


def test_a_look_up_that_raises_anything_else_still_answers_the_call(house: House) -> None:
    """A call that is never answered would keep its place for ever."""
    with house.sync() as orch:
        with pytest.raises(PermissionError):
            orch.load("unreadable")
        with pytest.raises(PermissionError):
            orch.submit("unreadable")
        assert not house.owner._calls
        assert orch.load("A").status == "loaded"


# -------------------------------------------------------------------------- many callers at once


def test_many_threads_share_one_orchestrator(house: House) -> None:
    """Every call is answered, whoever made it, and there is one server at most."""
    with house.sync() as orch, ThreadPoolExecutor(8) as threads:
        start = threading.Barrier(8)

        def caller(seed: int) -> int:
            choice = random.Random(seed)
            start.wait()
            return sum(_something(orch, choice) for _ in range(40))

        assert sum(threads.map(caller, range(8))) > 0
        assert orch.load("A").pid in house.os.alive
        assert not house.owner._calls
    assert house.os.most_alive == 1
    assert not house.os.alive


def _something(orch: Orchestrator, choice: random.Random) -> int:
    """Do one thing; return how many loads came of it."""
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


def test_many_event_loops_share_one_orchestrator(house: House) -> None:
    """A backend may run several loops; an answer wakes its caller in the loop it came from."""
    orch = house.asynchronous()
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
    assert house.claims == 1

    async def end() -> None:
        outcome = await orch.load("A")
        assert outcome.pid in house.os.alive
        await orch.close()

    run(end)
    assert house.os.most_alive == 1
    assert not house.os.alive
    assert not house.owner._calls


def test_a_thousand_identical_loads_are_one(house: House) -> None:
    """One download, one spawn, one generation; each caller hears it, and one did not join."""
    house.open_gates = frozenset()

    async def main() -> None:
        async with house.asynchronous() as orch:
            loads = [asyncio.create_task(orch.load("A")) for _ in range(1000)]
            await asyncio.to_thread(house.until_callers, 1000)
            house.effects.open()
            outcomes = await asyncio.gather(*loads)
            assert {outcome.generation for outcome in outcomes} == {1}
            assert len({outcome.pid for outcome in outcomes}) == 1
            assert [outcome.joined for outcome in outcomes].count(False) == 1
            assert {outcome.status for outcome in outcomes} == {"loaded"}

    run(main)
    assert [process.model for process in house.os.started] == ["A"]


def test_status_is_never_a_mixture(house: House) -> None:
    """Readers get one published whole, whatever the owner is doing meanwhile."""
    with house.sync() as orch, ThreadPoolExecutor(2) as threads:
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


# --------------------------------------------------------------------------- callers that go away


def test_a_cancelled_await_withdraws_only_its_caller(house: House) -> None:
    """One client's disconnect must not end the load for everybody who joined it."""
    house.open_gates = frozenset()

    async def main() -> None:
        async with house.asynchronous() as orch:
            first = asyncio.create_task(orch.load("A"))
            await asyncio.to_thread(house.until_callers, 1)
            second = asyncio.create_task(orch.load("A"))
            await asyncio.to_thread(house.until_callers, 2)
            first.cancel()
            await asyncio.to_thread(house.until_callers, 1)
            with pytest.raises(asyncio.CancelledError):
                await first
            house.effects.open()
            outcome = await second
            assert (outcome.status, outcome.generation, outcome.joined) == ("loaded", 1, True)

    run(main)


@pytest.mark.parametrize("policy", ["cancel", "continue"])
def test_the_last_caller_that_leaves_ends_the_load_or_not(policy: Any, house: House) -> None:
    """The embedding backend decides; either way the load's outcome can be asked for."""
    house.open_gates = frozenset()

    async def main() -> None:
        async with house.asynchronous(abandoned_load=policy) as orch:
            caller = asyncio.create_task(orch.load("A"))
            await asyncio.to_thread(house.until_callers, 1)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            await asyncio.to_thread(house.catch_up)
            house.effects.open()
            shown = await asyncio.to_thread(
                house.until, lambda s: s.ctx.effect is None and s.ctx.job is None
            )
            outcome = orch.outcome(1)
            if policy == "continue":
                assert shown.state is State.HEALTHY
                assert isinstance(outcome, LoadOutcome)
                assert outcome == orch.status().loaded
            else:
                assert shown.state is State.IDLE
                assert isinstance(outcome, Problem)
                assert outcome.category == "cancelled"

    run(main)


def test_a_caller_that_leaves_during_its_look_up_asks_for_nothing(house: House) -> None:
    """The call has its place in the order, but nobody waits at it any more."""
    house.hold_look_ups_of("A")

    async def main() -> None:
        async with house.asynchronous() as orch:
            pid = (await orch.load("B")).pid
            caller = asyncio.create_task(orch.load("A"))
            await asyncio.to_thread(house.look_up_has_begun, "A")
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            house.let_look_ups_go("A")
            assert (await orch.load("B", on_busy="queue")).model_path == "B"
            assert not house.owner._calls
            assert (await orch.load("B")).pid in house.os.alive
            assert pid == house.os.started[0].pid

    run(main)


def test_ctrl_c_in_a_load_withdraws_the_caller(house: House, pool: ThreadPoolExecutor) -> None:
    """A user who interrupts a load in a shell does not want it any more."""
    house.open_gates = frozenset()
    with house.sync() as orch:
        with ctrl_c(pool, lambda: house.effects.wait_for("kill")):
            orch.load("A")
        house.catch_up()
        assert orch.status().loading is None
        house.effects.open()
        house.until(lambda shown: shown.state is State.IDLE)
        assert not house.os.started
        assert not house.owner._calls


def test_ctrl_c_while_a_load_is_looked_up_withdraws_the_caller(
    house: House, pool: ThreadPoolExecutor
) -> None:
    house.hold_look_ups_of("A")
    with house.sync() as orch:
        with ctrl_c(pool, lambda: house.look_up_has_begun("A")):
            orch.load("A")
        house.catch_up()
        assert orch.status().generation == 0
        assert not house.owner._calls


def test_ctrl_c_in_the_moment_of_asking_withdraws_the_caller(house: House) -> None:
    """The load is on its way to the owner, and whoever wanted it has gone."""
    house.open_gates = frozenset()
    with house.sync() as orch:
        orch.start()
        ask = house.owner.ask

        def interrupted(*call: Any) -> None:
            ask(*call)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(house.owner, "ask", interrupted)
            with pytest.raises(KeyboardInterrupt):
                orch.load("A")
        house.catch_up()
        assert orch.status().loading is None
        house.effects.open()


def test_an_event_loop_may_be_closed_under_a_pending_load(house: House) -> None:
    """Nobody hears the answer; the owner answers all the same and serves the next caller."""
    house.open_gates = frozenset()
    orch = house.asynchronous()
    loop = asyncio.new_event_loop()
    caller: Any = loop.create_task(orch.load("A"))
    loop.run_until_complete(loop.run_in_executor(None, house.until_callers, 1))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    house.effects.open()
    house.until(lambda shown: shown.state is State.HEALTHY)

    async def main() -> None:
        outcome = await orch.load("A")
        assert (outcome.status, outcome.generation) == ("already_loaded", 1)
        await orch.close()

    run(main)
    assert not caller.done()
    caller._log_destroy_pending = False


def test_a_cancelled_submit_neither_blocks_the_loop_nor_goes_on(house: House) -> None:
    """Its generation will never be known to anybody, so the caller has gone."""
    house.open_gates = frozenset()
    house.hold_look_ups_of("A")

    async def main() -> None:
        async with house.asynchronous() as orch:
            caller = asyncio.create_task(orch.submit("A"))
            await asyncio.to_thread(house.look_up_has_begun, "A")
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            house.let_look_ups_go("A")
            with pytest.raises(ModelNotFound):
                await orch.load("missing")
            await asyncio.to_thread(house.catch_up)
            assert orch.status().loading is None
            house.effects.open()

    run(main)


def test_a_submit_cancelled_before_it_is_accepted_goes_away(house: House) -> None:
    """Between the question and its generation there is one step of the owner: hold it."""
    house.open_gates = frozenset()

    async def main() -> None:
        async with house.asynchronous() as orch:
            with house.owner.held():
                caller = asyncio.create_task(orch.submit("A"))
                await asyncio.to_thread(house.looked_up_count, 1)
                for _ in range(20):
                    await asyncio.sleep(0)
                caller.cancel()
                done, _ = await asyncio.wait({caller}, timeout=PATIENCE_S / 4)
                assert done, "a cancelled submit does not return"
                assert caller.cancelled()
            house.effects.open()
            await asyncio.to_thread(house.catch_up)
            await asyncio.to_thread(house.until, lambda shown: shown.state is State.IDLE)
            assert not house.os.started

    run(main)


def test_a_lease_granted_to_a_caller_that_has_just_left_is_given_back(house: House) -> None:
    """Otherwise every later swap would wait for the drain timeout, for nobody."""

    async def main() -> None:
        async with house.asynchronous() as orch:
            await orch.load("A")

            async def hold() -> None:
                async with orch.lease():
                    raise AssertionError("it was cancelled before")

            caller = asyncio.create_task(hold())
            await asyncio.sleep(0)  # it has asked and waits
            house.catch_up()  # it has been granted, and this loop has not heard of it yet
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            await asyncio.to_thread(house.catch_up)
            assert not house.owner.snapshot.ctx.leases

    run(main)


# ------------------------------------------------------------------------------ the order of calls


def test_a_slow_look_up_never_wins_over_a_newer_load(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """The last Apply wins, whichever model is on the slower disk."""
    house.hold_look_ups_of("A")
    with house.sync() as orch:
        older = pool.submit(orch.load, "A")
        house.look_up_has_begun("A")
        newer = orch.load("B")
        house.let_look_ups_go("A")
        assert isinstance(error_of(older), Superseded)
        status = orch.status()
        assert status.loaded is not None
        assert status.loaded.pid == newer.pid
        assert [process.model for process in house.os.started] == ["B"]


@pytest.mark.parametrize("model", [None, "A"])
def test_a_slow_look_up_never_wins_over_a_later_unload(
    model: str | None, house: House, pool: ThreadPoolExecutor
) -> None:
    """The user said stop last."""
    house.hold_look_ups_of("A")
    with house.sync() as orch:
        older = pool.submit(orch.load, "A")
        house.look_up_has_begun("A")
        assert orch.unload(model).status == ("unloaded" if model is None else "not_loaded")
        house.let_look_ups_go("A")
        assert isinstance(error_of(older), Cancelled)
        assert orch.status().state is State.IDLE
        assert not house.os.started
        assert orch.load("A").status == "loaded"


def test_a_slow_look_up_may_win_over_an_unload_of_something_else(
    house: House, pool: ThreadPoolExecutor
) -> None:
    house.hold_look_ups_of("A")
    with house.sync() as orch:
        older = pool.submit(orch.load, "A")
        house.look_up_has_begun("A")
        assert orch.unload("B").status == "not_loaded"
        house.let_look_ups_go("A")
        assert older.result(PATIENCE_S).status == "loaded"


def test_async_calls_keep_their_order_as_well(house: House) -> None:
    house.hold_look_ups_of("A")

    async def main() -> None:
        async with house.asynchronous() as orch:
            older = asyncio.create_task(orch.load("A"))
            await asyncio.to_thread(house.look_up_has_begun, "A")
            newer = await orch.load("B")
            house.let_look_ups_go("A")
            with pytest.raises(Superseded):
                await older
            assert orch.status().loaded == newer

    run(main)


def test_the_first_calls_keep_their_order_while_the_slot_is_claimed(house: House) -> None:
    """A call has its place from the moment it is made, not from when the owner is there."""
    house.claim_gate.clear()
    house.hold_look_ups_of("A")

    async def main() -> None:
        orch = house.asynchronous()
        older = asyncio.create_task(orch.load("A"))
        await asyncio.sleep(0)
        newer = asyncio.create_task(orch.unload())
        await asyncio.sleep(0)
        assert not house.owners
        house.claim_gate.set()
        assert (await newer).status == "unloaded"
        house.let_look_ups_go("A")
        with pytest.raises(Cancelled):
            await older
        assert orch.status().state is State.IDLE
        await orch.close()

    run(main)


# -------------------------------------------------------------------------------------- cancelling


def test_a_cancel_that_overtakes_its_load_still_wins(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """Two requests of one page may arrive in either order."""
    house.hold_look_ups_of("A")
    with house.sync() as orch:
        load = pool.submit(orch.load, "A", load_request_id="x")
        house.look_up_has_begun("A")
        assert orch.cancel("x") is False
        house.let_look_ups_go("A")
        assert isinstance(error_of(load), Cancelled)
        assert not house.os.started
        assert orch.load("A", load_request_id="y").status == "loaded"


def test_an_early_cancel_is_remembered_for_a_minute(house: House) -> None:
    with house.sync() as orch:
        for name in ("x", "y"):
            assert orch.cancel(name) is False
        house.pass_time(60.0)
        with pytest.raises(Cancelled):
            orch.load("A", load_request_id="x")
        house.pass_time(0.001)
        assert orch.load("A", load_request_id="y").status == "loaded"


def test_at_most_256_early_cancels_are_remembered(house: House) -> None:
    """Names are free to invent; memory is not."""
    with house.sync() as orch:
        for number in range(257):
            assert orch.cancel(f"id-{number}") is False
        assert len(house.owner.snapshot.ctx.cancelled_ids) == 256
        assert orch.load("A", load_request_id="id-0").status == "loaded"
        with pytest.raises(Cancelled):
            orch.load("B", load_request_id="id-256")


def test_a_cancel_ends_one_load_and_never_a_resident_model(
    house: House, pool: ThreadPoolExecutor
) -> None:
    house.open_gates = frozenset({"kill"})
    with house.sync() as orch:
        load = pool.submit(orch.load, "A", load_request_id="x")
        house.effects.wait_for("download")
        cancel = pool.submit(orch.cancel, "x")
        house.until(lambda shown: shown.ctx.job is not None and shown.ctx.job.token is not None)
        assert not load.done()
        house.effects.open()
        assert cancel.result(PATIENCE_S) is True
        assert isinstance(error_of(load), Cancelled)
        pid = orch.load("A", load_request_id="z").pid
        assert orch.cancel("z") is False
        assert orch.cancel(generation=2) is False
        assert orch.load("A").pid == pid


# -------------------------------------------------------------------- what becomes of older loads


def test_supersede_queue_and_reject(house: House, pool: ThreadPoolExecutor) -> None:
    """The three answers to "another load is in flight", as their callers hear them."""
    house.open_gates = frozenset()
    with house.sync() as orch:
        first = pool.submit(orch.load, "A")
        house.effects.wait_for("kill", 1)
        with pytest.raises(Busy) as busy:
            orch.load("B", on_busy="reject")
        assert busy.value.generation == 1
        second = pool.submit(orch.load, "B")
        assert isinstance(error_of(first), Superseded)
        third = pool.submit(orch.load, "C", on_busy="queue")
        house.until(lambda shown: len(shown.ctx.queue) == 1)
        fourth = pool.submit(orch.load, "C", on_busy="queue")
        house.until(
            lambda shown: len(shown.ctx.queue) == 1 and len(shown.ctx.queue[0].callers) == 2
        )
        assert not second.done()
        house.effects.open()
        assert second.result(PATIENCE_S).model_path == "B"
        assert third.result(PATIENCE_S).model_path == "C"
        assert fourth.result(PATIENCE_S).generation == third.result().generation == 3
        assert [process.model for process in house.os.started] == ["B", "C"]
    assert house.os.most_alive == 1


def test_a_deadline_ends_a_load_that_takes_longer(house: House, pool: ThreadPoolExecutor) -> None:
    house.open_gates = frozenset({"kill"})
    with house.sync() as orch:
        load = pool.submit(orch.load, "A", deadline_s=30)
        download = house.effects.wait_for("download")
        house.pass_time(29.9)
        assert not download.token.is_set()
        house.pass_time(0.2)
        assert download.token.reason == "deadline"
        download.fail()
        error = error_of(load)
        assert isinstance(error, DeadlineExceeded)
        assert error.field == "deadline_s"
        assert orch.status().state is State.IDLE


def test_a_deadline_that_was_met_ends_nothing(house: House) -> None:
    with house.sync() as orch:
        pid = orch.load("A", deadline_s=30).pid
        house.pass_time(31)
        assert orch.load("A", deadline_s=30).pid == pid


def test_a_lease_holds_a_swap_until_it_is_given_back_or_overdue(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """A generation in the middle is not cut off, and one that never ends does not stop a swap."""
    with house.sync(drain_timeout_s=5) as orch:
        pid = orch.load("A").pid
        with orch.lease() as server:
            assert (server.pid, server.generation) == (pid, 1)
            swap = pool.submit(orch.load, "B")
            house.until(lambda shown: shown.state is State.KILLING)
            assert pid in house.os.alive
        assert swap.result(PATIENCE_S).model_path == "B"
        with orch.lease():
            swap = pool.submit(orch.load, "A")
            house.until(lambda shown: shown.state is State.KILLING)
            house.pass_time(5.1)
            assert swap.result(PATIENCE_S).model_path == "A"
    with pytest.raises(NotLoaded), house.sync() as orch, orch.lease():
        pass


def test_the_longest_times_a_caller_may_give_can_be_waited_for(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """A timer longer than the platform can wait would end the owner's thread."""
    month_s = 30 * 24 * 3600.0
    with pytest.raises(InvalidRequest):
        house.sync(drain_timeout_s=1e300)
    with house.sync(drain_timeout_s=month_s) as orch:
        orch.load("A", deadline_s=month_s)
        with orch.lease():
            swap = pool.submit(orch.load, "B", deadline_s=month_s)
            house.until(lambda shown: shown.state is State.KILLING)
            house.catch_up()
        assert swap.result(PATIENCE_S).model_path == "B"


# ------------------------------------------------------------------------------------------ errors


def test_an_error_tells_its_story_and_its_generation(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """Who reads the error in a log must not need another log."""
    house.open_gates = frozenset({"kill", "download", "spawn"})
    with house.sync() as orch:
        load = pool.submit(orch.load, "A")
        house.effects.wait_for("probe").fail(
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
        assert "bad tensor" in str(error)
        status = orch.status()
        assert status.last_error is not None
        assert status.last_error.message == "it ended"
        assert status.story == error.story


def test_a_refusal_tells_the_story_so_far(house: House) -> None:
    with house.sync() as orch:
        orch.load("A")
        with pytest.raises(ModelNotFound) as missing:
            orch.load("missing")
        assert missing.value.story == orch.status().story


def test_the_outcome_of_a_load_can_be_asked_for_at_any_time(
    house: House, pool: ThreadPoolExecutor
) -> None:
    """In flight: None. Afterwards what became of the load, not of whoever asked last."""
    house.open_gates = frozenset({"kill", "download", "spawn"})
    with house.sync() as orch:
        with pytest.raises(KeyError):
            orch.outcome(1)
        generation = orch.submit("A")
        joined = pool.submit(orch.load, "A", load_request_id="x")
        house.until_callers(2)
        assert orch.cancel("x") is True
        assert isinstance(error_of(joined), Cancelled)
        assert orch.outcome(generation) is None
        house.effects.let_through("probe")
        house.until(lambda shown: shown.state is State.HEALTHY)
        house.catch_up()
        first = orch.outcome(generation)
        assert isinstance(first, LoadOutcome)
        assert first.status == "loaded"
        assert orch.load("A").status == "already_loaded"
        assert orch.outcome(generation) == first

        house.effects.open_gates = frozenset({"download", "spawn"})
        other = orch.submit("B")
        house.effects.let_through("kill")
        house.effects.wait_for("probe").fail()
        kill = house.effects.wait_for("kill")
        assert orch.outcome(other) is None  # settled when the slot is empty again
        kill.succeed()
        house.until(lambda shown: shown.state is State.IDLE)
        failed = orch.outcome(other)
        assert isinstance(failed, Problem)
        assert failed.category == "server_start_failed"
        assert failed.story == orch.status().story
        house.effects.open()


def test_a_submit_that_is_refused_raises_why(house: House) -> None:
    async def main() -> None:
        async with house.asynchronous() as orch:
            with pytest.raises(ModelNotFound):
                await orch.submit("missing")
            assert await orch.submit("A") == 1
            await asyncio.to_thread(house.until, lambda shown: shown.state is State.HEALTHY)
            await orch.load("A", load_request_id="x")
            assert not await orch.cancel("early")
            with pytest.raises(Cancelled):
                await orch.submit("B", load_request_id="early")

    run(main)
    with house.sync() as orch:
        with pytest.raises(ModelNotFound):
            orch.submit("missing")
        assert orch.submit("A") == 1


# -------------------------------------------------------------------------- what goes wrong inside


def test_an_effect_that_cannot_begin_fails_its_load_and_nothing_else(
    house: House, failures: list[Entry]
) -> None:
    with house.sync() as orch:

        def refuse(effect: object, _: object) -> None:
            if type(effect).__name__ == "Download":
                raise MemoryError("no room")

        house.effects.watch = refuse
        with pytest.raises(OrchestratorError, match="no room") as error:
            orch.load("A")
        assert error.value.generation == 1
        assert [entry["event"] for entry in failures] == ["effect.failed"]
        failures.clear()
        house.effects.watch = lambda _, __: None
        assert orch.load("A").status == "loaded"


def test_the_owner_outlives_a_fact_it_cannot_digest(house: House, failures: list[Entry]) -> None:
    """The call it came from is answered, and the next one finds the owner at work."""
    with house.sync() as orch:
        orch.start()
        owner = house.owner
        call = owner.call()
        owner.ask(call, LoadRequest(model_path="A", load_request_id="x"))  # type: ignore[arg-type]
        broken = owner.call()
        nonsense: Any = type("Nonsense", (), {"trigger": "load", "ticket": broken.ticket})()
        owner.post(nonsense)
        answer = broken.settled.result(PATIENCE_S)
        assert isinstance(answer, Problem)
        assert answer.category == "internal"
        assert {entry["event"] for entry in failures} == {"owner.failed"}
        failures.clear()
        assert orch.load("A").status == "loaded"
        owner.answer(call, Problem("internal", "it was nonsense"))


# --------------------------------------------------------------------- nothing blocks an event loop

ASYNC_CALLS: dict[str, Callable[[AsyncOrchestrator], Coroutine[Any, Any, Any]]] = {
    "load": lambda orch: orch.load("A"),
    "submit": lambda orch: orch.submit("A"),
    "unload": lambda orch: orch.unload(),
    "cancel": lambda orch: orch.cancel("x"),
    "lease": lambda orch: orch.lease().__aenter__(),
    "start": lambda orch: orch.start(),
    "close": lambda orch: orch.close(),
}


@pytest.mark.parametrize("name", ASYNC_CALLS)
def test_the_first_call_does_not_start_the_orchestrator_in_the_event_loop(
    name: str, house: House
) -> None:
    """Claiming a slot may have to end what a dead owner left there: seconds, with the loop held."""

    async def main() -> None:
        orch = house.asynchronous()
        try:
            await ASYNC_CALLS[name](orch)
        except NotLoaded:
            assert name == "lease"
        await orch.close()

    run(main)
    assert house.on_loop == []


def test_a_first_read_neither_claims_the_slot_nor_blocks(house: House) -> None:
    """To ask what would happen, nothing has to happen."""

    async def main() -> None:
        orch = house.asynchronous()
        assert orch.status().state is State.IDLE
        assert orch.progress().phase is None
        assert orch.logs() == ()
        assert orch.plan("A").action == "load"
        with pytest.raises(KeyError):
            orch.outcome(1)
        assert house.claims == 0
        assert (await orch.load("A")).status == "loaded"
        assert orch.plan("A").action == "none"
        assert orch.plan("A", n_parallel=2).action == "reload"
        await orch.close()

    run(main)
    # `plan` answers at once, so it looks the model up where it is called: see its docstring
    assert set(house.on_loop) == {"look up", "find the server"}


def test_look_ups_that_hang_stop_neither_the_loop_nor_other_calls(house: House) -> None:
    """Four models on a dead network file system: everything but looking up goes on."""
    house.hold_look_ups_of("A")

    async def main() -> None:
        async with house.asynchronous() as orch:
            loads = [
                asyncio.create_task(orch.load("A", load_request_id=f"id-{n}")) for n in range(6)
            ]
            await asyncio.to_thread(house.look_up_has_begun, "A")
            assert orch.status().state is State.IDLE
            assert not await orch.cancel("id-5")
            assert (await orch.unload("B")).status == "not_loaded"
            with pytest.raises(NotLoaded):
                async with orch.lease():
                    pass
            loads[4].cancel()
            with pytest.raises(asyncio.CancelledError):
                await loads[4]
            assert not any(load.done() for n, load in enumerate(loads) if n != 4)
            house.let_look_ups_go("A")
            answers = await asyncio.gather(*loads, return_exceptions=True)
            assert [type(answer) for answer in answers[4:]] == [asyncio.CancelledError, Cancelled]
            assert all(isinstance(answer, LoadOutcome) for answer in answers[:4])
            assert len({answer.generation for answer in answers[:4]}) == 1  # type: ignore[union-attr]

    started = time.perf_counter()
    run(main)
    assert time.perf_counter() - started < PATIENCE_S
    assert house.on_loop == []
