"""An orchestrator that is closed and started again, and one that is dropped while open."""

from __future__ import annotations

import asyncio
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest

from orchestrator import (
    AsyncOrchestrator,
    Orchestrator,
    ShuttingDown,
    SlotOwned,
    State,
    UnknownGeneration,
)
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    StartHost,
    Watch,
    in_a_fork,
    is_running,
    kill,
    until,
    until_state,
)
from tests.kit.sentences import assert_sentence


def test_closed_orchestrator_is_started_again(make: Make, fake: Fake, model_a: str) -> None:
    """A call that comes late starts nothing. Numbers go on, and the history with them."""
    orch = make()
    for life in (1, 2, 3):
        with orch:
            assert orch.status().state is State.IDLE
            assert orch.load(model_a).generation == life
            seen = orch.last_event_id
        for late in (orch.load, orch.submit, orch.plan, orch.prefetch, orch.variants):
            with pytest.raises(ShuttingDown) as refused:
                late(model_a)
            assert_sentence("facade.closed", refused.value.message)
        assert orch.last_event_id > seen
    orch.start()
    assert [load.generation for load in orch.history()] == [3, 2, 1]
    assert [event.id for event in orch._start().events.since(0)] == []
    assert len(fake.entries("start")) == 3
    with pytest.raises(UnknownGeneration):
        orch.outcome(4)


def test_refused_start_leaves_it_closed(make: Make, model_a: str) -> None:
    orch = make()
    orch.start().close()
    with make():
        with pytest.raises(SlotOwned):
            orch.start()
        with pytest.raises(ShuttingDown):
            orch.load(model_a)
    assert orch.start().load(model_a).status == "loaded"


def test_close_before_the_first_start_is_no_end(make: Make, model_a: str) -> None:
    orch = make()
    orch.close()
    with pytest.raises(ShuttingDown):
        orch.load(model_a)
    assert orch.start().load(model_a).status == "loaded"


def test_async_orchestrator_lives_in_one_event_loop_after_another(
    fake: Fake, state_dir: Path, model_a: str
) -> None:
    orch = AsyncOrchestrator(llama_server=fake.path, state_dir=str(state_dir), server_env=fake.env)

    async def life() -> int:
        async with orch:
            return (await orch.load(model_a)).generation

    assert [asyncio.run(life()) for _ in range(3)] == [1, 2, 3]
    assert fake.running() == set()


def test_one_that_is_dropped_while_open_warns_and_ends_its_server(
    make: Make, fake: Fake, state_dir: Path, model_a: str
) -> None:
    """Nobody could reach it any more, and the slot would stay claimed until the exit."""
    orch = Orchestrator(llama_server=fake.path, state_dir=str(state_dir), server_env=fake.env)
    server = Watch(orch.load(model_a).pid)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del orch
        gc.collect()
    assert ["an open Orchestrator was dropped" in str(one.message) for one in warned] == [True]
    server.seconds_to_exit(0)
    until(lambda: not fake.running(), "the server's end")

    until(lambda: is_free(make), "the slot")


def is_free(make: Make) -> bool:
    """Return whether the slot can be claimed, and then claim it."""
    try:
        make().start()
    except SlotOwned:
        return False
    return True


def test_one_that_was_closed_or_never_started_is_dropped_silently(
    make: Make, fake: Fake, state_dir: Path, model_a: str
) -> None:
    given: Any = {"llama_server": fake.path, "state_dir": state_dir, "server_env": fake.env}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Orchestrator(**given)
        orch = Orchestrator(**given)
        with orch:
            orch.load(model_a)
        del orch
        gc.collect()


def test_a_fork_drops_nothing_of_its_parent(orch: Orchestrator, fake: Fake, model_a: str) -> None:
    pid = orch.load(model_a).pid
    kill(in_a_fork(orch.__del__))
    assert fake.running() == {pid}


def test_one_that_is_dropped_at_the_very_end_leaves_no_server(host: StartHost, fake: Fake) -> None:
    """The exit waits for it, as it does for one that is open."""
    program = 'import gc\nsend(pid=orch.load(a["model"]).pid)\ndel orch\ngc.collect()\n'
    backend = host(program)
    server = backend.receive()["pid"]
    assert backend.process.wait(30) == 0
    until(lambda: not is_running(server), "the end of the server")
    assert fake.running() == set()


def test_the_facades_have_the_same_methods() -> None:
    names = [
        {name for name in dir(one) if name[0] != "_"} for one in (Orchestrator, AsyncOrchestrator)
    ]
    assert names[0] == names[1]


def test_draining_is_visible(make: Make, model_a: str) -> None:
    """Who waits for an unload sees for what, and how long at most."""
    orch = make(drain_timeout_s=60.0)
    orch.load(model_a)
    with orch.lease(), orch.lease():
        status = orch.status()
        assert (status.leases, status.draining_left_s) == (2, None)
        unloading = Background(orch.unload)
        until_state(orch, State.KILLING)
        status = orch.status()
        assert status.leases == 2
        assert 0 < (status.draining_left_s or 0) <= 60
    assert unloading.result().status == "unloaded"
    assert (orch.status().leases, orch.status().draining_left_s) == (0, None)
