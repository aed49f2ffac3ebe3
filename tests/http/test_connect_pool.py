"""`ModelPool.connect`: the facades of a pool's service, against a service on a real uvicorn."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator import (
    AsyncModelPool,
    AsyncRemoteModelPool,
    Cancelled,
    InvalidRequest,
    LoadOutcome,
    MalformedRequest,
    ModelNotFound,
    ModelPool,
    NameTaken,
    OrchestratorError,
    PoolStatus,
    RemoteModelPool,
    ServerStartFailed,
    State,
    Unreachable,
)
from orchestrator.http import create_app
from tests.kit.http import serving
from tests.kit.process.support import Fake, is_running, until
from tests.kit.shell.harness import asyncio_test

Served = tuple[AsyncModelPool, RemoteModelPool]


@pytest.fixture
def tables(tiny_model: str, other_model: str) -> dict[str, Any]:
    """Two models with room for one, and another server."""
    models: dict[str, Any] = {
        "chat": {
            "model_path": tiny_model,
            "memory": "100 MiB",
            "aliases": ["org/chat:tag"],
            "presets": {"hot": {"temperature": 2}},
        },
        "other": {"model_path": other_model, "memory": "100 MiB"},
        "elsewhere": {"base_url": "http://127.0.0.1:9/v1", "kind": "embedding"},
    }
    pool = {"memory": "150 MiB", "min_resident_s": 0, "default": "chat"}
    return {"pool": pool, "models": models}


@pytest.fixture
def served(state_dir: Path, tables: dict[str, Any]) -> Iterator[Served]:
    """A pool, and the remote facade of the same one."""
    pool = AsyncModelPool(tables, llama_server="embedded", state_dir=state_dir)
    with serving(create_app(pool=pool)) as client:
        yield pool, ModelPool.connect(str(client.base_url))


def ours(status: PoolStatus) -> tuple[Any, ...]:
    """Return what is said of our models: another server is watched, and may change at any time."""
    models = [one for one in status.models if one.name != "elsewhere"]
    return models, status.budget, status.waiting


def same_but_for_time(one: Any, other: Any) -> bool:
    """Compare two answers, whose clocks differ."""
    members = (one.as_dict(), other.as_dict())
    for found in members:
        found.pop("uptime_s", None)
        found.pop("last_used_at", None)
    return bool(members[0] == members[1])


def test_answers_are_those_of_the_pool_itself(served: Served) -> None:
    """Every method, by every kind of name."""
    pool, remote = served
    assert ours(remote.status()) == ours(pool.status())
    assert remote.plan("other").action == "load"
    outcome = remote.load("other")
    assert isinstance(outcome, LoadOutcome)
    assert (outcome.status, outcome.evicted) == ("loaded", [])
    assert is_running(outcome.pid)
    assert remote.load("other").status == "already_loaded"
    plan = remote.plan()
    assert (plan.action, plan.evict, plan.fits) == ("load", ["other"], True)
    assert remote.load("org/chat:tag:hot").evicted == ["other"]
    for name in ("chat", "chat:hot", "org/chat:tag"):
        assert same_but_for_time(remote.model_status(name), pool.model_status(name))
        assert same_but_for_time(remote.status(name), pool.status(name))
    view = remote["org/chat:tag"]
    assert view.name == "chat"
    assert same_but_for_time(view.status(), pool.slot_status("chat"))
    assert view.progress() == pool.facade_of("chat").progress()
    assert view.logs(3) == pool.facade_of("chat").logs(3)
    assert view.history() == pool.facade_of("chat").history()
    assert view.plan(force_reload=True).action == "reload"
    assert view.cancel() is remote.cancel("other") is False
    reloaded = view.load(force_reload=True)
    assert (reloaded.status, is_running(reloaded.pid)) == ("loaded", True)
    assert view.unload(cut=True).status == remote.unload().status == "unloaded"
    assert remote.model_status("chat").state is State.IDLE
    assert not is_running(reloaded.pid)


@asyncio_test
async def test_async_facade_has_the_same_answers(served: Served) -> None:
    pool, remote = served
    async with AsyncModelPool.connect(remote.url) as one:
        assert ours(one.status()) == ours(pool.status())
        outcome = await one.load("org/chat:tag")
        assert outcome.evicted == []
        view = one["chat"]
        assert same_but_for_time(view.status(), pool.slot_status("chat"))
        assert (await view.plan()).action == (await one.plan()).action == "none"
        assert (await view.load()).pid == (await one.load()).pid == outcome.pid
        async with view.lease() as server, one.lease("elsewhere") as other:
            assert (server.base_url, server.pid) == (f"{remote.url}/v1", outcome.pid)
            assert (other.base_url, other.pid, other.kind) == (server.base_url, 0, "embedding")
        assert await view.cancel() is await one.cancel("other") is False
        made = await one.add("third", model_path="gone.gguf", memory="1 MiB")
        assert made == pool.model_status("third")
        await one.remove("third")
        assert (await view.unload()).status == (await one.unload()).status == "unloaded"
        with pytest.raises(ModelNotFound):
            one["third"]


def test_a_lease_loads_the_model_and_is_the_service(served: Served) -> None:
    pool, remote = served
    with remote.lease("other") as server:
        status = pool.model_status("other")
        assert (status.state, status.pid, status.generation) == (
            State.HEALTHY,
            server.pid,
            server.generation,
        )
        assert server.base_url == f"{remote.url}/v1"
    with remote["other"].lease() as again, remote.lease() as default:
        assert again == server
        assert default.pid != server.pid
    assert pool.model_status("other").state is State.IDLE  # evicted: the lease is the service's


def test_an_alias_with_a_slash_is_a_name_for_every_method(served: Served) -> None:
    _, remote = served
    alias = "org/chat:tag"
    assert remote.plan(alias).action == "load"
    assert remote.load(alias).generation == 1
    assert remote[alias].status().state is State.HEALTHY
    remote.unload(alias)
    assert remote.status(alias).state is State.IDLE
    for unknown in ("org/none", "org%2Fchat:tag", "org/chat:tag/x"):
        with pytest.raises(ModelNotFound):
            remote.plan(unknown)


def test_models_come_and_go_at_run_time(
    served: Served, other_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path of a file that is here is made absolute."""
    pool, remote = served
    monkeypatch.chdir(Path(other_model).parent)
    made = remote.add("third", model_path=Path(Path(other_model).name), memory="1 MiB")
    assert made == pool.model_status("third")
    monkeypatch.chdir(tmp_path)
    assert remote.load("third").status == "loaded"
    remote.remove("third")
    assert "third" not in pool.catalogue.models


