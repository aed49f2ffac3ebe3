"""What cannot work is refused with the field and the remedy, and costs nobody anything.

Every refusal is made while another model is Healthy: afterwards the same pid serves, the state is
what it was, and nothing has been started.
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
    SlotOccupied,
    StateDirError,
)
from orchestrator.models.source import ModelSource
from orchestrator.server import ladder, process_table
from orchestrator.server.binaries import find_server
from tests.kit.process.support import Fake, Make, transitions


@pytest.fixture
def running(orch: Orchestrator, fake: Fake, model_a: str) -> Iterator[Orchestrator]:
    """A model is Healthy; whatever the test does, it still is afterwards, in the same process."""
    pid = orch.load(model_a).pid
    before = (orch.status().state, orch.status().generation, len(transitions(orch)))
    yield orch
    assert (orch.status().state, orch.status().generation, len(transitions(orch))) == before
    assert before[0] is State.HEALTHY
    assert orch.load(model_a).pid == pid
    assert len(fake.notes("start")) == 1


def refusal(orch: Orchestrator, model: str, **fields: Any) -> OrchestratorError:
    """The error of a load, the same from `plan`: typed, with a field, in one line."""
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
    ("damage", "error", "remedy"),
    [
        (absent, ModelNotFound, "give a .gguf file"),
        (empty, InvalidModel, "download it again"),
        (truncated, InvalidModel, "download it again"),
        (no_gguf, InvalidModel, "give a .gguf file"),
        (folder, ModelNotFound, "holds no .gguf model"),
        (fifo, InvalidModel, "not a regular file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unusable_model_is_refused_before_anything_is_stopped(
    running: Orchestrator,
    model_b: str,
    damage: Callable[[Path], None],
    error: type[OrchestratorError],
    remedy: str,
) -> None:
    """It is looked at before the old server is touched."""
    damage(Path(model_b))
    refused = refusal(running, model_b)
    assert isinstance(refused, error)
    assert refused.field == "model_path"
    assert remedy in refused.message


def test_a_model_damaged_during_the_load_is_refused(
    orch: Orchestrator, fake: Fake, model_a: str, model_b: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be replaced between the look and the start: nothing is started then."""
    fetch = ModelSource.fetch
    orch.load(model_a)

    def late(*args: Any) -> Any:
        truncated(Path(model_b))
        return fetch(*args)

    monkeypatch.setattr(ModelSource, "fetch", late)
    with pytest.raises(InvalidModel):
        orch.load(model_b)
    assert orch.status().state is State.IDLE
    assert len(fake.notes("start")) == 1
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
    """Negative, absurd, of the wrong type, or unknown: nothing is coerced and nothing dropped."""
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
    """A clock that cannot wait so long ends the thread that tries."""
    settings: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest, match="use 0 to 2592000 seconds") as refused:
        Orchestrator(**settings)
    assert refused.value.field == field


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
    """Before anything is started, and the slot is free again; a value is never shown."""
    orch = make(server_env={**fake.env, **variables})
    with pytest.raises(InvalidRequest) as refused:
        orch.load(model_a)
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
    ("damage", "remedy"),
    [
        (absent, "does not exist: install"),
        (folder, "is a folder: give the llama-server binary inside it"),
        (fifo, "is not a regular file"),
        (not_executable, "is not executable: chmod"),
        (dangling, "does not exist"),
        (loop, "cannot be looked up|does not exist"),
        (empty, "is neither a program nor a script"),
        (garbage, "is neither a program nor a script"),
        (no_interpreter, "needs the interpreter '/no/such/interpreter', which is missing"),
        (bare_shebang, "needs the interpreter"),
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
    remedy: str,
) -> None:
    """An update that broke the binary leaves the old server serving."""
    orch = make(llama_server=binary)
    pid = orch.load(model_a).pid
    damage(binary)
    refused = refusal(orch, model_b)
    assert isinstance(refused, ServerUnavailable)
    assert refused.field == "llama_server"
    with pytest.raises(ServerUnavailable, match=remedy):
        orch.load(model_b)
    status = orch.status()
    assert (status.state, status.loaded and status.loaded.pid) == (State.HEALTHY, pid)
    assert len(fake.notes("start")) == 1


