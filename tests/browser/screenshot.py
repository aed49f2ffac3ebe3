"""Write the pictures of the docs: the panel of a slot after a few real loads, and that of a pool.

`make screenshot` runs this.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from orchestrator.demo import tiny_model
from orchestrator.http import create_app
from tests.browser.gallery import pool
from tests.kit.http import PREFIX, serving
from tests.kit.panel import DESKTOP, FLAGS

LOADS = (
    {"model_path": "models", "gguf_variant": "Q8_0"},
    {"model_path": "models", "llama_extra_args": ["--top-k", "bogus"]},
    {"model_path": "models", "llama_extra_args": ["--top-k", "20"], "cache_type_kv": "q8_0"},
)


def main(picture: Path, of_pool: Path) -> None:
    picture, of_pool = picture.absolute(), of_pool.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("models").mkdir()
        for seed, label in enumerate(("Q4_K_M", "Q8_0")):
            tiny_model.write_tiny_model(f"models/Tiny-Llama-{label}.gguf", seed=seed)
        app = create_app(llama_server="embedded", state_dir=Path(folder, "slot"))
        with serving(app) as client, sync_playwright() as playwright:
            for body in LOADS:
                client.post(PREFIX + "/load", json=body)
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=FLAGS
            )
            width, height = DESKTOP
            page = browser.new_page(viewport={"width": width, "height": height + 40})
            page.goto(str(client.base_url))
            expect(page.locator("#diagram .traced")).to_have_count(5)
            page.fill("#max_seq_length", "1024")
            expect(page.locator("#plan")).to_contain_text("max_seq_length")
            page.screenshot(path=picture, animations="disabled")
            with pool(Path(folder)) as (of_several, path):
                page.goto(str(of_several.base_url).rstrip("/") + path)
                expect(page.get_by_text("Load stops chat.")).to_be_visible()
                expect(page.locator("#activity tbody tr")).to_have_count(5)
                expect(page.locator("#live path[d*=L]").first).to_be_attached()
                page.screenshot(path=of_pool, animations="disabled")
                page.goto("about:blank")  # its streams end before the service
            browser.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
