"""Write pictures of the panel in eight states, at three widths, light and dark.

`make gallery` runs this; look at them one by one after a change of the panel.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
from playwright.sync_api import Page, expect, sync_playwright

from orchestrator import RestartPolicy
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.http import create_app
from tests.kit.http import PREFIX, serving, until, using_the_server
from tests.kit.panel import FLAGS
from tests.kit.pools import MODELS, catalogue_of, serving_pool

WIDTHS = (1440, 1024, 390)
SCHEMES = ("light", "dark")
ASKED = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200}
State = Callable[[Path], AbstractContextManager[tuple[httpx.Client, str]]]


@contextlib.contextmanager
def slot(folder: Path, **options: Any) -> Iterator[httpx.Client]:
    app = create_app(llama_server="auto", state_dir=folder / "state", **options)
    with serving(app) as client:
        yield client


def load(client: httpx.Client, **body: Any) -> None:
    client.post(PREFIX + "/load", json={"model_path": "models/Tiny-Llama-Q8_0.gguf", **body})


@contextlib.contextmanager
def pool(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    """Models that are ready, pinned, at rest, too large and failed; some requests."""
    files = {
        "chat": "models/Tiny-Llama-Q8_0.gguf",
        "chat-large": "models/Tiny-Llama-Q4_K_M.gguf",
        "vectors": "models/Tiny-Llama-Q4_K_M.gguf",
        "huge": "models/Tiny-Llama-Q4_K_M.gguf",
        "broken": "models/Tiny-Llama-Q4_K_M.gguf",
    }
    catalogue = catalogue_of(
        files,
        chat={"memory": "400 MiB", "aliases": ["gpt-4o-mini"]},
        vectors={"kind": "embedding", "pooling": "mean", "pinned": True, "memory": "200 MiB"},
        broken={"llama_extra_args": ["--top-k", "bogus"]},
        huge={"memory": "2 GiB"},
        **{"chat-large": {"memory": "700 MiB"}},
    )
    with serving_pool(catalogue, llama_server="auto", state_dir=folder / "state") as client:
        for name in ("broken", "chat", "vectors"):
            client.post(f"{MODELS}/{name}/load")
        for _ in range(3):
            client.post("/v1/chat/completions", json={"model": "chat", **ASKED})
        client.post("/v1/embeddings", json={"model": "vectors", "input": "Hello"})
        client.post("/v1/embeddings", json={"model": "chat", "input": "Hello"})
        yield client, "/"


@contextlib.contextmanager
def of_pool(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with pool(folder) as (client, _):
        yield client, "/model?name=chat-large"


@contextlib.contextmanager
def at_rest(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with slot(folder) as client:
        yield client, "/"


@contextlib.contextmanager
def ready(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with slot(folder) as client:
        load(client)
        load(client, llama_extra_args=["--top-k", "bogus"])
        load(client, cache_type_kv="q8_0", llama_extra_args=["--top-k", "20"])
        for _ in range(3):
            client.post("/v1/chat/completions", json=ASKED)
        yield client, "/"


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A server that never becomes ready."""
    stuck = folder / "stuck-server"
    stuck.write_text(
        "#!/bin/sh\necho '0.00.001 I srv  llama_server: initializing ...'\nsleep 600\n"
    )
    stuck.chmod(0o755)
    app = create_app(llama_server=str(stuck), state_dir=folder / "state")
    with serving(app) as client:
        path = "models/Tiny-Llama-Q8_0.gguf"
        client.post(f"{PREFIX}/load?wait=false", json={"model_path": path})
        until(client, lambda status: status["state"] == "WaitingHealth")
        yield client, "/"


@contextlib.contextmanager
def draining(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with slot(folder, drain_timeout_s=600) as client:
        load(client)
        with using_the_server(str(client.base_url)):
            body = {"model_path": "models/Tiny-Llama-Q4_K_M.gguf"}
            client.post(f"{PREFIX}/load?wait=false", json=body)
            until(client, lambda status: status["draining_left_s"])
            yield client, "/"


@contextlib.contextmanager
def failed(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with slot(folder) as client:
        load(client)
        load(client, llama_extra_args=["--top-k", "bogus"])
        yield client, "/"


@contextlib.contextmanager
def crashed(folder: Path) -> Iterator[tuple[httpx.Client, str]]:
    with slot(folder, restart=RestartPolicy(backoff_s=600, limit=3)) as client:
        load(client)
        psutil.Process(client.get(PREFIX + "/status").json()["loaded"]["pid"]).kill()
        until(client, lambda status: status["recovery"])
        yield client, "/"


STATES: dict[str, State] = {
    "pool": pool,
    "model-of-pool": of_pool,
    "idle": at_rest,
    "ready": ready,
    "loading": loading,
    "draining": draining,
    "failed": failed,
    "crashed": crashed,
}


def picture(page: Page, url: str, file: Path) -> None:
    page.goto(url)
    expect(page.locator("#link")).to_have_text("live")
    expect(page.locator("#plan p, #budget p").first).to_be_visible()
    expect(page.locator("#live strong").first).to_have_text(re.compile(r"\d"))
    if page.locator("#rows").count():  # the plans follow
        expect(page.get_by_text("Does not fit")).to_be_visible()
    page.wait_for_load_state("load")
    page.screenshot(path=file, animations="disabled", full_page=True)


def main(pictures: Path, *wanted: str) -> None:
    pictures = pictures.absolute()
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as top, sync_playwright() as playwright:
        os.chdir(top)
        Path("models").mkdir()
        for seed, label in enumerate(("Q4_K_M", "Q8_0")):
            write_tiny_model(f"models/Tiny-Llama-{label}.gguf", seed=seed)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name in wanted or STATES:
            folder = Path(top, name)
            folder.mkdir()
            with STATES[name](folder) as (client, path):
                for width in WIDTHS:
                    for scheme in SCHEMES:
                        size = {"width": width, "height": 900}
                        how: dict[str, Any] = {"viewport": size, "color_scheme": scheme}
                        context = browser.new_context(**how)
                        file = pictures / f"{name}-{width}-{scheme}.png"
                        url = str(client.base_url).rstrip("/") + path
                        picture(context.new_page(), url, file)
                        context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
