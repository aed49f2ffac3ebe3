"""A real Chromium on a real uvicorn.

No page may violate its own content security policy, throw, or send a request to another host.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from orchestrator.http import create_app
from tests.kit.http import serving
from tests.kit.panel import DESKTOP, FLAGS, Open, Panel, Start
from tests.kit.pools import serving_pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "no chromium: `apt-get install chromium`, or deselect with -m 'not browser'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def start(state_dir: Path) -> Iterator[Start]:
    """Start a backend, which ends after its panels are closed."""
    with contextlib.ExitStack() as running:

        def starting(llama_server: str = "embedded", **options: Any) -> httpx.Client:
            app = create_app(llama_server=llama_server, state_dir=state_dir, **options)
            return running.enter_context(serving(app))

        yield starting


@pytest.fixture
def start_pool(state_dir: Path) -> Iterator[Start]:
    """Start a pool, which ends after its panels are closed."""
    with contextlib.ExitStack() as running:

        def starting(catalogue: Any, **options: Any) -> httpx.Client:
            how = {"llama_server": "embedded", "state_dir": state_dir, **options}
            return running.enter_context(serving_pool(catalogue, **how))

        yield starting


@pytest.fixture
def open_panel(start: Start, start_pool: Start, chromium: Browser) -> Iterator[Open]:
    """Open the panel of a backend."""
    opened: list[Panel] = []

    def opening(
        client: httpx.Client,
        path: str = "/",
        *,
        size: tuple[int, int] = DESKTOP,
        scheme: Any = "light",
    ) -> Panel:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        opened.append(Panel(context.new_page(), str(client.base_url)))
        return opened[-1].open(path)

    yield opening
    for one in opened:
        one.page.context.close()
        assert not one.errors, one.errors
        assert one.hosts == {urlsplit(one.base_url).netloc}
