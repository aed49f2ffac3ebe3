"""A pool over real servers: several models by name in a budget that holds two of them."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator import (
    AsyncModelPool,
    Cancelled,
    InvalidCatalogue,
    InvalidRequest,
    LeasedServer,
    ModelNotFound,
    ModelPool,
    Orchestrator,
    ServerStartFailed,
    SlotOwned,
    State,
    TooLarge,
    TooManyWaiting,
    Turn,
)
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.process.support import is_running, until

pytestmark = pytest.mark.external
NAMES = "abcd"
TWO = "250 MiB"  # each needs about 104

Pools = Callable[..., ModelPool]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {n: str(write_tiny_model(folder / f"{n}.gguf", seed=ord(n))) for n in NAMES}


@pytest.fixture
def catalogue(files: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """Return a catalogue of the four models, with changes to single entries."""

    def made(pool: dict[str, Any] | None = None, **changed: dict[str, Any]) -> dict[str, Any]:
        settings = {"memory": TWO, "cache_ram_mib": 100, "min_resident_s": 0, "max_wait_s": 0.5}
        models = {n: {"model_path": path, **changed.get(n, {})} for n, path in files.items()}
        return {"pool": settings | (pool or {}), "models": models}

    return made


@pytest.fixture
def pools(llama_server: str, state_dir: Path) -> Iterator[Pools]:
    """Return a function that starts a pool, which ends with the test."""
    with ExitStack() as undo:

        def start(models: Any, **options: Any) -> ModelPool:
            made = ModelPool(models, llama_server=llama_server, state_dir=state_dir, **options)
            return undo.enter_context(made)

        yield start


def resident(pool: ModelPool) -> set[str]:
    return {one.name for one in pool.status().models if one.state is State.HEALTHY}


def eventually(holds: Callable[[], object]) -> None:
    until(holds, "the pool's status")


def pid_of(pool: ModelPool, name: str) -> int | None:
    return pool.model_status(name).pid


def waited_for(pool: AsyncModelPool) -> list[str]:
    return [one.model for one in pool.status().waiting]


def reserved_mib(pool: ModelPool) -> int:
    [host] = pool.status().budget
    assert host.reserved_mib <= host.total_mib
    return host.reserved_mib


def test_requests_load_what_they_name_and_evict_what_is_idle(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue())
    assert reserved_mib(pool) == 0
    first, second = pool.load("a"), pool.load("b")
    assert (first.evicted, second.evicted) == ([], [])
    assert resident(pool) == {"a", "b"}
    assert reserved_mib(pool) == 2 * 104
    with pool.lease("c") as server:
        assert resident(pool) == {"b", "c"}
        assert server.pid == pid_of(pool, "c")
    assert not is_running(first.pid)
    assert pool.load("c").status == "already_loaded"
    assert pool.load("d").evicted == ["b"]
    assert reserved_mib(pool) == 2 * 104
    assert pool.unload("d").status == "unloaded"
    assert reserved_mib(pool) == 104
    assert resident(pool) == {"c"}


def test_many_requests_for_one_model_that_is_not_there_make_one_load(
    llama_server: str, state_dir: Path, catalogue: Callable[..., dict[str, Any]]
) -> None:
    async def main() -> None:
        async with AsyncModelPool(
            catalogue({"max_waiting": 1000}), llama_server=llama_server, state_dir=state_dir
        ) as pool:

            async def request() -> int:
                async with pool.lease("a") as server:
                    return server.pid

            pids = await asyncio.gather(*(request() for _ in range(1000)))
            assert len(set(pids)) == 1
            assert pool.model_status("a").generation == 1

    asyncio.run(main())


def test_more_than_max_waiting_are_refused_at_once(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue({"max_waiting": 3, "max_wait_s": 60}))
    with pool.lease("a"), pool.lease("b"), ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(_pid, pool, "c") for _ in range(3)]
        eventually(lambda: pool.model_status("c").waiting == 3)
        with pytest.raises(TooManyWaiting) as refused, pool.lease("c"):
            pass
        assert refused.value.retry_after_s
        [line] = pool.status().waiting
        assert (line.model, line.count) == ("c", 3)
        pool.unload("c")
        assert [type(one.exception()) for one in waiting] == [Cancelled] * 3


def _pid(pool: ModelPool, name: str) -> int:
    with pool.lease(name) as server:
        return server.pid


def test_as_many_requests_are_at_a_server_as_it_has_slots(
    llama_server: str, state_dir: Path, catalogue: Callable[..., dict[str, Any]]
) -> None:
    """Its own queue stays empty; who waits is counted here, and a lease without a turn is not."""

    async def main() -> None:
        async with AsyncModelPool(
            catalogue(a={"n_parallel": 2}), llama_server=llama_server, state_dir=state_dir
        ) as pool:
            may_end = asyncio.Event()
            inside, most = 0, 0

            async def request(number: int) -> int:
                nonlocal inside, most
                async with pool.lease("a", turn=Turn("odd" if number % 2 else "even")) as server:
                    inside += 1
                    most = max(most, inside)
                    await may_end.wait()
                    inside -= 1
                    return server.pid

            runs = [asyncio.create_task(request(number)) for number in range(9)]
            await asyncio.to_thread(
                eventually, lambda: pool.status().waiting and pool.status().waiting[0].count == 7
            )
            await asyncio.to_thread(eventually, lambda: inside == 2)
            assert pool.status().waiting[0].count == 7
            async with pool.lease("a"):
                assert pool.model_status("a").leases == 3
            may_end.set()
            pids = await asyncio.gather(*runs)
            assert (most, len(set(pids)), inside) == (2, 1, 0)

    asyncio.run(main())


def test_server_in_use_goes_only_for_who_has_waited_max_wait(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    """It is closed to new leases, and drained."""
    pool = pools(catalogue({"max_wait_s": 0.3}), drain_timeout_s=60)
    with ThreadPoolExecutor(4) as threads:
        with pool.lease("a") as a, pool.lease("b"):
            waiting = threads.submit(_pid, pool, "c")
            eventually(lambda: pool.model_status("c").waiting == 1)
            assert resident(pool) == {"a", "b"}
            eventually(lambda: resident(pool) != {"a", "b"})
            assert not waiting.done()
            assert is_running(a.pid)
        assert waiting.result() == pid_of(pool, "c")


def test_endless_traffic_on_residents_starves_no_other_model(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool, is_over = pools(catalogue({"max_wait_s": 0.2})), threading.Event()

    def traffic(name: str) -> int:
        count = 0
        while not is_over.is_set():
            with pool.lease(name):
                count += 1
        return count

    with ThreadPoolExecutor(8) as threads:
        busy = [threads.submit(traffic, name) for name in "aabb"]
        try:
            for name in "cdcd":
                _pid(pool, name)
                reserved_mib(pool)
        finally:
            is_over.set()
        assert all(one.result() > 0 for one in busy)


def test_pinned_models_stay_and_what_cannot_fit_beside_them_is_refused(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue(a={"pinned": True}, b={"pinned": True}))
    pool.load("a")
    pool.load("b")
    with pytest.raises(TooLarge) as refused:
        pool.load("c")
    assert "250 MiB" in refused.value.message
    assert resident(pool) == {"a", "b"}
    pool.unload("a")
    assert pool.load("c").evicted == []


def test_pins_that_are_known_to_exceed_a_given_budget_are_refused(
    pools: Pools,
    catalogue: Callable[..., dict[str, Any]],
    files: dict[str, str],
    tmp_path: Path,
) -> None:
    """At the start and when the catalogue is read again: then it changes nothing."""
    pinned = {"pinned": True}
    with pools(catalogue({"memory": "150 MiB"})) as pool:
        pool.load("a")
        pool.load("b")
    with pytest.raises(InvalidCatalogue) as refused:
        pools(catalogue({"memory": "150 MiB"}, a=pinned, b=pinned))
    assert refused.value.field == "models.b.pinned"
    pools(catalogue({"memory": "150 MiB"}, a=pinned)).close()
    file = tmp_path / "models.toml"
    text = '[pool]\nmemory = "150 MiB"\ncache_ram_mib = 100\n'
    for name in "ab":
        text += f'[models.{name}]\nmodel_path = "{files[name]}"\npinned = true\n'
    file.write_text(text.removesuffix("pinned = true\n"))
    pool = pools(file)
    file.write_text(text)
    with pytest.raises(InvalidCatalogue):
        pool.reload()
    assert not pool.model_status("b").pinned


def test_of_a_group_one_is_resident(pools: Pools, catalogue: Callable[..., dict[str, Any]]) -> None:
    large = {"group": "large"}
    pool = pools(catalogue({"memory": "10 GiB"}, a=large, b=large))
    pool.load("a")
    pool.load("c")
    assert pool.load("b").evicted == ["a"]
    assert resident(pool) == {"b", "c"}


def test_declared_memory_is_believed(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue(a={"memory": "1 MiB"}))
    memory = pool.load("a").memory
    shown = pool.model_status("a").memory
    assert memory is not None
    assert shown is not None
    assert (shown.mib, shown.source) == (1, "declared")
    assert shown.server_mib == memory.server_mib == 4


def test_context_that_is_auto_is_fitted_into_the_budget(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """An explicit one is refused."""
    long = str(write_tiny_model(tmp_path / "long.gguf", context_length=262144))
    models = catalogue({"memory": "160 MiB"}, a={"model_path": long})
    models["models"]["b"] = {"model_path": long, "max_seq_length": 262144}
    pool = pools(models)
    with pytest.raises(TooLarge):
        pool.load("b")
    loaded = pool.load("a")
    assert loaded.memory is not None
    assert loaded.memory.fitted
    assert loaded.context_length is not None
    assert 4096 <= loaded.context_length < 262144
    assert 100 < reserved_mib(pool) <= 160


def test_server_that_outgrows_its_estimate_is_ended_and_its_figure_known(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B96: the estimate is wrong for a new architecture. Others make room for the true figure."""
    monkeypatch.setattr("orchestrator.runtime.sizes.spread", lambda *_: {"Host": 101})
    pool = pools(catalogue({"memory": "206 MiB"}))
    pool.load("a")
    assert pool.load("b").evicted == ["a"]
    memory = pool.model_status("b").memory
    assert memory is not None
    assert (memory.mib, memory.source) == (104, "exact")
    assert reserved_mib(pool) == 104


