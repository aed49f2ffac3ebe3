"""The gate counts who uses a server; every order of callers and owner is explored elsewhere."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Hashable
from typing import Any

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.gate import Gate
from tests.kit.shell.gates import VirtualClock
from tests.kit.shell.harness import Harness

SERVER = LeasedServer("http://127.0.0.1:1", 41, Generation(1))


class Told:
    """A gate, and what it has told."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.drained: list[Generation] = []
        self.gate = Gate(SERVER, self.clock, self.drained.append)


@pytest.fixture
def told() -> Told:
    return Told()


def test_an_open_gate_hands_out_the_server_and_counts(told: Told) -> None:
    gate = told.gate
    assert (gate.enter("a"), gate.enter("b")) == (SERVER, SERVER)
    assert gate.inside == 2
    gate.leave("a")
    gate.leave("b")
    assert (gate.inside, told.drained) == (0, [])


def test_the_last_one_to_leave_a_gate_that_drains_tells_so_once(told: Told) -> None:
    gate = told.gate
    gate.enter("a")
    gate.enter("b")
    assert not gate.close(drains=True)
    assert gate.enter("c") is None
    gate.leave("a")
    assert told.drained == []
    gate.leave("b")
    gate.leave("b")  # as an interrupted caller may do
    gate.leave("c")
    assert told.drained == [1]


def test_a_gate_that_is_closed_for_good_tells_nothing(told: Told) -> None:
    gate = told.gate
    gate.enter("a")
    assert not gate.close(drains=False)
    gate.leave("a")
    assert told.drained == []


def test_closing_an_empty_gate_says_so_and_tells_nothing(told: Told) -> None:
    assert told.gate.close(drains=True)
    told.gate.leave("nobody")
    assert told.drained == []


def test_a_gate_without_a_server_is_never_open() -> None:
    gate = Gate(None, VirtualClock(), lambda _: None)
    assert gate.enter("a") is None
    assert gate.close_if_idle(0.0, 0.0) is None


def test_only_an_unused_gate_is_closed_for_its_idle_time(told: Told) -> None:
    gate, clock = told.gate, told.clock
    gate.enter("a")
    clock.now += 100.0
    assert gate.close_if_idle(60.0, 0.0) == 60.0  # in use
    gate.leave("a")
    clock.now += 20.0
    assert gate.close_if_idle(60.0, 0.0) == 40.0
    assert gate.enter("b") is SERVER  # it is still open
    gate.leave("b")
    clock.now += 60.0
    assert gate.close_if_idle(60.0, wanted_at=clock.now - 10.0) == 50.0  # a load asked for it
    assert gate.close_if_idle(60.0, 0.0) == 0.0
    assert gate.enter("c") is None
    assert gate.close_if_idle(60.0, 0.0) is None  # closed before
    gate.reopen()
    assert gate.enter("c") is SERVER


def test_an_idle_time_is_over_at_the_moment_that_a_sum_of_floats_says(told: Told) -> None:
    """Else its timer would be set again and again for no time at all."""
    told.clock.now = 0.1 + 0.2
    told.gate.enter("a")
    told.gate.leave("a")
    left_s = told.gate.close_if_idle(0.7, 0.0)
    assert left_s is not None
    told.clock.now += left_s - 1e-9
    assert told.gate.close_if_idle(0.7, 0.0) == 0.0


def test_nobody_enters_after_close_among_many_threads() -> None:
    """Whoever got in before is waited for, whoever comes later is not let in."""
    for _ in range(50):
        drained: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        gate = Gate(SERVER, VirtualClock(), drained.put)
        inside, is_over = [0], threading.Event()

        def use(gate: Gate = gate, inside: list[int] = inside, over: Any = is_over) -> None:
            me: Hashable = object()
            while gate.enter(me) is not None:
                inside[0] += 1  # only ever under the gate
                assert not over.is_set(), "let in after the drain"
                gate.leave(me)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        if not gate.close(drains=True):
            assert drained.get(timeout=20) == 1
        is_over.set()
        for thread in threads:
            thread.join()
        assert gate.inside == 0


def test_a_finalizer_may_leave_while_its_own_thread_enters(told: Told) -> None:
    """A dropped generator that holds a lease is finished by the garbage collector, anywhere."""
    gate = told.gate

    class Holder:
        def __init__(self) -> None:
            self.me = self
            gate.enter("holder")

        def __del__(self) -> None:
            gate.leave("holder")

    class Collecting(str):
        """Its hash is asked for within the gate."""

        def __hash__(self) -> int:
            gc.collect()
            return super().__hash__()

        __eq__ = str.__eq__

    Holder()
    assert gate.inside == 1
    assert gate.enter(Collecting("a")) is SERVER
    assert gate.inside == 1


# ------------------------------------------------------------------------------ with its owner


def test_a_lease_of_a_healthy_server_is_no_step(harness: Harness) -> None:
    """It cost two trips to the owner's thread."""
    with harness.sync() as orch:
        loaded = orch.load("A")
        harness.catch_up()
        snapshot = harness.owner.snapshot
        with orch.lease() as server:
            assert server.pid == loaded.pid
            assert orch.lease_count == orch.status().leases == 1
        harness.catch_up()
        assert harness.owner.snapshot.ctx is snapshot.ctx
        assert orch.lease_count == 0


def test_an_idle_time_counts_from_the_last_use(harness: Harness) -> None:
    with harness.sync(idle_ttl_s=60.0) as orch:
        orch.load("A")
        harness.pass_time(50.0)
        with orch.lease():
            assert orch.status().idle_unload_in_s is None
            harness.pass_time(50.0)  # the timer fires in here
            assert orch.status().state is State.HEALTHY
        assert orch.status().idle_unload_in_s == 60.0
        harness.pass_time(59.0)
        assert orch.status().state is State.HEALTHY
        harness.pass_time(1.5)
        harness.until(lambda shown: shown.state is State.IDLE)
