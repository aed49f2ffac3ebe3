"""What is of a whole pool: readiness, metrics, the catalogue read again, the page, the shutdown."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.test_metrics import scrape, value
from tests.kit.http import problem
from tests.kit.pools import MODELS, catalogue_of, model, serving_pool, until_model
from tests.kit.process.support import Fake, is_running, until

Members = dict[str, Any]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(tmp_path / "fake")
    yield server
    assert not server.running()


@pytest.fixture
def options(fake: Fake, state_dir: Path) -> Members:
    return {
        "llama_server": fake.path,
        "server_env": fake.env,
        "state_dir": state_dir,
        "kill_grace_s": 0.2,
    }


@pytest.fixture
def files(tiny_model: str, other_model: str) -> dict[str, str]:
    return {"chat": tiny_model, "other": other_model}


def test_pool_is_ready_when_its_preloads_are_settled(
    files: dict[str, str], options: Members, fake: Fake
) -> None:
    """Also when they have failed."""
    fake.behave(by_model={Path(files["chat"]).name: {"loading_s": -1}})
    catalogue = catalogue_of(files, {"preload": ["chat"]})
    with serving_pool(catalogue, **options) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        assert problem(client.get("/readyz")) == (503, "not_loaded")
        client.post(f"{MODELS}/chat/cancel")
        until(lambda: client.get("/readyz").status_code == 200, "readiness")
    fake.behave()
    with serving_pool(catalogue, **options) as client:
        until(lambda: client.get("/readyz").status_code == 200, "readiness")
        assert model(client, "chat")["state"] == "Healthy"
    with serving_pool(catalogue_of(files), **options) as client:
        assert client.get("/readyz").json() == {"status": "ready"}


def test_metrics_have_the_model(files: dict[str, str], options: Members) -> None:
    with serving_pool(catalogue_of(files, {"max_resident": 1}), **options) as client:
        client.post(f"{MODELS}/chat/load")
        client.post(f"{MODELS}/other/load")
        client.post("/v1/x", json={"model": "other"})
        found = scrape(client)
        assert value(found, "state", model="other", state="Healthy") == 1
        assert value(found, "state", model="chat", state="Idle") == 1
        for name in files:
            assert value(found, "loads_total", model=name, outcome="loaded") == 1
            assert value(found, "phase_seconds_count", model=name, phase="spawn") == 1
        assert value(found, "pool_budget_bytes", device="Host") == 1 << 30
        assert value(found, "pool_reserved_bytes", device="Host") == 100 << 20
        assert value(found, "pool_evictions_total", reason="room") == 1
        assert value(found, "pool_evictions_total", reason="idle") == 0
        assert found["pool_waiting", (("model", "chat"),)] == 0
        assert value(found, "pool_wait_seconds_count", model="other") == 1
        assert all("model" in dict(labels) for name, labels in found if "pool_" not in name)
        client.delete(f"{MODELS}/other")
        assert not [labels for _, labels in scrape(client) if ("model", "other") in labels]


def test_catalogue_is_read_again(files: dict[str, str], options: Members, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    entry = '[models.{}]\nmodel_path = "{}"\nmemory = "100 MiB"\n'
    chat, other = (entry.format(name, path) for name, path in files.items())
    file.write_text(f'[pool]\nmemory = "1 GiB"\n{chat}{other}')
    with serving_pool(file, **options) as client:
        pids = [client.post(f"{MODELS}/{name}/load").json()["pid"] for name in files]
        file.write_text(f'[pool]\nmemory = "1 GiB"\n{chat}aliases = ["gpt"]\n')
        assert client.post("/api/catalogue").json() == {
            "added": [],
            "changed": ["chat"],
            "removed": ["other"],
            "unchanged": [],
        }
        assert model(client, "gpt")["pid"] == pids[0]
        until(lambda: not is_running(pids[1]), "the end of what was removed")
        assert problem(client.get(f"{MODELS}/other")) == (404, "model_not_found")
        file.write_text(f"{chat}wieght = 2\n")
        refused = client.post("/api/catalogue", json={})
        assert problem(refused) == (400, "invalid_catalogue")
        detail = refused.json()["detail"]
        assert detail.startswith("models.toml:4: models.chat: ")
        assert str(tmp_path) not in detail
        assert model(client, "gpt")["pid"] == pids[0]
        with pytest.raises(tomllib.TOMLDecodeError):
            tomllib.loads("nonsense")
        file.write_text("nonsense")
        assert problem(client.post("/api/catalogue")) == (400, "invalid_catalogue")
        assert problem(client.post("/api/catalogue", json={"file": "x"})) == (422, "malformed")
        assert client.post("/v1/x", json={"model": "gpt"}).status_code == 200


def test_catalogue_that_is_no_file_is_not_read_again(
    files: dict[str, str], options: Members
) -> None:
    with serving_pool(catalogue_of(files), **options) as client:
        assert problem(client.post("/api/catalogue")) == (400, "invalid_request")


def test_page_says_where_things_are(files: dict[str, str], options: Members) -> None:
    with serving_pool(catalogue_of(files), app={"api_keys": ["k"]}, **options) as client:
        for path in ("/", "/model?name=other"):
            page = client.get(path)
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
            assert 'type="module"' in page.text
            assert "other" not in page.text
        assert problem(client.get(MODELS)) == (401, "unauthorized")
        assert problem(client.get("/v1/models")) == (401, "unauthorized")


def test_no_answer_has_a_path_of_this_machine(
    files: dict[str, str], options: Members, tmp_path: Path, fake: Fake
) -> None:
    """But for `model_path`, which the catalogue has."""
    fake.behave(message=f"cannot open {files['chat']}", exit_code=1)
    with serving_pool(catalogue_of(files), **options) as client:
        failed = client.post(f"{MODELS}/chat/load")
        assert problem(failed) == (424, "server_start_failed")
        until_model(client, "chat", lambda one: one["last_error"])
        texts = [failed.text, client.get(MODELS).text, client.get(f"{MODELS}/chat/logs").text]
        texts.append(client.post("/v1/x", json={"model": "chat"}).text)
        for text in texts:
            assert str(tmp_path.parent) not in text, text
