"""A pool that is dropped while it is open, closed and started again, or met in a fork."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ModelPool, SlotOwned, WrongProcess
from tests.kit.process.support import Fake, Watch, in_a_fork, kill, until

MakePool = Callable[[], ModelPool]


@pytest.fixture
def make_pool(fake: Fake, state_dir: Path, model_a: str, model_b: str) -> MakePool:
    """Return a function that makes a pool of two models, of which two fit."""
    models = {name: {"model_path": path} for name, path in (("a", model_a), ("b", model_b))}
    catalogue: dict[str, Any] = {
        "pool": {"memory": "2 GiB"},
        "models": {name: {**entry, "memory": "1 GiB"} for name, entry in models.items()},
    }
    return lambda: ModelPool(
        catalogue, llama_server=fake.path, state_dir=state_dir, server_env=fake.env
    )


def test_pool_that_is_dropped_while_open_warns_and_ends_its_servers(
    make_pool: MakePool, fake: Fake
) -> None:
    """Nobody could reach it any more, and its slots would stay claimed until the exit."""
    pool = make_pool().start()
    servers = [Watch(pool.load(name).pid) for name in "ab"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del pool
        gc.collect()
    assert ["an open ModelPool was dropped" in str(one.message) for one in warned] == [True]
    assert warned[0].category is ResourceWarning
    for server in servers:
        server.seconds_to_exit(0)
    until(lambda: not fake.running(), "the servers' end")
    until(lambda: _is_free(make_pool()), "the pool's slot")


def _is_free(pool: ModelPool) -> bool:
    """Return whether its slots can be claimed, and give them back."""
    try:
        with pool:
            return True
    except SlotOwned:
        return False


def test_pool_that_was_closed_or_never_started_is_dropped_silently(make_pool: MakePool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_pool()
        with make_pool() as pool:
            pool.load("a")
        del pool
        gc.collect()


def test_closed_pool_is_started_again(make_pool: MakePool, fake: Fake) -> None:
    pool = make_pool()
    for count in (1, 2):
        with pool:
            assert pool.load("a").status == "loaded"
        assert len(fake.entries("start")) == count
        assert not fake.running()


def test_a_fork_drops_nothing_of_its_parents_pool(make_pool: MakePool, fake: Fake) -> None:
    """It has no thread of it: a call would wait for ever, and an end would be the parent's."""
    with make_pool() as pool:
        pid = pool.load("a").pid

        def in_child() -> None:
            pool.__del__()
            pool.close()
            with pytest.raises(WrongProcess):
                pool.load("a")

        kill(in_a_fork(in_child))
        assert pool.load("a").pid == pid
