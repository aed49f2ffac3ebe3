"""Idle unload on real processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator import InvalidRequest, NotLoaded, Orchestrator, State
from tests.kit.process.support import Make, is_running, until

TTL_S = 0.25


def test_an_idle_model_is_unloaded_and_leaves_no_process(make: Make, model_a: str) -> None:
    """Reading the status does not count as use."""
    orch = make(idle_ttl_s=TTL_S)
    loaded = orch.load(model_a)
    assert (orch.status().idle_unload_in_s or 0) > 0
    until(lambda: orch.status().state is State.IDLE, "the idle unload")
    assert not is_running(loaded.pid)
    assert orch.status().loaded is None
    assert "idle_expired" in "".join(orch.status().story)
    with pytest.raises(NotLoaded), orch.lease():
        pass


def test_a_lease_keeps_the_model_loaded_beyond_its_idle_time(make: Make, model_a: str) -> None:
    """The whole idle time starts again when the lease is released."""
    orch = make(idle_ttl_s=TTL_S)
    loaded = orch.load(model_a)
    expired = threading.Event()
    with orch.lease():
        assert orch.status().idle_unload_in_s is None
        threading.Timer(3 * TTL_S, expired.set).start()
        assert expired.wait(10)
        assert orch.status().state is State.HEALTHY
        assert is_running(loaded.pid)
    left_s = until(lambda: orch.status().idle_unload_in_s, "the release of the lease")
    assert 0 < left_s <= TTL_S
    until(lambda: orch.status().state is State.IDLE, "the idle unload")


def test_a_pinned_model_stays_until_it_is_loaded_without_the_pin(make: Make, model_a: str) -> None:
    """The newest request decides, also for a model that is already loaded."""
    orch = make(idle_ttl_s=TTL_S)
    first = orch.load(model_a, pinned=True)
    assert orch.status().idle_unload_in_s is None
    again = orch.load(model_a)
    assert (again.status, again.pid) == ("already_loaded", first.pid)
    until(lambda: orch.status().state is State.IDLE, "the idle unload")


@pytest.mark.external
def test_no_lease_is_granted_on_a_server_being_stopped(
    llama_server: str, state_dir: Path, tiny_model: str
) -> None:
    """B27, B63: leases are requested just as the idle time ends. Each gets a server that runs until
    the release, or is refused.
    """
    granted = refused = 0
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
        for number in range(30):
            ttl_s = 0.004 + 0.0002 * number
            orch.load(tiny_model, idle_ttl_s=ttl_s)
            while True:
                try:
                    with orch.lease() as server:
                        granted += 1
                        assert is_running(server.pid)
                except NotLoaded:
                    refused += 1
                    break
                threading.Event().wait(ttl_s)  # wake up together with the timer
    assert refused == 30
    assert granted > 0


@pytest.mark.parametrize("value", [0, -1, float("nan"), "soon", True])
def test_an_invalid_idle_time_is_refused(make: Make, value: object) -> None:
    """Zero is refused because it may be meant as "never"."""
    with pytest.raises(InvalidRequest) as caught:
        make(idle_ttl_s=value)
    assert caught.value.field == "idle_ttl_s"
