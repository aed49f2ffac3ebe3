"""The panel in a real Chromium, with its console, errors and requests recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Page, Request, expect

from tests.kit.sentences import sentence

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
        errors: Errors and warnings of its console, and exceptions.
        hosts: The hosts it has sent requests to.
    """

    def __init__(self, page: Page, base_url: str) -> None:
        self.page = page
        self.base_url = base_url
        self.sent: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: self._record_message(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._record_request)

    def _record_message(self, kind: str, text: str) -> None:
        # Chromium itself reports every answer with an error status
        if kind in {"error", "warning"} and not text.startswith("Failed to load resource"):
            self.errors.append(text)

    def _record_request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme != "data":
            self.hosts.add(url.netloc)
        if url.path.endswith("/load") and request.method == "POST":
            self.sent.append(request.post_data_json or {})

    def open(self, path: str = "/") -> Panel:
        self.page.goto(f"{self.base_url.rstrip('/')}{path}")
        return self

    def until_live(self) -> Panel:
        expect(self.page.locator("#link")).to_have_text("live")
        return self

    def expect_state(self, state: str) -> None:
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

    def expect_text(self, selector: str, text: str) -> None:
        expect(self.page.locator(selector)).to_contain_text(text)

    def expect_sentence(self, selector: str, key: str, **values: object) -> None:
        """Wait for a sentence of tests/sentences.txt."""
        self.expect_text(selector, sentence(key, **values))