def test_start_that_ends_with_out_of_memory_evicts_what_is_idle_and_is_tried_once_more(
    catalogue: Callable[..., dict[str, Any]],
    llama_server: str,
    state_dir: Path,
    tmp_path: Path,
) -> None:
    """What is in use stays, and a second failure is the answer."""
    full, server = tmp_path / "full", tmp_path / "server"
    message = "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 5"
    fails = (
        f'[ "$1" = --help ] || [ ! -s {full} ] || {{ sed -i 1d {full}; echo "{message}"; exit 1; }}'
    )
    server.write_text(f'#!/bin/sh\n{fails}\nexec {shlex.quote(llama_server)} "$@"\n')
    server.chmod(0o755)
    models = catalogue({"memory": "10 GiB"})
    with ModelPool(models, llama_server=str(server), state_dir=state_dir) as pool:
        pool.load("a")
        pool.load("b")
        with pool.lease("b"):
            full.write_text("once\n")
            assert pool.load("c").evicted == ["a"]
            assert resident(pool) == {"b", "c"}
            full.write_text("once\nand again\n")
            with pytest.raises(ServerStartFailed) as failed:
                pool.load("d")
        assert failed.value.reason == "out_of_memory"
        assert resident(pool) == {"b"}


def test_crashed_server_is_loaded_again_by_the_next_request(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    """And the others are left alone."""
    pool = pools(catalogue())
    a, b = pool.load("a"), pool.load("b")
    os.kill(a.pid, signal.SIGKILL)
    eventually(lambda: resident(pool) == {"b"})
    assert _pid(pool, "a") != a.pid
    assert pid_of(pool, "b") == b.pid


def test_crashed_server_comes_back_by_the_restart_policy(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue(), restart="on-crash")
    first = pool.load("a")
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: pid_of(pool, "a") not in {None, first.pid})


