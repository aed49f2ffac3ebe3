"""Unusable input is refused with its field, and nothing else changes.

Where a model is Healthy, the same process serves it afterwards, and none has been started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator, State
from orchestrator.errors import (
    InvalidModel,
    InvalidRequest,
    MalformedRequest,
    ModelNotFound,
    OrchestratorError,
    RefusedArgument,
    ServerUnavailable,
    StateDirError,
)
from orchestrator.models.source import ModelSource
from orchestrator.server import process_table
from orchestrator.server.binaries import find_server
from tests.kit.process.support import Fake, Make, transitions
from tests.kit.sentences import assert_sentence


@pytest.fixture
def running(orch: Orchestrator, fake: Fake, model_a: str) -> Iterator[Orchestrator]:
    """An orchestrator whose model is Healthy, before the test and after it."""
    pid = orch.load(model_a).pid
    before = (orch.status().state, orch.status().generation, len(transitions(orch)))
    yield orch
    assert (orch.status().state, orch.status().generation, len(transitions(orch))) == before
    assert before[0] is State.HEALTHY
    assert orch.load(model_a).pid == pid
    assert len(fake.entries("start")) == 1


def refusal(orch: Orchestrator, model: str, **fields: Any) -> OrchestratorError:
    """Return the error of a load, which `plan` raises too, with a field and in one line."""
    with pytest.raises(OrchestratorError) as refused:
        orch.load(model, **fields)
    with pytest.raises(type(refused.value)) as planned:
        orch.plan(model, **fields)
    assert planned.value.message == refused.value.message
    assert planned.value.field == refused.value.field is not None
    assert refused.value.field in refused.value.message or model in refused.value.message
    assert "\n" not in refused.value.message
    return refused.value


# Models


def absent(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def no_gguf(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "error", "key"),
    [
        (absent, ModelNotFound, "unusable_model.absent"),
        (empty, InvalidModel, "unusable_model.empty"),
        (truncated, InvalidModel, "unusable_model.truncated"),
        (no_gguf, InvalidModel, "unusable_model.no_gguf"),
        (folder, ModelNotFound, "unusable_model.folder"),
        (fifo, InvalidModel, "unusable_model.fifo"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unusable_model_is_refused_before_anything_is_stopped(
    running: Orchestrator,
    model_b: str,
    damage: Callable[[Path], None],
    error: type[OrchestratorError],
    key: str,
) -> None:
    damage(Path(model_b))
    refused = refusal(running, model_b)
    assert isinstance(refused, error)
    assert refused.field == "model_path"
    assert_sentence(key, refused.message, path=model_b)


def test_a_model_damaged_during_the_load_is_refused(
    orch: Orchestrator, fake: Fake, model_a: str, model_b: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be damaged after it was checked; no server is started then."""
    fetch = ModelSource.fetch
    orch.load(model_a)

    def late(*args: Any) -> Any:
        truncated(Path(model_b))
        return fetch(*args)

    monkeypatch.setattr(ModelSource, "fetch", late)
    with pytest.raises(InvalidModel):
        orch.load(model_b)
    assert orch.status().state is State.IDLE
    assert len(fake.entries("start")) == 1
    monkeypatch.undo()
    assert orch.load(model_a).status == "loaded"


# Settings


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_seq_length": -1}, InvalidRequest),
        ({"max_seq_length": 1 << 62}, InvalidRequest),
        ({"max_seq_length": 10**100}, InvalidRequest),
        ({"max_seq_length": 4096.0}, MalformedRequest),
        ({"max_seq_length": True}, MalformedRequest),
        ({"max_seq_length": "4096"}, MalformedRequest),
        ({"n_parallel": 0}, InvalidRequest),
        ({"n_parallel": -1}, InvalidRequest),
        ({"n_parallel": 65}, InvalidRequest),
        ({"stall_timeout_s": 0}, InvalidRequest),
        ({"stall_timeout_s": -1}, InvalidRequest),
        ({"stall_timeout_s": float("nan")}, InvalidRequest),
        ({"stall_timeout_s": float("inf")}, InvalidRequest),
        ({"deadline_s": 10**400}, InvalidRequest),
        ({"deadline_s": -0.5}, InvalidRequest),
        ({"cache_type_kv": "q3_k"}, InvalidRequest),
        ({"on_busy": "panic"}, InvalidRequest),
        ({"load_request_id": "-"}, InvalidRequest),
        ({"llama_extra_args": ["--port", "1"]}, RefusedArgument),
        ({"llama_extra_args": "-c 1"}, MalformedRequest),
        ({"llama_extra_args": ["a\0b"]}, InvalidRequest),
        ({"chat_template_override": "\ud800"}, InvalidRequest),
        ({"mmproj_path": "missing.gguf"}, ModelNotFound),
        ({"no_such_field": 1}, MalformedRequest),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_an_invalid_setting_is_refused(
    running: Orchestrator, model_b: str, fields: dict[str, Any], error: type[OrchestratorError]
) -> None:
    """Nothing is coerced, and unknown fields are not ignored."""
    refused = refusal(running, model_b, **fields)
    assert isinstance(refused, error)
    assert refused.field == next(iter(fields))


