"""A FastAPI backend that owns its model.

    MODEL=model.gguf uvicorn fastapi_embed:app

`POST /ask?question=...` loads the model when it is not there, and streams the answer; what a person
needs (load, status, progress, cancel) is below /api/inference.
"""

import json
import os
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from orchestrator import AsyncOrchestrator, LeasedServer
from orchestrator.http import add_error_handlers, router

orch = AsyncOrchestrator(idle_ttl_s=900)  # gives the memory back after a quarter of an hour
app = FastAPI()
app.include_router(router(orch))  # also starts the orchestrator, and closes it at the end
add_error_handlers(app)  # a load that fails in /ask is answered as in /api/inference/load


async def leased() -> AsyncIterator[LeasedServer]:
    await orch.load(os.environ["MODEL"])  # under a millisecond when it runs already
    async with orch.lease() as server:  # until the answer has been sent
        yield server


Server = Annotated[LeasedServer, Depends(leased)]


@app.post("/ask")
async def ask(question: str, server: Server, max_tokens: int = 100) -> StreamingResponse:
    return StreamingResponse(words(question, server, max_tokens), media_type="text/plain")


async def words(question: str, server: LeasedServer, max_tokens: int) -> AsyncIterator[str]:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": max_tokens, "stream": True}
    key = {"Authorization": f"Bearer {server.api_key}"}
    async with (
        httpx.AsyncClient(base_url=server.base_url, headers=key, timeout=120) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