def test_after_a_failed_start_requests_get_the_same_answer_for_a_while(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], llama_server: str
) -> None:
    """A load by hand tries at once."""
    pool = pools(catalogue(a={"llama_extra_args": ["--seed", "nonsense"]}))
    pool.load("b")
    with pytest.raises(ServerStartFailed) as first, pool.lease("a"):
        pass
    generation = pool.model_status("a").generation
    with pytest.raises(ServerStartFailed) as second, pool.lease("a"):
        pass
    assert second.value.message == first.value.message
    assert second.value.retry_after_s
    assert pool.model_status("a").generation == generation
    error = pool.model_status("a").last_error
    assert error is not None
    assert error.message == first.value.message
    with pytest.raises(ServerStartFailed):
        pool.load("a")
    assert pool.model_status("a").generation == generation + 1
    assert resident(pool) == {"b"}
    assert reserved_mib(pool) == 104


def test_model_whose_file_is_missing_says_so(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pool = pools(catalogue(a={"model_path": str(tmp_path / "none.gguf")}))
    with pytest.raises(ModelNotFound):
        pool.load("a")
    with pytest.raises(ModelNotFound) as unknown, pool.lease("nobody"):
        pass
    assert "a, b, c, d" in unknown.value.message


def test_last_waiter_that_leaves_withdraws_the_load(
    llama_server: str, state_dir: Path, catalogue: Callable[..., dict[str, Any]]
) -> None:
    async def main() -> None:
        async with AsyncModelPool(
            catalogue(), llama_server=llama_server, state_dir=state_dir
        ) as pool:

            async def request(name: str) -> int:
                async with pool.lease(name) as server:
                    return server.pid

            async with pool.lease("a"), pool.lease("b"):
                stays = asyncio.create_task(request("c"))
                leaves = asyncio.create_task(request("d"))
                await asyncio.to_thread(eventually, lambda: waited_for(pool) == ["c", "d"])
                leaves.cancel()
                await asyncio.to_thread(eventually, lambda: waited_for(pool) == ["c"])
            assert await stays == pool.model_status("c").pid
            assert pool.model_status("d").generation == 0

    asyncio.run(main())


def test_cancel_ends_a_load_and_leaves_a_resident_alone(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue({"max_wait_s": 60}))
    with pool.lease("a") as a, pool.lease("b"), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.load, "c")
        eventually(lambda: pool.model_status("c").waiting == 1)
        assert pool.cancel("c") is True
        assert isinstance(waiting.exception(), Cancelled)
        assert pool.cancel("a") is False
        assert is_running(a.pid)


