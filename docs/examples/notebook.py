# %% One orchestrator for the life of the kernel: run this cell once.
import httpx

from orchestrator import Orchestrator
from orchestrator.tiny_model import write_tiny_model

orch = Orchestrator(slot="notebook")
write_tiny_model("tiny.gguf")  # or the name of a real one

# %% Run it again, as it is or with other settings.
outcome = orch.load("tiny.gguf", max_seq_length=512)
print(outcome.status, outcome.reload_reasons)


# %% Ask.
def ask(question: str, max_tokens: int = 64) -> str:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    with orch.lease() as server:
        url = server.base_url + "/v1/chat/completions"
        key = {"Authorization": f"Bearer {server.api_key}"}
        answer = httpx.post(url, json=body, headers=key, timeout=120).raise_for_status()
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


print(ask("Why is the sky blue?"))

# %% What llama-server printed last.
print("\n".join(orch.logs()[-3:]))

# %% Give the memory back. The end of the kernel does so too, whatever ends it.
orch.unload()
