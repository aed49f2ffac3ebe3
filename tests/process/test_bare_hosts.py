"""Hosts without a home folder, a temporary folder, or more of /proc than the processes (B82).

Code that only names a folder once failed there: every answer was a bare 500, and the running model
was lost. Where mounts are allowed the lack is real, elsewhere it is simulated in the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator, StateDirError
from orchestrator.base import launch, paths
from orchestrator.errors import CacheDirError
from orchestrator.http.paths import own_folders
from orchestrator.models.hub import cache
from orchestrator.server import process_table
from orchestrator.server.state_dir import default_state_dir
from tests.kit.command import environment
from tests.kit.process.support import StartHost
from tests.kit.sentences import assert_sentence

MOUNTS = {
    "home": "for f in passwd nsswitch.conf; do mount --bind /dev/null /etc/$f || exit; done",
    "proc": "mount -t proc -o subset=pid proc /proc",
    "temporary folder": "true",
}
SIMULATED = {
    "home": "import pwd\ndef absent(uid): raise KeyError(uid)\npwd.getpwuid = absent\n",
    "proc": (
        "import psutil\n"
        "from orchestrator.server import process_table\n"
        "read = process_table._read\n"
        "def some(path, n=-1): return None if path == '/proc/stat' else read(path, n)\n"
        "process_table._read = some\n"
        "def absent(): raise FileNotFoundError(2, 'No such file', '/proc/stat')\n"
        "psutil.boot_time = absent\n"
    ),
}
NO_TEMPORARY_FOLDER = (
    "import tempfile\n"
    "def absent(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
    "tempfile.gettempdir = absent\n"
)
SERVICE = """
from fastapi.testclient import TestClient
from orchestrator import AsyncOrchestrator
from orchestrator.http import create_app

orch = AsyncOrchestrator(
    llama_server=a["server"], state_dir=a["state_dir"], server_env=a["env"]
)
app = create_app(orch)
with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
    def ask(path, **body):
        method = "POST" if body else "GET"
        answer = client.request(method, "/api/inference" + path, json=body or None)
        send(status=answer.status_code, body=answer.json())
    ask("/status")
    ask("/load", model_path=a["model"])
    ask("/load", model_path="owner/none", stall_timeout_s=5)
    ask("/plan", model_path=a["model"], llama_extra_args=["--top-k", "3"])
    ask("/plan", model_path=a["model"], llama_extra_args=["--not-a-flag"])
    ask("/status")
    ask("/unload", model_path=a["model"])
"""


def inside(lack: str) -> tuple[str, ...]:
    """Return the command that runs another one with this lack and without any variable."""
    script = f'{MOUNTS[lack]} && exec env -i PATH="$PATH" HF_ENDPOINT=http://127.0.0.1:9 "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


def is_real(lack: str) -> bool:
    return subprocess.run([*inside(lack), "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("lack", MOUNTS)
def test_a_service_answers_and_keeps_its_model(host: StartHost, lack: str, tmp_path: Path) -> None:

    if lack == "temporary folder":
        prelude = NO_TEMPORARY_FOLDER
    else:
        prelude = "" if is_real(lack) else SIMULATED[lack]
    wrapper = inside(lack) if is_real(lack) else ("env", "-i", f"PATH={os.environ['PATH']}")
    service = host(prelude + SERVICE, server="embedded", inside=wrapper)
    answers = [service.receive() for _ in range(7)]
    status, loaded, hub, plan, refused, after, unloaded = answers
    assert [a["status"] for a in (status, loaded, plan, refused, after, unloaded)] == [
        *(200, 200, 200, 400, 200, 200)
    ], answers
    assert (hub["status"], hub["body"]["category"]) == (
        (500, "cache_dir") if lack == "home" else (502, "hub_unreachable")
    )
    assert after["body"]["state"] == "Healthy"
    assert after["body"]["loaded"]["pid"] == loaded["body"]["pid"]
    service.process.wait(30)


@pytest.mark.parametrize("lack", MOUNTS)
def test_doctor_reports_what_is_lacking(lack: str, state_dir: Path) -> None:

    wrapper = inside(lack) if is_real(lack) else ("env", "-i", f"PATH={os.environ['PATH']}")
    program = (
        (NO_TEMPORARY_FOLDER if lack == "temporary folder" else "")
        + ("" if is_real(lack) else SIMULATED.get(lack, ""))
        + "import runpy\nrunpy.run_module('orchestrator.cli', run_name='__main__')"
    )
    flags = ("doctor", "--json", "--port", "0", "--llama-server", "embedded")
    root = environment()["PYTHONPATH"]
    done = subprocess.run(
        [*wrapper, "env", f"PYTHONPATH={root}", sys.executable, "-c", program, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=state_dir,
    )
    assert done.stderr == ""
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert list(state_dir.iterdir()) == []
    if lack == "home":
        assert checks["state dir"]["verdict"] == "problem"
        assert checks["model cache"]["verdict"] == "note"
    else:
        assert checks["state dir"]["verdict"] == "ok"
    assert checks["proc"]["verdict"] == checks["flock"]["verdict"] == "ok"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", absent)
    names = "HOME XDG_STATE_HOME XDG_CACHE_HOME LLAMA_ORCHESTRATOR_STATE_DIR HF_HOME HF_HUB_CACHE"
    for name in (*names.split(), "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_default_folders_are_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named `~` was made in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert paths.home() is None
    with pytest.raises(StateDirError) as no_state:
        Orchestrator()
    assert_sentence("bare.state_dir", no_state.value.message)
    assert no_state.value.field == "state_dir"
    with pytest.raises(CacheDirError) as no_cache:
        cache.directory()
    assert_sentence("bare.cache_dir", no_cache.value.message)
    assert own_folders() == ()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert default_state_dir() == tmp_path / "llama-orchestrator"
    assert own_folders() == ((str(tmp_path / "hf/hub"), "<hub cache>"),)


@pytest.mark.usefixtures("no_home")
def test_home_is_the_variable_or_the_passwd_entry(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("HOME", "/somewhere")
    assert paths.home() == "/somewhere"
    monkeypatch.setenv("HOME", "relative")
    assert paths.home() is None


def test_a_removed_working_directory_is_named_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert paths.names_of_own("state", "<state>") == (("state", "<state>"),)
    assert paths.names_as_sent("a.gguf", "a.gguf") == ((".", "."), ("a.gguf", "a.gguf"))
    with pytest.raises(StateDirError):
        Orchestrator(state_dir="state").unload()


def test_output_of_a_child_needs_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:

    def absent() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", absent)
    with launch.output_file() as file:
        subprocess.run(["echo", "heard"], stdout=file, check=True)
        file.seek(0)
        assert file.read() == b"heard\n"


def test_a_hidden_boot_id_is_the_same_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper compares it with its host's."""
    monkeypatch.setattr(process_table, "_read", lambda *_: None)
    process_table.boot_id.cache_clear()
    try:
        assert process_table.boot_id() == "unknown"
    finally:
        process_table.boot_id.cache_clear()
