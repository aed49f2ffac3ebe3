"""Load and ask through a running service.

    llama-orchestrator serve
    python connect.py http://127.0.0.1:8642 /models/model.gguf "Why is the sky blue?"

The key of a service that has one is in LLAMA_ORCHESTRATOR_API_KEY.
"""

import os
import sys

import httpx

from orchestrator import Orchestrator, OrchestratorError

url, model, question = sys.argv[1:]

with Orchestrator.connect(url, api_key=os.environ.get("LLAMA_ORCHESTRATOR_API_KEY")) as orch:
    try:
        outcome = orch.load(model)
    except OrchestratorError as error:  # the same classes as in the service's own process
        sys.exit(f"{error.category}: {error.message}")
    print(f"{outcome.status}: generation {outcome.generation}")

    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 100}
    with orch.lease() as service:
        key = {"Authorization": f"Bearer {service.api_key}"} if service.api_key else {}
        answer = httpx.post(
            service.base_url + "/chat/completions", json=body, headers=key, timeout=120
        )
    print(answer.raise_for_status().json()["choices"][0]["message"]["content"])
