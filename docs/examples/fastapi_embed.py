"""A FastAPI backend that owns its model.

    MODEL=model.gguf uvicorn fastapi_embed:app

`POST /ask?question=...` loads the model when it is not there, and answers; what a person needs
(load, status, progress, cancel) is below /api/inference.
"""

import os

import httpx
from fastapi import FastAPI

from orchestrator import AsyncOrchestrator
from orchestrator.http import router

orch = AsyncOrchestrator(idle_ttl_s=900)  # gives the memory back after a quarter of an hour
app = FastAPI()
app.include_router(router(orch))  # also starts the orchestrator, and closes it at the end


@app.post("/ask")
async def ask(question: str) -> str:
    await orch.load(os.environ["MODEL"])  # under a millisecond when it runs already
    async with orch.lease() as server, httpx.AsyncClient(base_url=server.base_url) as client:
        client.headers["Authorization"] = f"Bearer {server.api_key}"
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 100}
        answer = await client.post("/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text
