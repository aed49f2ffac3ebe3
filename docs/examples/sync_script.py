"""A script without asyncio: load, ask, swap, unload.

python sync_script.py model.gguf
"""

import json
import sys
import urllib.request

from orchestrator import LeasedServer, Orchestrator


def ask(server: LeasedServer, question: str) -> str:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 32}
    request = urllib.request.Request(
        server.base_url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


with Orchestrator() as orch:  # leaving the block ends the server, whatever happened in it
    outcome = orch.load(sys.argv[1], max_seq_length=512)
    print(f"{outcome.status}: pid {outcome.pid}, context {outcome.context_length}")
    with orch.lease() as server:
        print(ask(server, "Why is the sky blue?"))

    outcome = orch.load(sys.argv[1], max_seq_length=1024)
    for reason in outcome.reload_reasons:
        print(f"reloaded: {reason.field} was {reason.running}, is {reason.requested}")

    print(orch.unload().status)
