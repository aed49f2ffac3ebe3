"""Right and wrong calls for mypy and pyright: every wrong one is marked, and no other. Never run.

`warn_unused_ignores` and `reportUnnecessaryTypeIgnoreComment` report a mark that is not needed.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator import AsyncOrchestrator, LoadFields, LoadRequest, Orchestrator


def right(orch: Orchestrator) -> None:
    orch.load("owner/name", gguf_variant="Q4_K_M", max_seq_length=4096)
    orch.load(Path("model.gguf"), llama_extra_args=["--top-k", "20"], idle_ttl_s=60)
    orch.load(model_path="model.gguf", kind="embedding", pooling="mean", cache_ram_mib=0)
    orch.load(LoadRequest(model_path="model.gguf", n_parallel=2), force_reload=True)
    orch.submit("model.gguf", on_busy="queue")
    orch.prefetch(model_path=Path("model.gguf"))
    orch.variants("owner/name", revision=None)
    orch.plan("model.gguf", chat_template_override=None)
    kept: LoadFields = {"cache_type_kv": "q8_0", "pinned": True}
    orch.load("model.gguf", **kept)


def wrong(orch: Orchestrator) -> None:
    orch.load("model.gguf", max_seq_lenght=4096)  # type: ignore[call-arg]
    orch.load("model.gguf", n_parallel="2")  # type: ignore[arg-type]
    orch.load("model.gguf", kind="vision")  # type: ignore[arg-type]
    orch.load("model.gguf", on_busy="wait")  # type: ignore[arg-type]
    orch.load("model.gguf", pinned=None)  # type: ignore[arg-type]
    orch.load(7)  # type: ignore[arg-type]
    orch.submit("model.gguf", cache_type="q8_0")  # type: ignore[call-arg]
    orch.prefetch("model.gguf", hf_token=b"x")  # type: ignore[arg-type]
    orch.variants("model.gguf", revision=1)  # type: ignore[arg-type]
    orch.plan("model.gguf", llama_extra_args=["-c", 8])  # type: ignore[list-item]
    LoadRequest(model_path="model.gguf", max_seq_lenght=1)  # type: ignore[call-arg]


async def in_async_code(orch: AsyncOrchestrator) -> None:
    await orch.load("model.gguf", deadline_s=60)
    await orch.submit(model_path="model.gguf")
    orch.plan(Path("model.gguf"))
    await orch.load("model.gguf", deadline="60")  # type: ignore[call-arg]
    await orch.prefetch("model.gguf", prefetch=1)  # type: ignore[arg-type]
