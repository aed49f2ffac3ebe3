"""A real Chromium on a real uvicorn. Every page is watched: its console, its errors, its requests.

A page that is closed must not have run into its own content security policy, thrown, or asked
another host for anything.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from orchestrator.http import create_app
from tests.http.conftest import gate, serving  # noqa: F401 (a fixture)
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
PHONE, DESKTOP = (360, 780), (1440, 900)
Start = Callable[..., httpx.Client]
Open = Callable[..., "Panel"]

expect.set_options(timeout=15_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)


class Panel:
    """The panel in a tab of its own.

    Attributes:
        sent: The bodies of its loads, in order.
        wrong: What it said on its console that no panel should.
        hosts: Whom it asked.
    """

    def __init__(self, page: Page, base_url: str) -> None:
        self.page = page
        self.base_url = base_url
        self.sent: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda said: self._hear(said.type, said.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._note)

    def _hear(self, kind: str, text: str) -> None:
        # an answer that is an error is told by the browser itself, wanted or not
        if kind in {"error", "warning"} and not text.startswith("Failed to load resource"):
            self.wrong.append(text)

    def _note(self, request: Request) -> None:
        where = urlsplit(request.url)
        if where.scheme != "data":
            self.hosts.add(where.netloc)
        if where.path.endswith("/load") and request.method == "POST":
            self.sent.append(request.post_data_json or {})

    def open(self) -> Panel:
        self.page.goto(self.base_url)
        return self

    def is_live(self) -> Panel:
        expect(self.page.locator("#link")).to_have_text("live")
        return self

    def shows(self, state: str) -> None:
        expect(self.page.locator("#state")).to_have_text(state)

    def apply(self, **fields: str) -> None:
        for name, text in fields.items():
            self.page.fill(f"#{name}", text)
        self.page.click("#apply")

    def set_extra(self, text: str) -> None:
        self.choose_extra("Set")
        self.page.fill("#extra-text", text)

    def choose_extra(self, name: str) -> None:
        self.page.get_by_role("radio", name=name).check()

    def plan_says(self, text: str) -> None:
        expect(self.page.locator("#plan")).to_contain_text(text)


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
