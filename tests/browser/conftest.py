"""A real Chromium on a real uvicorn. Every page is watched: its console, its errors, its requests.

A page that is closed must not have run into its own content security policy, thrown, or asked
another host for anything.
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
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)
from tests.kit.http import serving
from tests.kit.panel import DESKTOP, FLAGS, Open, Panel, Start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "no chromium: `apt-get install chromium`, or leave these out by -m 'not browser'"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def start(state_dir: Path) -> Iterator[Start]:
    """Start a backend that runs until its panels have been closed."""
    with contextlib.ExitStack() as running:

        def starting(llama_server: str = "embedded", **options: Any) -> httpx.Client:
            app = create_app(llama_server=llama_server, state_dir=state_dir, **options)
            return running.enter_context(serving(app))

        yield starting


@pytest.fixture
def panel(start: Start, chromium: Browser) -> Iterator[Open]:
    """Open the panel of a backend."""
    opened: list[Panel] = []

    def opening(
        client: httpx.Client, *, size: tuple[int, int] = DESKTOP, scheme: Any = "light"
    ) -> Panel:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        opened.append(Panel(context.new_page(), str(client.base_url)))
        return opened[-1].open()

    yield opening
    for one in opened:
        one.page.context.close()
        assert not one.wrong, one.wrong
        assert one.hosts == {urlsplit(one.base_url).netloc}