def test_plan_says_what_a_load_would_evict(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue(d={"memory": "1 GiB"}))
    pool.load("a")
    pool.load("b")
    plan = pool.plan("c")
    assert (plan.action, plan.fits, plan.evict) == ("load", True, ["a"])
    assert plan.memory is not None
    assert resident(pool) == {"a", "b"}
    assert pool.plan("a").action == "none"
    assert pool.plan("d").fits is False
    assert pool.load("c").evicted == plan.evict


def test_catalogue_read_again_changes_only_what_has_changed(
    pools: Pools, files: dict[str, str], tmp_path: Path
) -> None:
    """B98: a changed line restarts its own model, and that at its next request."""
    file = tmp_path / "models.toml"

    def write(*tables: str) -> None:
        head = '[pool]\nmemory = "10 GiB"\n'
        file.write_text("\n".join([head, *(t.format(**files) for t in tables)]))

    a, b = '[models.a]\nmodel_path = "{a}"\n', '[models.b]\nmodel_path = "{b}"\n'
    c, d = '[models.c]\nmodel_path = "{c}"\n', '[models.d]\nmodel_path = "{d}"\n'
    write(a, b, c)
    pool = pools(file)
    before = {name: pool.load(name).pid for name in "abc"}
    pool.add("e", model_path=files["d"])
    write(a + "n_parallel = 1\n", b + 'aliases = ["gpt"]\nweight = 2.0\n', d)
    changes = pool.reload()
    assert (changes.added, changes.changed, changes.removed) == (("d",), ("a", "b"), ("c",))
    assert pid_of(pool, "a") == before["a"]
    assert _pid(pool, "gpt") == before["b"]
    assert _pid(pool, "a") != before["a"]
    eventually(lambda: not is_running(before["c"]))
    with pytest.raises(ModelNotFound), pool.lease("c"):
        pass
    pool.load("d")
    pool.load("e")
    write(a, "[models.b]\nmodel_path = 5\n")
    with pytest.raises(InvalidCatalogue) as refused:
        pool.reload()
    assert "models.toml:" in refused.value.message
    assert resident(pool) == {"a", "b", "d", "e"}
    pool.remove("e")
    assert resident(pool) == {"a", "b", "d"}