@pytest.mark.parametrize("path", ["", "   ", "\0", "a\nb"])
def test_an_invalid_model_path_is_refused(running: Orchestrator, path: str) -> None:
    """llama-server with an empty model is a router, and answers 200."""
    with pytest.raises(InvalidRequest) as refused:
        running.load(path)
    assert refused.value.field == "model_path"


@pytest.mark.parametrize("field", ["kill_grace_s", "drain_timeout_s"])
@pytest.mark.parametrize(
    "value", [-1, -0.001, float("nan"), float("inf"), 10**400, 1e300, "5", None, True]
)
def test_an_orchestrator_with_invalid_times_is_refused(field: str, value: object) -> None:
    """A wait that is too long for the clock would end the thread that waits."""
    settings: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest) as refused:
        Orchestrator(**settings)
    assert refused.value.field == field
    assert "2592000 seconds" in refused.value.message


@pytest.mark.parametrize(
    "variables",
    [
        {"A": 1},
        {1: "A"},
        {"": "x"},
        {"A=B": "x"},
        {"A": "nul\0"},
        {"LLAMA_ARG_PORT": "1"},
        {"AIP_HTTP_PORT": "1"},
        {"HF_TOKEN": "hf_secret"},
    ],
    ids=str,
)
def test_an_invalid_server_environment_is_refused(
    make: Make, fake: Fake, model_a: str, variables: dict[Any, Any]
) -> None:
    """The value is not in the message, and the slot is free afterwards."""
    orch = make(server_env={**fake.env, **variables})
    with pytest.raises(InvalidRequest) as refused:
        orch.load(model_a)
    [name] = variables
    assert refused.value.message.startswith(f"server_env: {name!r}: ")
    assert refused.value.field == "server_env"
    assert "hf_secret" not in str(refused.value)
    assert make().load(model_a).status == "loaded"


# Binaries


@pytest.fixture
def binary(fake: Fake, tmp_path: Path) -> Path:
    """A copy of the fake server that may be damaged."""
    return Path(shutil.copy(fake.path, tmp_path / "llama-server"))


def not_executable(path: Path) -> None:
    path.chmod(0o644)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\x01\x02" * 1000)


def no_interpreter(path: Path) -> None:
    path.write_text("#!/no/such/interpreter\n")


