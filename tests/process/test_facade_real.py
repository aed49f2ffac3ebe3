"""The orchestrator over the real llama-server that LLAMA_SERVER_PATH names, with tiny models."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import pytest

from orchestrator import AsyncOrchestrator, LoadOutcome, Orchestrator, State
from orchestrator.demo import tiny_model
from orchestrator.errors import Cancelled, InvalidRequest, ServerStartFailed, Superseded
from orchestrator.models.source import ModelSource
from orchestrator.server.warden import Warden
from tests.kit.models import split_gguf
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Background,
    StartHost,
    Watch,
    is_running,
    key_of,
    kill,
    stream,
    transitions,
    until,
    until_queued,
    until_state,
    watched,
)

pytestmark = pytest.mark.external

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model large enough for its load to be interrupted."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    return str(tiny_model.write_tiny_model(path, padding_bytes=256 << 20))


def post(server: LoadOutcome, path: str, body: object) -> Any:
    parts = urlsplit(server.base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        headers = {"Content-Type": "application/json", **key_of(server.pid)}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200
        return json.loads(response.read())
    finally:
        connection.close()


def test_a_model_is_loaded_used_and_unloaded(real: Orchestrator, tiny_model: str) -> None:
    outcome = real.load(tiny_model, max_seq_length=512, n_parallel=1)
    assert (outcome.status, outcome.context_length) == ("loaded", 512)
    answer = post(outcome, "/v1/chat/completions", CHAT)
    assert len(answer["choices"][0]["message"]["content"]) == 5
    assert real.unload().status == "unloaded"
    assert not is_running(outcome.pid)
    states = [event.data["dest"] for event in transitions(real)]
    assert states == [
        *("Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"),
        *("Killing", "Idle"),
    ]


def test_the_same_load_is_answered_in_milliseconds(real: Orchestrator, tiny_model: str) -> None:
    """By the same process."""
    first = real.load(tiny_model)
    took = []
    for _ in range(20):
        begun = time.monotonic()
        again = real.load(tiny_model)
        took.append(time.monotonic() - begun)
        assert (again.status, again.pid, again.generation) == (
            "already_loaded",
            first.pid,
            first.generation,
        )
    assert sorted(took)[len(took) // 2] < 0.005, took


def test_a_swap_reports_its_reasons_and_ends_the_old_server_first(
    real: Orchestrator, tiny_model: str, other_model: str
) -> None:
    """For another model, and for another context."""
    first = real.load(tiny_model)
    second = real.load(other_model)
    assert not is_running(first.pid)
    assert [reason.field for reason in second.reload_reasons] == ["model_path"]
    third = real.load(other_model, max_seq_length=256)
    assert not is_running(second.pid)
    assert [reason.field for reason in third.reload_reasons] == ["max_seq_length"]
    assert third.context_length == 256


def test_two_rapid_applies_never_run_two_servers(
    real: Orchestrator, tiny_model: str, other_model: str, state_dir: Path, tmp_path: Path
) -> None:
    """A double click once left an orphan behind that used up the memory."""
    with watched(state_dir, tmp_path / "watched.json") as report:
        for _ in range(10):
            calls = [
                Background(real.load, tiny_model, force_reload=True),
                Background(real.load, other_model, force_reload=True),
            ]
            errors = [call.error() for call in calls]
            assert sum(error is None for error in errors) >= 1, errors
            assert all(isinstance(error, Superseded | None) for error in errors), errors
            [alive] = servers_of(state_dir)
            loaded = real.status().loaded
            assert loaded is not None
            assert loaded.pid == alive
        real.unload()
        seen = report()
    assert seen["pairs"] == []
    assert seen["left"] == []
    assert len(seen["seen"]) >= 10


def test_a_cancel_in_every_state_leaves_nothing(
    real: Orchestrator, tiny_model: str, slow_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killing, Downloading, Spawning and WaitingHealth; it has no effect in Healthy."""
    gates = {state: threading.Event() for state in (State.DOWNLOADING, State.SPAWNING)}
    fetch, spawn = ModelSource.fetch, Warden.spawn

    def gated_fetch(*args: Any) -> Any:
        gates[State.DOWNLOADING].wait(30)
        return fetch(*args)

    def gated_spawn(*args: Any) -> None:
        gates[State.SPAWNING].wait(30)
        spawn(*args)

    monkeypatch.setattr(ModelSource, "fetch", gated_fetch)
    monkeypatch.setattr(Warden, "spawn", gated_spawn)
    real.start()
    for state in (State.DOWNLOADING, State.SPAWNING, State.WAITING_HEALTH):
        loading = Background(real.load, slow_model, load_request_id="x")
        until_state(real, state)
        cancelling = Background(real.cancel, "x")
        if state is State.SPAWNING:
            until_queued(real)
        elif state is State.DOWNLOADING:
            until(lambda: real.status().last_error is not None, "the cancel")
        if gate := gates.get(state):
            gate.set()
        assert cancelling.result() is True
        assert isinstance(loading.error(), Cancelled)
        assert real.status().state is State.IDLE
    pid = real.load(tiny_model, load_request_id="y").pid
    assert real.cancel("y") is False
    with real.lease():  # keeps the old server, so that the next load stays in Killing
        loading = Background(real.load, slow_model, load_request_id="z")
        until_state(real, State.KILLING)
        assert real.cancel("z") is True
        assert isinstance(loading.error(), Cancelled)
        assert is_running(pid)
    until_state(real, State.IDLE)
    assert not is_running(pid)


