"""The `openai` client on a model of one's own, streaming.

python openai_client.py model.gguf "Why is the sky blue?"
"""

import asyncio
import sys

from openai import AsyncOpenAI

from orchestrator import AsyncOrchestrator


async def main(model: str, question: str) -> None:
    async with AsyncOrchestrator() as orch:
        await orch.load(model)
        async with orch.lease() as server:  # no swap ends the stream in the middle
            client = AsyncOpenAI(
                base_url=f"{server.base_url}/v1", api_key=server.api_key, max_retries=0
            )
            async with client:
                stream = await client.chat.completions.create(
                    model="whatever is loaded",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=64,
                    stream=True,
                )
                async for chunk in stream:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
                print()


asyncio.run(main(sys.argv[1], sys.argv[2]))