def bare_shebang(path: Path) -> None:
    path.write_text("#!\n")


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (absent, "binary.absent"),
        (folder, "binary.folder"),
        (fifo, "binary.fifo"),
        (not_executable, "binary.not_executable"),
        (dangling, "binary.dangling"),
        (loop, "binary.loop"),
        (empty, "binary.empty"),
        (garbage, "binary.garbage"),
        (no_interpreter, "binary.no_interpreter"),
        (bare_shebang, "binary.bare_shebang"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unusable_binary_is_refused_before_anything_is_stopped(
    make: Make,
    fake: Fake,
    model_a: str,
    model_b: str,
    binary: Path,
    damage: Callable[[Path], None],
    key: str,
) -> None:
    """Such as by a failed update."""
    orch = make(llama_server=binary)
    pid = orch.load(model_a).pid
    damage(binary)
    refused = refusal(orch, model_b)
    assert isinstance(refused, ServerUnavailable)
    assert refused.field == "llama_server"
    assert_sentence(key, refused.message, path=binary)
    status = orch.status()
    assert (status.state, status.loaded and status.loaded.pid) == (State.HEALTHY, pid)
    assert len(fake.entries("start")) == 1


@pytest.mark.parametrize(
    "path", ["", "  ", "nul\0", "~nobody-of-that-name/x", "x" * 300, "x/" * 3000]
)
def test_an_invalid_path_of_a_binary_is_refused(make: Make, model_a: str, path: str) -> None:
    refused = refusal(make(llama_server=path), model_a)
    assert isinstance(refused, ServerUnavailable)
    assert refused.field == "llama_server"


def test_a_binary_the_kernel_refuses_fails_with_its_error(
    make: Make, fake: Fake, model_a: str, model_b: str, binary: Path
) -> None:
    """It starts like a program. The next load succeeds."""
    orch = make(llama_server=binary)
    good = binary.read_bytes()
    binary.write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(ServerUnavailable) as refused:
        orch.load(model_a)
    assert_sentence("binary.other_machine", refused.value.message, path=binary)
    assert refused.value.field == "llama_server"
    assert orch.status().state is State.IDLE
    binary.write_bytes(good)
    assert orch.load(model_b).status == "loaded"


def test_a_too_long_argument_list_is_reported(make: Make, fake: Fake, model_a: str) -> None:
    """The spawn fails with E2BIG."""
    orch = make(server_env={**fake.env, "LARGE": "x" * (1 << 18)})
    with pytest.raises(ServerUnavailable) as refused:
        orch.load(model_a)
    assert_sentence("binary.too_many_arguments", refused.value.message, path=fake.path)
    assert orch.status().state is State.IDLE


def test_auto_takes_the_first_that_exists(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, then PATH; an unusable value of the variable is an error."""
    on_path = tmp_path / "bin" / "llama-server"
    on_path.parent.mkdir()
    shutil.copy(fake.path, on_path)
    monkeypatch.setenv("PATH", f"{on_path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LLAMA_SERVER_PATH", fake.path)
    assert find_server("auto").command == (fake.path,)
    monkeypatch.setenv("LLAMA_SERVER_PATH", "/no/such/server")
    with pytest.raises(ServerUnavailable, match="LLAMA_SERVER_PATH: '/no/such/server'") as refused:
        find_server("auto")
    assert refused.value.field == "llama_server"
    monkeypatch.delenv("LLAMA_SERVER_PATH")
    assert find_server("auto").command == (str(on_path),)


# The state directory


def test_a_file_as_state_directory_is_refused(make: Make, fake: Fake, model_a: str) -> None:
    """By the first call and by every later one."""
    orch = make(state_dir=model_a)
    for _ in range(2):
        with pytest.raises(StateDirError) as refused:
            orch.load(model_a)
        assert_sentence("state_dir.file", refused.value.message, path=model_a)
        assert refused.value.field == "state_dir"
    assert fake.entries() == []


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a folder read-only; for root, by mounting it read-only."""
    if os.geteuid() != 0:
        directory.chmod(0o500)
        yield
        directory.chmod(0o700)
        return
    bind, remount, readonly = 4096, 32, 1
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(directory)
    if libc.mount(path, path, None, bind, None) != 0:
        pytest.skip(f"root may not mount here: {os.strerror(ctypes.get_errno())}")
    try:
        assert libc.mount(path, path, None, bind | remount | readonly, None) == 0
        yield
    finally:
        libc.umount2(path, 2)


def test_a_read_only_state_directory_is_refused(
    make: Make, fake: Fake, model_a: str, tmp_path: Path
) -> None:
    directory = tmp_path / "read-only"
    directory.mkdir()
    with read_only(directory), pytest.raises(StateDirError) as refused:
        make(state_dir=directory).load(model_a)
    assert str(directory) in refused.value.message
    assert refused.value.field == "state_dir"
    assert fake.entries() == []
    assert make(state_dir=directory).load(model_a).status == "loaded"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_an_invalid_slot_name_is_refused_by_the_first_call(
    make: Make, fake: Fake, model_a: str, name: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make(slot=name).load(model_a)
    assert refused.value.field == "slot"
    assert fake.entries() == []


def test_the_fake_server_reports_its_running_processes(fake: Fake) -> None:
    """The fixtures rely on this."""
    with subprocess.Popen(["sleep", "600"]) as process:
        journal = Path(fake.directory, "journal")
        found = process_table.identify(process.pid)
        assert found is not None
        entry = {"event": "start", "pid": process.pid, "ticks": found.start_ticks}
        journal.write_text(repr(entry))
        assert fake.running() == {process.pid}
        process.kill()
        process.wait()
        assert fake.running() == set()
