"""Servers on Windows: what a slot promises, with llama.cpp's Windows build and with a fake."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator import ModelPool, State
from orchestrator.errors import Cancelled, OrchestratorError, SlotOwned
from orchestrator.server import process_table
from tests.windows.conftest import Make, servers, until

OWNER = """
import sys
from orchestrator import Orchestrator
model, state, exit = sys.argv[1:4]
orch = Orchestrator(llama_server="embedded", state_dir=state, on_host_exit=exit, keep_s=60.0)
print(orch.load(model).pid, flush=True)
sys.stdin.readline()
orch.close()
"""
Start = Callable[..., subprocess.Popen[str]]


def pid_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def keeper_of(pid: int) -> int:
    return psutil.Process(pid).ppid()


def test_a_server_is_loaded_answers_and_is_unloaded(make: Make, models: list[str]) -> None:
    orch = make()
    loaded = orch.load(models[0])
    assert loaded.status == "loaded"
    assert orch.status().state is State.HEALTHY
    assert servers() == {loaded.pid}
    assert orch.load(models[0]).status == "already_loaded"
    orch.unload()
    assert servers() == set()


def test_another_model_takes_its_place(
    make: Make, models: list[str], most_servers: Callable[[], int]
) -> None:
    orch = make()
    pids = [orch.load(model).pid for model in models]
    assert len(set(pids)) == 3
    assert servers() == {pids[-1]}
    orch.close()
    assert most_servers() == 1


def test_rapid_applies_never_make_two_servers(
    make: Make, models: list[str], most_servers: Callable[[], int]
) -> None:
    orch, failures = make(), list[OrchestratorError]()

    def apply(model: str) -> None:
        try:
            orch.load(model)
        except OrchestratorError as error:
            failures.append(error)

    clicks = [threading.Thread(target=apply, args=(model,)) for model in models * 3]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert {error.category for error in failures} <= {"superseded", "busy"}
    assert len(failures) < len(clicks)
    assert orch.status().state is State.HEALTHY
    assert len(servers()) == 1
    orch.close()
    assert most_servers() == 1


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5])
def test_an_unload_in_any_phase_leaves_nothing(
    make: Make, models: list[str], after_s: float
) -> None:
    orch = make()
    orch.start()
    ended: list[object] = []

    def load() -> None:
        try:
            ended.append(orch.load(models[0]))
        except Cancelled as error:
            ended.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    time.sleep(after_s)  # where it gets to by then is not the point
    orch.unload()
    loading.join(60.0)
    assert len(ended) == 1
    assert orch.status().state is State.IDLE
    assert servers() == set()


def test_a_server_that_is_never_ready_is_ended_by_a_cancel(
    make: Make, fake: str, models: list[str]
) -> None:
    orch = make(llama_server=fake, server_env={"FAKE": "hang"})
    ended: list[OrchestratorError] = []

    def load() -> None:
        with pytest.raises(Cancelled) as caught:
            orch.load(models[0], load_request_id="x")
        ended.append(caught.value)

    loading = threading.Thread(target=load)
    loading.start()
    until(lambda: orch.status().state is State.WAITING_HEALTH, "the wait for a server")
    begun = time.monotonic()
    assert orch.cancel("x") is True
    loading.join(30.0)
    assert len(ended) == 1
    assert time.monotonic() - begun < 20.0
    assert servers() == set()


def test_what_a_server_has_started_ends_with_it(make: Make, fake: str, models: list[str]) -> None:
    """Behind a wrapper, and detached from its console."""
    orch = make(llama_server=fake, server_env={"FAKE": "children"})
    pid = orch.load(models[0]).pid
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(tree) == 4  # the wrapper, the server and two of its own
    orch.unload()
    assert not any(process.is_running() for process in tree)


def test_a_server_that_crashes_is_reported(make: Make, fake: str, models: list[str]) -> None:
    orch = make(llama_server=fake, server_env={"FAKE": "crash"})
    with pytest.raises(OrchestratorError) as caught:
        orch.load(models[0])
    assert caught.value.category == "server_start_failed"
    assert "exit status 7" in caught.value.message
    assert orch.status().state is State.IDLE


def test_a_server_that_is_killed_is_not_loaded_any_more(make: Make, models: list[str]) -> None:
    orch = make()
    pid = orch.load(models[0]).pid
    psutil.Process(pid).kill()
    until(lambda: orch.status().state is State.IDLE, "the exit")
    assert orch.load(models[0]).pid != pid


def test_a_killed_keeper_takes_its_server_along(make: Make, models: list[str]) -> None:
    orch = make()
    pid = orch.load(models[0]).pid
    psutil.Process(keeper_of(pid)).kill()
    until(lambda: servers() == set(), "the end of the server")
    until(lambda: orch.status().state is State.IDLE, "the exit")
    assert orch.load(models[0]).pid != pid


def test_a_killed_host_leaves_nothing(host: Start, models: list[str], tmp_path: Path) -> None:
    owner = host(OWNER, models[0], str(tmp_path / "state"), "stop")
    pid = pid_of(owner)
    keeper = keeper_of(pid)
    owner.kill()
    until(lambda: not psutil.pid_exists(pid), "the end of the server")
    until(lambda: not psutil.pid_exists(keeper), "the end of the keeper")


@pytest.mark.parametrize("is_killed", [False, True], ids=["ends", "is killed"])
def test_the_next_owner_adopts_what_was_kept(
    host: Start, make: Make, models: list[str], tmp_path: Path, is_killed: bool
) -> None:
    owner = host(OWNER, models[0], str(tmp_path / "state"), "keep")
    pid = pid_of(owner)
    if is_killed:
        owner.kill()
    else:
        owner.communicate("\n")
    owner.wait()
    orch = make(on_host_exit="stop")
    orch.start()
    assert orch.load(models[0]).status == "already_loaded"
    assert servers() == {pid}
    orch.unload()
    assert servers() == set()


def test_a_slot_has_one_owner(host: Start, make: Make, models: list[str], tmp_path: Path) -> None:
    owner = host(OWNER, models[0], str(tmp_path / "state"), "stop")
    pid_of(owner)
    with pytest.raises(SlotOwned) as caught:
        make().start()
    assert str(owner.pid) in caught.value.message
    owner.communicate("\n")
    make().start()


def test_a_pool_makes_room_within_its_budget(
    models: list[str], tmp_path: Path, most_servers: Callable[[], int]
) -> None:
    entries = {
        name: {"model_path": path, "memory": "100 MiB"}
        for name, path in zip("ab", models[:2], strict=True)
    }
    catalogue = {"pool": {"memory": "150 MiB", "min_resident_s": 0}, "models": entries}
    with ModelPool(catalogue, llama_server="embedded", state_dir=tmp_path / "state") as pool:
        for name in ("a", "b", "a"):
            with pool.lease(name) as server:
                assert server.model == name
                assert servers() == {server.pid}
    assert servers() == set()
    assert most_servers() == 1


def test_a_long_state_folder(make: Make, models: list[str], tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["über lang " * 4 + "x"] * 3)
    folder.mkdir(parents=True)
    orch = make(state_dir=folder)
    assert orch.load(models[2]).status == "loaded"


def test_an_identity_is_that_of_one_process() -> None:
    me = process_table.identify(psutil.Process().pid)
    assert me is not None
    assert process_table.is_alive(me)
    assert not process_table.is_alive(replace(me, start_ticks=me.start_ticks + 1))
