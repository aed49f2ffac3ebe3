"""The programs on Windows: command line, service, and downloads from a Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.errors import Cancelled
from orchestrator.http.app import PREFIX
from tests.kit.fake_hub import Hub, Repo
from tests.windows.conftest import Make, processes, servers, until


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state")},
    )


def test_doctor_finds_what_it_needs(tmp_path: Path) -> None:
    done = command(
        "doctor", "--llama-server", "embedded", "--state-dir", str(tmp_path), folder=tmp_path
    )
    assert "xllamacpp" in done.stdout
    assert "the process table can be read" in done.stdout
    assert "Traceback" not in done.stdout
    assert done.returncode == 0, done.stdout


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    done = command("demo", "--tiny", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Servers alive at once: 1 at most" in done.stdout
    assert "0 left" in done.stdout


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    """Give the address of `serve`, which is killed at the end."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "orchestrator.cli", "serve", "--json", "--port", "0"),
            *("--llama-server", "embedded", "--state-dir", str(tmp_path / "state")),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


def test_the_service_loads_answers_and_leaves_nothing(service: str, models: list[str]) -> None:
    with httpx.Client(base_url=service, timeout=60.0, trust_env=False) as client:
        assert client.get("/").status_code == 200  # the panel
        loaded = client.post(PREFIX + "/load", json={"model_path": models[2]})
        assert loaded.status_code == 200, loaded.text
        question = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        answer = client.post("/v1/chat/completions", json=question)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        with client.stream("POST", "/v1/chat/completions", json={**question, "stream": True}) as it:
            assert "data: [DONE]" in it.read().decode()
        assert client.get(PREFIX + "/status").json()["state"] == "Healthy"
        assert client.get("/metrics").status_code == 200
        assert client.post(PREFIX + "/unload").status_code == 200
        assert servers() == set()
        assert client.post(PREFIX + "/load", json={"model_path": models[0]}).status_code == 200
        assert len(servers()) == 1


def test_a_model_is_downloaded_and_another_download_is_cancelled(
    make: Make, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without symbolic links, for which a user of Windows needs a right."""
    content = Path(models[0]).read_bytes()
    with Hub() as hub:
        hub.add(Repo("org/small", {"m-Q8_0.gguf": content}))
        hub.add(Repo("org/slow", {"s-Q8_0.gguf": content + bytes(64 << 20)}))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "größe" / "hub"))
        orch = make()
        loaded = orch.load("org/small")
        assert loaded.status == "loaded"
        [file] = (tmp_path / "größe").rglob("m-Q8_0.gguf")
        assert file.read_bytes() == content
        orch.unload()
        before = processes()
        hub.fail(path="s-Q8_0.gguf", stall_after=1 << 20)
        ended: list[Cancelled] = []

        def load() -> None:
            with pytest.raises(Cancelled) as caught:
                orch.load("org/slow")
            ended.append(caught.value)

        loading = threading.Thread(target=load)
        loading.start()
        until(lambda: hub.sent("s-Q8_0.gguf") >= 1 << 20, "the download")
        orch.unload()
        loading.join(30.0)
        assert len(ended) == 1
        until(lambda: processes() <= before, "the end of the download")
        assert servers() == set()