def test_a_catalogue_is_read_again_through_the_service(
    state_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    table = f'model_path = "{tiny_model}"\n'
    file.write_text(f"[models.one]\n{table}[models.two]\n{table}")
    pool = AsyncModelPool(file, llama_server="embedded", state_dir=state_dir)
    with serving(create_app(pool=pool)) as client:
        remote = ModelPool.connect(str(client.base_url))
        file.write_text(f"[models.two]\n{table}weight = 2\n[models.three]\n{table}")
        changes = remote.reload()
        assert (changes.added, changes.changed) == (("three",), ("two",))
        assert (changes.removed, changes.unchanged) == (("one",), ())
        file.write_text("[models.two]\nweight = 1")
        with pytest.raises(InvalidRequest, match="model_path is required"):
            remote.reload()


@pytest.mark.parametrize(
    ("call", "kind", "field"),
    [
        (lambda pool: pool.load("gone"), ModelNotFound, "model"),
        (lambda pool: pool.load("org/gone"), ModelNotFound, "model"),
        (lambda pool: pool["gone"], ModelNotFound, "model"),
        (lambda pool: pool.status("gone"), ModelNotFound, "model"),
        (lambda pool: pool.lease("gone").__enter__(), ModelNotFound, "model"),
        (lambda pool: pool.load("elsewhere"), InvalidRequest, "model"),
        (lambda pool: pool.load("chat", force_relaod=True), MalformedRequest, "force_relaod"),
        (lambda pool: pool.add("chat", model_path="a.gguf"), NameTaken, "name"),
        (lambda pool: pool.add("new", modelpath="a.gguf"), MalformedRequest, "modelpath"),
        (lambda pool: pool.remove("gone"), ModelNotFound, "model"),
    ],
)
def test_errors_are_those_of_the_pool_itself(
    served: Served, tables: dict[str, Any], state_dir: Path, call: Any, kind: type, field: str
) -> None:
    """The same class and field, and the same words."""
    _, remote = served
    with pytest.raises(OrchestratorError) as far:
        call(remote)
    here = ModelPool(tables, slot="here", llama_server="embedded", state_dir=state_dir)
    with here, pytest.raises(OrchestratorError) as near:
        call(here)
    assert type(far.value) is type(near.value) is kind
    assert far.value.field == near.value.field == field
    assert far.value.message == near.value.message


def test_a_failed_start_arrives_with_its_reason(state_dir: Path, tiny_model: str) -> None:
    bad = {"model_path": tiny_model, "llama_extra_args": ["--seed", "x"], "memory": "1 MiB"}
    pool = AsyncModelPool({"models": {"bad": bad}}, llama_server="embedded", state_dir=state_dir)
    with serving(create_app(pool=pool)) as client:
        remote = ModelPool.connect(str(client.base_url))
        with pytest.raises(ServerStartFailed) as found:
            remote.load("bad")
        assert found.value.problem.log_tail
        last_error = remote.model_status("bad").last_error
        assert last_error is not None
        assert last_error.category == "server_start_failed"


def test_a_caller_that_goes_away_withdraws_the_load(
    tmp_path: Path, state_dir: Path, tiny_model: str
) -> None:
    """Its connection is closed, and nobody else wants the model."""
    fake, one = Fake(tmp_path / "fake"), {"one": {"model_path": tiny_model, "memory": "1 MiB"}}
    fake.behave(bind_after_s=60)
    server: dict[str, Any] = {"llama_server": fake.path, "server_env": fake.env}
    pool = AsyncModelPool({"models": one}, state_dir=state_dir, **server)
    with serving(create_app(pool=pool)) as client:
        remote = AsyncModelPool.connect(str(client.base_url))

        def until_it_is(state: State) -> None:
            until(lambda: remote.model_status("one").state is state, f"it is {state}")

        async def give_up() -> None:
            loading = asyncio.create_task(remote.load("one"))
            await asyncio.to_thread(until_it_is, State.WAITING_HEALTH)
            loading.cancel()
            await asyncio.wait([loading])
            assert loading.cancelled()

        asyncio.run(give_up())
        until_it_is(State.IDLE)
        generation = asyncio.run(remote.submit("one"))
        until_it_is(State.WAITING_HEALTH)
        assert remote.model_status("one").generation == generation == 2
        assert asyncio.run(remote.cancel("one")) is True
        until_it_is(State.IDLE)
        loading = ThreadPoolExecutor(1).submit(client_of(remote).load, "one", load_request_id="x")
        until_it_is(State.WAITING_HEALTH)
        assert asyncio.run(remote.cancel("one", "y")) is False
        assert asyncio.run(remote.cancel("one", "x")) is True
        assert isinstance(loading.exception(20), Cancelled)
    assert not fake.running()


def client_of(pool: AsyncRemoteModelPool) -> RemoteModelPool:
    return ModelPool.connect(pool.url)


def test_events_of_all_models_are_one_sequence(served: Served) -> None:
    """Each has its model, and a view has only its own."""
    _, remote = served
    events = remote.events(after=0)
    of_chat = remote["chat"].events(after=0)
    thread = threading.Thread(target=lambda: (remote.load("other"), remote.load("chat")))
    thread.start()
    seen = list(
        itertools.takewhile(lambda one: (one.model, one.dest) != ("chat", "Healthy"), events)
    )
    thread.join()
    assert {one.model for one in seen} == {"chat", "other"}
    ids = [one.id for one in seen]
    assert ids == sorted(set(ids))
    assert next(of_chat).model == "chat"
    events.close()
    of_chat.close()
    logs = remote.follow_logs("chat", 2)
    assert next(logs)
    view_logs = remote["chat"].follow_logs(2)
    assert next(view_logs)


@asyncio_test
async def test_async_events_and_logs_stream(served: Served) -> None:
    _, remote = served
    async with AsyncModelPool.connect(remote.url) as one:
        events = one.events(after=0, progress=True)
        await one.load("chat")
        assert (await anext(events)).model == "chat"
        assert (await anext(one["chat"].events(after=0))).model == "chat"
        assert await anext(one.follow_logs("org/chat:tag", 1))
        assert await anext(one["chat"].follow_logs(1))
        await events.aclose()


def test_nothing_is_sent_before_the_first_call() -> None:
    with ModelPool.connect("http://127.0.0.1:9") as remote, pytest.raises(Unreachable):
        remote.status()
    with pytest.raises(InvalidRequest) as wrong:
        ModelPool.connect("ftp://x")
    assert wrong.value.field == "url"
