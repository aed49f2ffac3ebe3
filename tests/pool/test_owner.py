"""The pool's owner between two steps: who leaves while it decides, and who gets a free place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from orchestrator.base.tokens import Generation
from orchestrator.pool import commands, facts
from orchestrator.pool.context import Context, Definition, Need, Policy, Turn
from orchestrator.pool.facts import Fact
from orchestrator.pool.owner import Granted, Lease, PoolCall, PoolOwner
from orchestrator.pool.states import State
from orchestrator.pool.step import PoolMachine, Stepped, pool_machine
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.gate import Gate
from tests.kit.pool.run import host
from tests.kit.shell.gates import VirtualClock


class Slots:
    """Slots whose servers are Healthy as soon as they are started."""

    def __init__(self, places: int | None) -> None:
        self.places = places
        self.gates: dict[str, Gate] = {}
        self.started: list[commands.Start] = []
        self.stopped: list[commands.Stop] = []

    def gate(self, name: str) -> Gate | None:
        return self.gates.get(name)

    def start(self, command: commands.Start) -> None:
        server = LeasedServer("http://127.0.0.1:1", 41, command.generation)
        gate = self.gates[command.name] = Gate(server, VirtualClock(), lambda _: None)
        gate.places = self.places
        self.started.append(command)

    def stop(self, command: commands.Stop) -> None:
        self.gates[command.name].close(drains=False)
        self.stopped.append(command)

    def measure(self, command: commands.Measure) -> None:
        raise AssertionError("every need is known here")

    def rest(self) -> None: ...


class Machine(PoolMachine):
    """The shipped machine; something may happen when it has decided, before anybody can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] | None = None

    def step(self, ctx: Context, fact: Fact) -> Stepped:
        stepped = pool_machine().step(ctx, fact)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return stepped


class Pool:
    """An owner that is pumped by hand, with room for one model."""

    def __init__(self, *names: str, places: int | None = None, **policy: Any) -> None:
        self.slots, self.machine, self.clock = Slots(places), Machine(), VirtualClock(0.0)
        self.owner = PoolOwner(lambda _: self.slots, self.clock, machine=self.machine)
        settings = Policy(min_resident_s=0.0, **policy)
        self.do(facts.Configured(settings, host(1000), 0.0))
        for name in names:
            self.do(facts.Defined(name, Definition(Need(host(1000))), 0.0))

    def do(self, fact: Fact) -> None:
        self.owner.pump(fact)
        self.pump()

    def pump(self) -> None:
        """Process what has been posted meanwhile."""
        inbox = self.owner._inbox
        while not inbox.empty():
            fact = inbox.get()
            assert fact is not None
            self.owner.pump(cast("Fact", fact))

    def want(self, name: str, kind: Any = "lease", turn: Turn | None = None) -> PoolCall:
        call = self.owner.call(name, kind)
        self.do(facts.Wanted(name, call.ticket, kind, self.clock(), turn=turn or Turn()))
        return call

    def healthy(self) -> None:
        start = self.slots.started[-1]
        self.do(facts.BecameHealthy(start.name, start.generation, self.clock()))

    def leave(self, call: PoolCall) -> None:
        """End a lease as its caller does; what it posts stays in the inbox."""
        lease = lease_of(call)
        lease.gate.leave(lease.who)
        self.owner.left(lease.name, lease.gate)

    def inside(self, name: str) -> int:
        return self.slots.gates[name].inside


def lease_of(call: PoolCall) -> Lease:
    answer = call.settled.result(0)
    assert isinstance(answer, Granted)
    assert answer.lease is not None
    return answer.lease


def granted(*calls: PoolCall) -> list[bool]:
    return [call.settled.done() and not call.settled.cancelled() for call in calls]


def test_a_lease_that_ends_while_the_pool_decides_is_seen() -> None:
    """Who leaves cannot see who begins to wait in this step, nor can the step see who leaves."""
    pool = Pool("a", "b", max_wait_s=30.0)
    first = pool.want("a")
    pool.healthy()
    pool.machine.meanwhile = lambda: pool.leave(first)
    pool.want("b")
    assert [stop.name for stop in pool.slots.stopped] == ["a"]


@pytest.fixture
def one_place() -> Pool:
    """A model is resident, and a request has its only place."""
    return Pool("a", "b", places=1)


def test_as_many_requests_are_at_a_server_as_it_has_places() -> None:
    pool = Pool("a", places=2)
    calls = [pool.want("a", "request") for _ in range(5)]
    pool.healthy()
    assert (granted(*calls), pool.inside("a")) == ([True, True, False, False, False], 2)
    pool.leave(calls[1])
    pool.pump()
    assert (granted(*calls), pool.inside("a")) == ([True, True, True, False, False], 2)