def test_servers_that_were_kept_are_adopted_and_those_of_no_entry_ended(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    first = pools(catalogue(), on_host_exit="keep")
    kept, gone = first.load("a").pid, first.load("b").pid
    first.close()
    assert is_running(kept)
    models = catalogue()
    del models["models"]["b"]
    second = pools(models, on_host_exit="keep")
    assert pid_of(second, "a") == kept
    assert not is_running(gone)
    assert reserved_mib(second) == 104
    with second.lease("a") as server:
        assert server.pid == kept
    second.close(keep=False)
    assert not is_running(kept)


def test_pool_owns_its_name_and_can_be_started_again(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], llama_server: str, state_dir: Path
) -> None:
    pool = pools(catalogue())
    with pytest.raises(SlotOwned):
        pools(catalogue())
    with pytest.raises(SlotOwned):
        Orchestrator(llama_server=llama_server, state_dir=state_dir).start()
    server = pool.load("a").pid
    pool.close()
    assert not is_running(server)
    pool.start()
    assert _pid(pool, "a")


def test_model_of_another_server_is_leased_and_never_started(
    pools: Pools, catalogue: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    models = catalogue({"default": "elsewhere"})
    models["models"]["elsewhere"] = {
        "base_url": "http://127.0.0.1:9/v1",
        "api_key_file": str(key),
    }
    pool = pools(models)
    with pool.lease() as server:
        assert server == LeasedServer("http://127.0.0.1:9", 0, server.generation, "secret", "chat")
    with pytest.raises(InvalidRequest):
        pool.load("elsewhere")


def test_view_of_a_model_is_like_an_orchestrator(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue())
    view = pool["a"]
    assert view.plan().action == "load"
    loaded = view.load()
    shown = view.status().loaded
    assert shown is not None
    assert shown.pid == loaded.pid
    with view.lease() as server:
        assert server.pid == loaded.pid
    assert any("model loaded" in line for line in view.logs())
    assert view.history()[0].state is State.HEALTHY
    assert view.unload().status == "unloaded"
    assert view.status().state is State.IDLE


def test_preloads_are_loaded_in_order_as_far_as_they_fit(
    pools: Pools, catalogue: Callable[..., dict[str, Any]]
) -> None:
    pool = pools(catalogue({"preload": ["c", "a", "b"]}))
    eventually(lambda: resident(pool) == {"c", "a"})
    assert not pool.status().waiting