def test_an_unload_during_a_load_cancels_it(real: Orchestrator, slow_model: str) -> None:
    """It does not wait until the server is ready."""
    loading = Background(real.load, slow_model)
    until_state(real, State.WAITING_HEALTH)
    begun = time.monotonic()
    assert real.unload().status == "unloaded"
    assert time.monotonic() - begun < 5
    assert isinstance(loading.error(), Cancelled)
    assert real.status().state is State.IDLE


def test_an_unload_with_an_active_stream_does_not_wait_for_its_end(
    real: Orchestrator, tiny_model: str
) -> None:
    """The real server then ignores the first SIGTERM for 20 s and more."""
    outcome = real.load(tiny_model, max_seq_length=100_000)
    with stream(outcome):
        watch, begun = Watch(outcome.pid), time.monotonic()
        real.unload()
        assert watch.seconds_to_exit(begun) < 3


def test_a_crash_is_noticed_and_the_model_loads_again(real: Orchestrator, tiny_model: str) -> None:
    first = real.load(tiny_model)
    begun = time.monotonic()
    kill(first.pid)
    until(lambda: real.status().state is not State.HEALTHY, "the exit")
    assert time.monotonic() - begun < 1
    until_state(real, State.IDLE)
    status = real.status()
    assert status.last_exit is not None
    assert status.last_exit.returncode == -signal.SIGKILL
    second = real.load(tiny_model)
    assert (second.status, second.pid != first.pid) == ("loaded", True)


def test_start_that_fails_reports_the_servers_words(real: Orchestrator, tiny_model: str) -> None:
    """And the slot is free afterwards."""
    with pytest.raises(ServerStartFailed, match="--seed") as failed:
        real.load(tiny_model, llama_extra_args=["--seed", "bogus"])
    assert any("--seed" in line for line in failed.value.log_tail)
    assert real.load(tiny_model, llama_extra_args=[]).status == "loaded"


@pytest.mark.parametrize(
    "fields",
    [
        {"llama_extra_args": ["--bogus"]},
        {"llama_extra_args": ["--top-k"]},
        {"llama_extra_args": ["-fa", "maybe"]},
        {"llama_extra_args": ["--chat-template", "{{ x"]},
        {"chat_template_override": "{% if x %}"},
    ],
    ids=str,
)
def test_running_model_survives_a_setting_that_no_server_would_accept(
    real: Orchestrator, tiny_model: str, fields: dict[str, Any]
) -> None:
    """B71: the new server objected when the old one was gone."""
    first = real.load(tiny_model, llama_extra_args=["-fa", "1"])
    for call in (real.plan, real.load):
        with pytest.raises(InvalidRequest) as refused:
            call(tiny_model, **fields)
        assert refused.value.field == next(iter(fields))
    loaded = real.status().loaded
    assert loaded is not None
    assert loaded.pid == first.pid
    assert real.load(tiny_model).status == "already_loaded"


def test_an_address_in_the_models_metadata_is_not_believed(
    real: Orchestrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server prints the metadata, and a line of it may look like its own."""
    add_metadata = tiny_model._add_metadata
    claim = "server is listening on http://127.0.0.1:9"

    def boasting(writer: gguf.GGUFWriter, *args: Any) -> None:
        add_metadata(writer, *args)
        writer.add_description(claim)

    monkeypatch.setattr(tiny_model, "_add_metadata", boasting)
    path = tiny_model.write_tiny_model(tmp_path / "boasting.gguf")
    outcome = real.load(str(path), llama_extra_args=["-v"])
    assert any(claim[:30] in line for line in real.logs(2000))
    assert urlsplit(outcome.base_url).port != 9
    assert len(post(outcome, "/completion", {"prompt": "a", "n_predict": 1})["content"]) == 1


def test_a_split_model_behind_links_loads(real: Orchestrator, tmp_path: Path) -> None:
    """As in a Hub cache, where names are links to blobs; llama.cpp finds the parts by name."""
    whole = tmp_path / "whole.gguf"
    tiny_model.write_tiny_model(whole)
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for number, part in enumerate(split_gguf(whole, tmp_path / "m")):
        shutil.move(part, blobs / f"{number}")
        (snapshot / part.name).symlink_to(blobs / f"{number}")
    assert len(list(snapshot.iterdir())) == 2
    assert real.load(str(snapshot)).status == "loaded"


def test_the_server_does_not_outlive_a_killed_backend(host: StartHost, llama_server: str) -> None:
    backend = host('send(pid=orch.load(a["model"]).pid)\nsleep_forever()', server=llama_server)
    server = Watch(backend.receive()["pid"])
    assert server.seconds_to_exit(backend.die()) < 3


def test_a_cancelled_await_withdraws_only_its_caller(
    llama_server: str, state_dir: Path, slow_model: str
) -> None:
    """The load goes on for the callers that joined it."""

    async def run() -> None:
        async with AsyncOrchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
            patient = asyncio.create_task(orch.load(slow_model))
            impatient = asyncio.create_task(orch.load(slow_model))
            async for event in orch.events(after=0):
                if event.data["dest"] == "WaitingHealth":
                    break
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            outcome = await patient
            assert outcome.status == "loaded"
            assert is_running(outcome.pid)
            await orch.unload()
            assert not is_running(outcome.pid)

    asyncio.run(run())