def test_a_request_whose_place_ends_while_the_pool_decides_makes_room(one_place: Pool) -> None:
    first = one_place.want("a", "request")
    one_place.healthy()
    one_place.machine.meanwhile = lambda: one_place.leave(first)
    assert granted(one_place.want("a", "request")) == [True]


def test_a_lease_takes_no_place_and_waits_for_none(one_place: Pool) -> None:
    first, lease = one_place.want("a", "request"), one_place.want("a")
    one_place.healthy()
    other, load = one_place.want("a"), one_place.want("a", "load")
    assert granted(first, lease, other, load) == [True] * 4
    assert one_place.inside("a") == 3


def test_a_request_does_not_pass_those_that_wait(one_place: Pool) -> None:
    first = one_place.want("a", "request")
    one_place.healthy()
    second = one_place.want("a", "request")
    lease = lease_of(first)
    lease.gate.leave(lease.who)  # nobody has heard of it yet
    third = one_place.want("a", "request")
    assert granted(second, third) == [True, False]


def test_a_place_whose_waiter_has_gone_away_goes_to_the_next(one_place: Pool) -> None:
    first = one_place.want("a", "request")
    one_place.healthy()
    second, third = (one_place.want("a", "request") for _ in range(2))
    one_place.machine.meanwhile = lambda: second.settled.cancel()  # it has been admitted by then
    one_place.leave(first)
    one_place.pump()
    assert (granted(third), one_place.inside("a")) == ([True], 1)


def test_keys_take_turns_by_their_weight(one_place: Pool) -> None:
    turns = {"heavy": Turn("heavy", 3.0), "light": Turn("light", 1.0)}
    running = one_place.want("a", "request")
    one_place.healthy()
    calls = [(key, one_place.want("a", "request", turns[key])) for key in turns for _ in range(40)]
    order = []
    for _ in range(40):
        one_place.leave(running)
        one_place.pump()
        key, running = next(one for one in calls if granted(one[1]) == [True])
        calls.remove((key, running))
        order.append(key)
    assert order[:4].count("light") == 1
    assert order.count("light") == 10


def test_a_key_that_comes_back_has_no_credit(one_place: Pool) -> None:
    """Else it would have the server to itself for as long as it was away."""
    ann, bob = Turn("ann"), Turn("bob")
    running = one_place.want("a", "request", ann)
    one_place.healthy()
    for _ in range(10):
        waits = one_place.want("a", "request", ann)
        one_place.leave(running)
        one_place.pump()
        running = waits
    order = []
    calls = [("bob", one_place.want("a", "request", bob)) for _ in range(4)]
    calls += [("ann", one_place.want("a", "request", ann)) for _ in range(4)]
    for _ in range(4):
        one_place.leave(running)
        one_place.pump()
        key, running = next(one for one in calls if granted(one[1]) == [True])
        calls.remove((key, running))
        order.append(key)
    assert order.count("ann") == 2


def test_a_queue_at_a_server_does_not_keep_it_from_who_is_overdue() -> None:
    """Requests that came after the one for another model yield; those before it are served."""
    one_place = Pool("a", "b", places=1)
    first = one_place.want("a", "request")
    one_place.healthy()
    one_place.clock.now = 1.0
    older = one_place.want("a", "request")
    one_place.clock.now = 2.0
    one_place.want("b", "request")
    one_place.clock.now = 3.0
    younger = one_place.want("a", "request")
    one_place.clock.now = 40.0
    one_place.do(facts.Looked(one_place.clock()))
    assert not one_place.slots.stopped  # the older one waits for a place
    one_place.leave(first)
    one_place.pump()
    assert granted(older, younger) == [True, False]
    assert [stop.name for stop in one_place.slots.stopped] == ["a"]
    entry = one_place.owner.ctx.find("a")
    assert entry is not None
    assert (entry.state, entry.generation) == (State.STOPPING, Generation(1))


def test_a_queue_keeps_its_server_from_who_is_not_overdue(one_place: Pool) -> None:
    """In the instant between two requests nobody is inside, but somebody waits."""
    first = one_place.want("a", "request")
    one_place.healthy()
    one_place.want("b")
    second = one_place.want("a", "request")
    lease = lease_of(first)
    lease.gate.leave(lease.who)
    one_place.do(facts.Looked(one_place.clock()))
    assert granted(second) == [True]
    assert not one_place.slots.stopped
