"""Files and machines that extra args reach: what a holder of a key, or another machine, may ask."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from orchestrator import AsyncOrchestrator
from orchestrator.http import create_app, router
from tests.kit.http import PREFIX, Serve, serving
from tests.kit.sentences import assert_sentence

LOAD = PREFIX + "/load"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text('root ::= "s3cret"\n')
    return path


def refused(client: httpx.Client, model: str, *args: str) -> str:
    """Return the refusal of extra args by every route that takes them."""
    body = {"model_path": model, "llama_extra_args": list(args)}
    answers = [client.post(PREFIX + path, json=body) for path in ("/load", "/plan")]
    for answer in answers:
        assert (answer.status_code, answer.json()["field"]) == (400, "llama_extra_args"), args
    assert client.get(PREFIX + "/status").json()["state"] == "Idle"
    return str(answers[0].json()["detail"])


@pytest.mark.parametrize("options", [{"api_keys": ["k"]}, {"allowed_hosts": ["llm.example"]}])
def test_holder_of_a_key_reads_no_file_and_reaches_no_machine(
    serve: Serve, tiny_model: str, secret: Path, options: dict[str, Any]
) -> None:
    """A name that is not of this machine means a proxy, so requests come from elsewhere, too."""
    with serve(**options) as client:
        client.headers["Authorization"] = "Bearer k"
        message = refused(client, tiny_model, "--grammar-file", str(secret))
        assert_sentence("args.reads", message, flag="--grammar-file")
        message = refused(client, tiny_model, "--rpc", "10.0.0.1:50052")
        assert_sentence("args.reaches", message, flag="--rpc")
        for args in (
            ("--chat-template-file", str(secret)),
            ("--brand-new-file", "secret"),
            ("--brand-new", "10.0.0.1:50052"),
        ):
            refused(client, tiny_model, *args)
        body = {
            "model_path": tiny_model,
            "llama_extra_args": ["--chat-template-kwargs", '{"a": "/b"}'],
        }
        assert client.post(PREFIX + "/plan", json=body).status_code == 200


@pytest.mark.parametrize("flag", ["--video-ffmpeg-dir", "--lookup-cache-dynamic", "--log-file"])
def test_flag_that_writes_or_runs_is_refused_to_anybody(
    serve: Serve, tiny_model: str, tmp_path: Path, flag: str
) -> None:
    with serve() as client:
        refused(client, tiny_model, flag, str(tmp_path))


def test_program_of_this_machine_may_name_files(
    serve: Serve, tiny_model: str, secret: Path
) -> None:
    """On loopback, without keys: whoever can ask can read them as well."""
    with serve() as client:
        body = {"model_path": tiny_model, "llama_extra_args": ["--chat-template-file", str(secret)]}
        assert client.post(LOAD, json=body).status_code == 200


def test_files_inside_of_models_dir_may_be_named(
    serve: Serve, tiny_model: str, secret: Path
) -> None:
    folders = [str(secret.parent), str(Path(tiny_model).parent)]
    with serve(api_keys=["k"], models_dir=folders) as client:
        client.headers["Authorization"] = "Bearer k"
        args = ["--chat-template-file", str(secret)]
        body = {"model_path": tiny_model, "llama_extra_args": args}
        assert client.post(PREFIX + "/plan", json=body).status_code == 200
        refused(client, tiny_model, "--chat-template-file", "/etc/passwd")
        refused(client, tiny_model, "--rpc", "10.0.0.1:50052")


def test_reported_args_may_be_sent_back(tiny_model: str, secret: Path, state_dir: Path) -> None:
    """The host's own program loads with a file, and a person applies another setting."""
    orch = AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)
    app = create_app(orch, api_keys=["k"])

    @app.post("/own")
    async def own() -> None:
        await orch.load(tiny_model, llama_extra_args=["--chat-template-file", str(secret)])

    with serving(app) as client:
        client.headers["Authorization"] = "Bearer k"
        assert client.post("/own").status_code == 200
        args = client.get(PREFIX + "/status").json()["loaded"]["llama_extra_args"]
        body = {"model_path": tiny_model, "max_seq_length": 512}
        for more in ({"llama_extra_args": args}, {}):
            applied = client.post(LOAD, json={**body, **more})
            assert applied.status_code == 200
            assert applied.json()["llama_extra_args"] == args
        changed = client.post(PREFIX + "/plan", json={**body, "llama_extra_args": [*args, *args]})
        assert changed.status_code == 400


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 200), ("192.0.2.1", 400)])
def test_router_judges_by_where_a_request_arrives(
    tiny_model: str, state_dir: Path, address: str, status: int
) -> None:
    app = FastAPI()
    app.include_router(router(AsyncOrchestrator(llama_server="embedded", state_dir=state_dir)))
    body = {"model_path": tiny_model, "llama_extra_args": ["--chat-template-file", tiny_model]}

    async def plan() -> int:
        there, transport = f"http://{address}", httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=there) as client:
            return (await client.post(PREFIX + "/plan", json=body)).status_code

    assert asyncio.run(plan()) == status