@pytest.mark.parametrize(
    "path", ["", "  ", "nul\0", "~nobody-of-that-name/x", "x" * 300, "x/" * 3000]
)
def test_an_invalid_path_of_a_binary_is_refused(make: Make, model_a: str, path: str) -> None:
    """Typed, whatever the text."""
    refused = refusal(make(llama_server=path), model_a)
    assert isinstance(refused, ServerUnavailable)
    assert refused.field == "llama_server"


def test_a_binary_the_kernel_refuses_fails_with_its_error(
    make: Make, fake: Fake, model_a: str, model_b: str, binary: Path
) -> None:
    """It looks like a program and is none: the load fails, and the next one works."""
    orch = make(llama_server=binary)
    good = binary.read_bytes()
    binary.write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(ServerUnavailable, match="cannot be started") as refused:
        orch.load(model_a)
    assert refused.value.field == "llama_server"
    assert orch.status().state is State.IDLE
    binary.write_bytes(good)
    assert orch.load(model_b).status == "loaded"


def test_a_too_long_argument_list_is_reported(make: Make, fake: Fake, model_a: str) -> None:
    """E2BIG comes from the spawn itself."""
    orch = make(server_env={**fake.env, "LARGE": "x" * (1 << 18)})
    with pytest.raises(ServerUnavailable, match="cannot be started: Argument list too long"):
        orch.load(model_a)
    assert orch.status().state is State.IDLE


def test_auto_takes_the_first_that_exists(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, then PATH; a variable that is wrong is an error, not a reason to go on."""
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
    """At the first call, and nothing was started; the orchestrator says so again at the next."""
    orch = make(state_dir=model_a)
    for _ in range(2):
        with pytest.raises(StateDirError, match="choose another") as refused:
            orch.load(model_a)
        assert refused.value.field == "state_dir"
    assert fake.notes() == []


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Read-only for everybody; for root, whom permissions do not bind, by the file system."""
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
    """A slot that cannot be written cannot be verified either."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    with (
        read_only(directory),
        pytest.raises(StateDirError, match="choose another state_dir") as refused,
    ):
        make(state_dir=directory).load(model_a)
    assert refused.value.field == "state_dir"
    assert fake.notes() == []
    assert make(state_dir=directory).load(model_a).status == "loaded"


def test_a_state_directory_removed_under_a_running_model_can_be_created_again(
    make: Make,
    fake: Fake,
    model_a: str,
    model_b: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody cleans up too much: the server is still ended, and nothing is started unrecorded."""
    monkeypatch.setattr(ladder, "_GONE_BASE_S", 0.2)
    directory = tmp_path / "lost"
    directory.mkdir()
    orch = make(state_dir=directory, kill_grace_s=0.2)
    pid = orch.load(model_a).pid
    shutil.rmtree(directory)
    with pytest.raises(SlotOccupied, match=r"server.lock cannot be written .*choose another"):
        orch.load(model_b)
    assert fake.living() <= {pid}
    assert len(fake.notes("start")) == 1
    (directory / "default").mkdir(parents=True)
    assert orch.unload().status == "unloaded"
    assert fake.living() == set()
    assert orch.load(model_b).status == "loaded"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_an_invalid_slot_name_is_refused_by_the_first_call(
    make: Make, fake: Fake, model_a: str, name: str
) -> None:
    """At the first call; nothing is made in the state directory."""
    with pytest.raises(InvalidRequest, match="use 1 to 64") as refused:
        make(slot=name).load(model_a)
    assert refused.value.field == "slot"
    assert fake.notes() == []


def test_the_fake_server_reports_its_running_processes(fake: Fake) -> None:
    """The fixtures would say so; this says that they can."""
    with subprocess.Popen(["sleep", "600"]) as process:
        journal = Path(fake.directory, "journal")
        found = process_table.identify(process.pid)
        assert found is not None
        note = {"event": "start", "pid": process.pid, "ticks": found.start_ticks}
        journal.write_text(repr(note))
        assert fake.living() == {process.pid}
        process.kill()
        process.wait()
        assert fake.living() == set()
