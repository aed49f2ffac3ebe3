"""Routes of your own that stream what the model says, as server-sent events.

    MODEL=model.gguf uvicorn streaming_route:app

`POST /chat` takes the body of OpenAI's chat completions, and answers with its events as they are.
"""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import httpx
from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from orchestrator import AsyncOrchestrator
from orchestrator.http import add_error_handlers, router

orch = AsyncOrchestrator()
app = FastAPI()
app.include_router(router(orch))
add_error_handlers(app)  # without a model: 503, before the first byte


async def opened() -> AsyncIterator[AsyncExitStack]:
    """What a stream holds. FastAPI closes it when the response has ended, however it has ended."""
    async with AsyncExitStack() as stack:
        yield stack


@app.post("/chat")
async def chat(
    body: Annotated[dict[str, Any], Body()],
    held: Annotated[AsyncExitStack, Depends(opened)],
) -> StreamingResponse:
    await orch.load(os.environ["MODEL"])
    server = await held.enter_async_context(orch.lease())
    client = await held.enter_async_context(
        httpx.AsyncClient(base_url=server.base_url, timeout=httpx.Timeout(5, read=300))
    )
    answer = await held.enter_async_context(
        client.stream(
            "POST",
            "/v1/chat/completions",
            json=body | {"stream": True},
            headers={"Authorization": f"Bearer {server.api_key}"},
        )
    )
    if answer.is_error:  # a status can be sent now, and not when the stream has begun
        await answer.aread()
        raise HTTPException(answer.status_code, answer.json()["error"]["message"])
    return StreamingResponse(
        answer.aiter_raw(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )
