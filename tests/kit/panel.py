"""The panel in a real Chromium: its console, its errors and its requests are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Page, Request, expect

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
PHONE = (360, 780)
DESKTOP = (1440, 900)
Start = Callable[..., httpx.Client]
Open = Callable[..., "Panel"]

expect.set_options(timeout=15_000)


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
