"""Mixed traffic of many clients on more models than there is room for."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import openai
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.http import DEADLINE_S
from tests.kit.pools import MODELS, serving_pool
from tests.kit.process.servers import servers_of
from tests.kit.process.support import is_running

_CLIENTS: Final = 16
_CHATS: Final = ("red", "green", "blue")
_ROOM: Final = {"memory": "250 MiB", "cache_ram_mib": 100, "min_resident_s": 0.2, "max_wait_s": 1}


class Traffic:
    """What one client asks for until the end; an answer is right, or this raises."""

    def __init__(self, base_url: str, seed: int, until: float, seen: Counter[str]) -> None:
        self._api = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="x", max_retries=0, timeout=10 * DEADLINE_S
        )
        self._random, self._until, self._seen = random.Random(seed), until, seen

    def run(self) -> None:
        with self._api:
            while time.monotonic() < self._until:
                what = self._random.choice([self.chat, self.stream, self.embed])
                what()
                self._seen[what.__name__] += 1

    def chat(self) -> None:
        name = self._random.choice(_CHATS)
        answer = self._api.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=8
        )
        assert answer.model == name
        assert answer.choices[0].finish_reason in ("length", "stop")

    def stream(self) -> None:
        name, end = self._random.choice(_CHATS), None
        with self._api.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=self._random.choice([8, 64]),
            stream=True,
        ) as answer:
            for chunk in answer:
                assert chunk.model == name
                end = chunk.choices[0].finish_reason if chunk.choices else end
        assert end in ("length", "stop"), "a stream was cut"

    def embed(self) -> None:
        answer = self._api.embeddings.create(model="vectors", input=["hello", "world"])
        assert answer.model == "vectors"
        assert len(answer.data) == 2


@pytest.mark.external
@pytest.mark.parametrize(
    "seconds",
    [10, pytest.param(600, marks=[pytest.mark.deep, pytest.mark.timeout(900)])],
)
def test_mixed_traffic_loses_no_request_and_keeps_to_the_budget(
    seconds: int, llama_server: str, state_dir: Path, tmp_path: Path
) -> None:
    files = {
        name: str(write_tiny_model(tmp_path / f"{name}.gguf", seed=number))
        for number, name in enumerate((*_CHATS, "vectors"))
    }
    models = {name: {"model_path": path, "memory": "104 MiB"} for name, path in files.items()}
    models["vectors"] |= {"kind": "embedding", "pooling": "mean"}
    seen: Counter[str] = Counter()
    pids: set[int] = set()
    is_over = threading.Event()

    def sample(base_url: str) -> None:
        """Look at the ledger and at the processes from the outside."""
        with httpx.Client(base_url=base_url, timeout=DEADLINE_S) as client:
            while not is_over.wait(0.02):
                shown = client.get(MODELS).json()
                [host] = shown["budget"]
                assert host["reserved_mib"] <= host["total_mib"]
                there = {one["pid"] for one in shown["models"] if one["pid"] is not None}
                assert len(there) <= 2
                pids.update(there)
                seen["samples"] += 1

    with (
        serving_pool(
            {"pool": _ROOM, "models": models}, llama_server=llama_server, state_dir=state_dir
        ) as client,
        ThreadPoolExecutor(_CLIENTS + 1) as threads,
    ):
        base_url, until = str(client.base_url).rstrip("/"), time.monotonic() + seconds
        sampler = threads.submit(sample, base_url)
        runs = [
            threads.submit(Traffic(base_url, seed, until, seen).run) for seed in range(_CLIENTS)
        ]
        try:
            for run in runs:
                run.result()
        finally:
            is_over.set()
        sampler.result()
        shown = client.get(MODELS).json()
        assert not shown["waiting"]
        assert sum(one["leases"] for one in shown["models"]) == 0
    print(f"\n{dict(seen)}, {len(pids)} servers")
    assert seen.keys() == {"chat", "stream", "embed", "samples"}
    assert len(pids) > 4  # models came and went
    assert not servers_of(state_dir)
    assert not [pid for pid in pids if is_running(pid)]
