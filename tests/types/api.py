"""Typical uses of the public API, and the types that checkers infer for them. Never run.

`make lint` checks this file, so a changed signature breaks a line here. It uses public names only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Literal, assert_type

from fastapi import APIRouter, FastAPI

import orchestrator.http
from orchestrator import (
    AsyncOrchestrator,
    Busy,
    Changes,
    Event,
    LeasedServer,
    LoadOutcome,
    LoadProgress,
    LoadRequest,
    ModelPool,
    ModelStatus,
    Options,
    Orchestrator,
    OrchestratorError,
    PastLoad,
    Plan,
    PoolStatus,
    PrefetchOutcome,
    Problem,
    ReloadReason,
    RemoteModelPool,
    RemoteModelView,
    RestartPolicy,
    State,
    Status,
    Superseded,
    UnloadOutcome,
    Variant,
    Variants,
)


def requests() -> LoadRequest:
    LoadRequest(
        model_path="owner/name",
        gguf_variant="Q4_K_M",
        llama_extra_args=("--top-k", "20"),
        max_seq_length=4096,
        on_busy="queue",
        idle_ttl_s=60,
        deadline_s=None,
    )
    LoadRequest(model_path="m.gguf", on_busy="wait")  # type: ignore[arg-type]
    LoadRequest(model_path="m.gguf", max_seq_len=1)  # type: ignore[call-arg]
    return assert_type(LoadRequest.from_dict({"model_path": "m.gguf"}), LoadRequest)


def constructors() -> None:
    Orchestrator()
    AsyncOrchestrator(
        llama_server=Path("llama-server"),
        slot="main",
        state_dir="/state",
        restart=RestartPolicy(),
        drain_policy="cut",
        models_dir=[Path("/models"), "/more"],
    )
    Orchestrator(restart="always")  # type: ignore[arg-type]
    Orchestrator(drain_policy="never")  # type: ignore[arg-type]
    Orchestrator("llama-server")  # type: ignore[call-arg]


def synchronous(request: LoadRequest) -> None:
    with Orchestrator(llama_server="auto") as orch:
        assert_type(orch, Orchestrator)
        outcome = assert_type(orch.load(request), LoadOutcome)
        assert_type(orch.load("m.gguf", max_seq_length=512), LoadOutcome)
        assert_type(outcome.status, Literal["loaded", "already_loaded"])
        assert_type(outcome.base_url, str)
        assert_type(outcome.context_length, int | None)
        assert_type(outcome.reload_reasons, list[ReloadReason])
        with orch.lease() as server:
            assert_type(server, LeasedServer)
            assert_type(server.api_key, str | None)
        shared(orch)
        assert_type(orch.prefetch(request), PrefetchOutcome)
        assert_type(orch.variants(request), Variants)
        assert_type(orch.variants(request).variants, list[Variant])
        assert_type(orch.cancel(generation=orch.submit(request)), bool)
        assert_type(orch.events(after=0), Iterator[Event])
        assert_type(orch.follow_logs(), Iterator[str])
        assert_type(orch.settled(1, timeout_s=2.0), LoadOutcome | Problem | None)
        assert_type(orch.unload(), UnloadOutcome)


async def asynchronous(request: LoadRequest) -> None:
    async with AsyncOrchestrator() as orch:
        assert_type(orch, AsyncOrchestrator)
        assert_type(await orch.load(request), LoadOutcome)
        async with orch.lease() as server:
            assert_type(server, LeasedServer)
        shared(orch)
        assert_type(await orch.prefetch(request), PrefetchOutcome)
        assert_type(await orch.variants(request), Variants)
        assert_type(await orch.cancel("id"), bool)
        assert_type(await orch.settled(await orch.submit(request)), LoadOutcome | Problem | None)
        assert_type(orch.events(), AsyncGenerator[Event, None])
        async for event in orch.events(after=1):
            assert_type(event.id, int)
        async for line in orch.follow_logs():
            assert_type(line, str)
        assert_type(await orch.unload("m.gguf"), UnloadOutcome)


def remote_pools(pool: ModelPool) -> None:
    remote = assert_type(ModelPool.connect("http://127.0.0.1:8642", "key"), RemoteModelPool)
    assert_type(pool.status(), PoolStatus)
    assert_type(remote.status(), PoolStatus)
    assert_type(pool.status("chat"), Status)
    assert_type(remote.status("chat"), Status)
    assert_type(remote.load("chat", force_reload=True), LoadOutcome)
    remote.load("chat", max_seq_length=1)  # type: ignore[call-arg]
    assert_type(remote["chat"], RemoteModelView)
    assert_type(remote["chat"].unload(cut=True), UnloadOutcome)
    assert_type(remote.add("new", model_path="m.gguf"), ModelStatus)
    assert_type(remote.reload(), Changes)
    with remote.lease("chat") as server:
        assert_type(server, LeasedServer)


def shared(orch: Orchestrator | AsyncOrchestrator) -> None:
    status = assert_type(orch.status(), Status)
    assert_type(status.state, State)
    assert_type(status.loaded, LoadOutcome | None)
    assert_type(status.last_error, Problem | None)
    assert_type(orch.progress(), LoadProgress)
    assert_type(orch.progress().fraction, float | None)
    assert_type(orch.plan("m.gguf"), Plan)
    assert_type(orch.plan("m.gguf").reload_reasons, list[ReloadReason])
    assert_type(orch.logs(), tuple[str, ...])
    assert_type(orch.outcome(1), LoadOutcome | Problem | None)
    assert_type(orch.history(), list[PastLoad])
    assert_type(orch.options(), Options)


def errors(orch: Orchestrator) -> str:
    try:
        orch.load("m.gguf")
    except Busy as error:
        return assert_type(error.message, str)
    except Superseded as error:
        return assert_type(error.problem.category, str)
    except OrchestratorError as error:
        assert_type(error.problem, Problem)
    return ""


def web(orch: AsyncOrchestrator) -> None:
    app = assert_type(orchestrator.http.create_app(orch, api_keys=["k"]), FastAPI)
    app.include_router(assert_type(orchestrator.http.router(orch), APIRouter))
