"""Tests of the tutorial's backend: pytest test_backend.py

Every test has a slot, a model and a server of its own, so tests may also run in parallel.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from fastapi_embed import app, orch

from orchestrator.tiny_model import write_tiny_model

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MODEL", str(write_tiny_model(tmp_path / "tiny.gguf")))
    with TestClient(app) as client:  # starts the orchestrator, and closes it at the end
        yield client


def test_first_question_loads_the_model(client: TestClient) -> None:
    assert orch.status().state == "Idle"
    answer = client.post("/ask", params={"question": "Why?", "max_tokens": 20})
    assert len(answer.text) == 20  # the tiny model says a character of noise with each token
    assert orch.status().state == "Healthy"


def test_next_question_loads_nothing(client: TestClient) -> None:
    pids = set()
    for _ in range(2):
        assert client.post("/ask", params={"question": "Why?"}).is_success
        pids.add(client.get("/api/inference/status").json()["loaded"]["pid"])
    assert len(pids) == 1


def test_missing_model_is_a_404(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "/nowhere/model.gguf")
    answer = client.post("/ask", params={"question": "Why?"})
    assert (answer.status_code, answer.json()["category"]) == (404, "model_not_found")


def test_answer_is_streamed_word_by_word(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_SERVER_PATH", str(FAKE_SERVER))
    answer = client.post("/ask", params={"question": "Why is the sky blue?"})
    assert answer.text == "A canned answer. "
