"""A bar for a load, whether it downloads or reads from disk.

python progress_bar.py unsloth/Qwen3-0.6B-GGUF:Q4_K_M
"""

import asyncio
import sys

from orchestrator import AsyncOrchestrator, LoadOutcome, OrchestratorError, Problem

WIDTH = 40


async def load(model: str) -> LoadOutcome:
    async with AsyncOrchestrator() as orch:
        generation = await orch.submit(model)  # begins a load, and waits for nothing
        result: LoadOutcome | Problem | None = None
        while result is None:
            result = await orch.settled(generation, timeout_s=0.1)
            step = orch.progress()
            share = step.fraction
            if share is None:  # unknown, or the server has read all and is not yet ready
                share = (step.bytes_done or 0) / (step.bytes_total or 1)
            done = "#" * round(WIDTH * share)
            print(f"\r{step.phase or '':<12} [{done:<{WIDTH}}]", end="", flush=True)
        print()
        if isinstance(result, Problem):
            raise result.error()
        return result


try:
    outcome = asyncio.run(load(sys.argv[1]))
except OrchestratorError as error:
    sys.exit(f"{error.category}: {error.message}")
print(f"ready after {outcome.timings_s.total:.1f} s")
