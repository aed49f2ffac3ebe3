"""The panel of a pool: all models at a glance, and the page of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.test_panel import violations
from tests.kit.panel import DESKTOP, PHONE, Open, Start
from tests.kit.pools import MODELS, catalogue_of, model, until_model
from tests.kit.sentences import sentence

WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


@pytest.fixture
def catalogue(tiny_model: str, other_model: str) -> dict[str, Any]:
    """Room for 1 GiB: `second` only in place of `chat`, and `large` never."""
    files = {"chat": tiny_model, "second": other_model, "large": other_model, "vectors": tiny_model}
    return catalogue_of(
        files,
        chat={"memory": "700 MiB", "aliases": ["gpt-4o-mini"]},
        second={"memory": "600 MiB"},
        large={"memory": "2 GiB"},
        vectors={"kind": "embedding", "pooling": "mean"},
    )


def test_who_knows_only_labels_loads_a_model_talks_to_it_and_learns_why_another_does_not_fit(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any]
) -> None:
    page = open_panel(start_pool(catalogue)).until_live().page
    page.get_by_role("button", name="Load chat").click()
    expect(row(page, "chat")).to_contain_text("ready Healthy")
    expect(row(page, "large")).to_contain_text(
        sentence("panel.pool.too_large", need="2.0 GiB", device="Host", budget="1.0 GiB")
    )
    expect(row(page, "second")).to_contain_text(sentence("panel.pool.evicts", names="chat"))
    page.get_by_role("link", name="chat", exact=True).click()
    page.get_by_text("System prompt and temperature").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status").filter(has_text="tokens/s")).to_contain_text("first token")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_label("Answers")).to_contain_text("Hello")
    page.get_by_role("link", name="All models").click()
    expect(row(page, "chat")).to_contain_text("ready Healthy")


def test_budget_shows_what_each_model_holds(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any]
) -> None:
    client = start_pool(catalogue)
    page = open_panel(client).until_live().page
    bar = page.locator("#budget").get_by_role("img")
    expect(bar).to_have_attribute("aria-label", "Host: nothing is reserved")
    client.post(f"{MODELS}/vectors/load")
    expect(bar).to_have_attribute("aria-label", "Host: vectors 100 MiB")
    expect(page.locator("#budget")).to_contain_text("100 MiB of 1.0 GiB reserved, 924 MiB free")
    page.get_by_role("button", name="Unload vectors").click()
    expect(bar).to_have_attribute("aria-label", "Host: nothing is reserved")
    assert model(client, "vectors")["state"] == "Idle"


def test_pin_keeps_a_model_and_says_so_where_another_does_not_fit(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any]
) -> None:
    client = start_pool(catalogue)
    page = open_panel(client).until_live().page
    client.post(f"{MODELS}/chat/load")
    pin = page.get_by_role("button", name="Pin chat")
    expect(pin).to_have_attribute("aria-pressed", "false")
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "true")
    assert model(client, "chat")["pinned"]
    expect(row(page, "second")).to_contain_text("700 MiB are held by pinned models (chat)")
    page.get_by_role("button", name="Load second").click()
    expect(row(page, "second").locator(".wrong")).to_contain_text("second needs 600 MiB")
    assert model(client, "chat")["state"] == "Healthy"
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Load second").click()
    until_model(client, "second", lambda one: one["state"] == "Healthy")
    assert model(client, "chat")["state"] == "Idle"


def test_failed_start_is_told_in_the_row_and_on_the_page_of_the_model(
    start_pool: Start, open_panel: Open, tiny_model: str
) -> None:
    broken = {"llama_extra_args": ["--top-k", "bogus"]}
    client = start_pool(catalogue_of({"a.b-1": tiny_model}, **{"a.b-1": broken}))
    page = open_panel(client).until_live().page
    page.get_by_role("button", name="Load a.b-1").click()
    expect(row(page, "a.b-1")).to_contain_text("failed Idle")
    expect(row(page, "a.b-1").locator(".wrong")).to_contain_text("--top-k")
    page.get_by_role("link", name="a.b-1", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="server_start_failed")).to_be_visible()
    expect(page.get_by_role("button", name="Load again", exact=True)).to_be_visible()
    expect(page.locator("#log .cause")).to_contain_text('"--top-k"')


def test_page_of_a_model_loads_cancels_and_unloads_it(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any]
) -> None:
    """The settings are the catalogue's: there is nothing to fill in."""
    client = start_pool(catalogue)
    client.post(f"{MODELS}/chat/load")
    panel = open_panel(client, "/model?name=second").until_live()
    page = panel.page
    expect(page.locator("#model_path")).to_be_hidden()
    expect(page.locator("#plan")).to_contain_text("It stops chat.")
    page.get_by_role("button", name="Load", exact=True).click()
    panel.expect_state("Healthy")
    expect(page.locator("#sent")).to_contain_text("is Healthy")
    page.get_by_role("button", name="Unload").click()
    panel.expect_state("Idle")
    assert model(client, "chat")["state"] == "Idle"


def test_vectors_and_documents_can_be_tried(
    start_pool: Start, open_panel: Open, tiny_model: str
) -> None:
    kinds = {
        "vectors": {"kind": "embedding", "pooling": "mean"},
        "order": {"kind": "rerank", "pooling": "rank"},
    }
    client = start_pool(catalogue_of(dict.fromkeys(kinds, tiny_model), **kinds))
    client.post(f"{MODELS}/vectors/load")
    page = open_panel(client, "/model?name=vectors").until_live().page
    page.get_by_label("Texts").fill("one\ntwo")
    page.get_by_role("button", name="Embed").click()
    cells = page.locator("#talk tbody tr")
    expect(cells).to_have_count(2)
    expect(cells.nth(0)).to_contain_text("1.000")
    expect(cells.nth(1)).to_contain_text("64 numbers")
    client.post(f"{MODELS}/order/load")
    page.goto(f"{client.base_url}/model?name=order")
    page.get_by_label("Query").fill("a city")
    page.get_by_label("Documents").fill("first\nsecond")
    page.get_by_role("button", name="Rank").click()
    expect(cells).to_have_count(2)
    scores = [float(text) for text in page.locator("#talk td:last-child").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)


def test_model_is_added_by_its_path(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any], tiny_model: str
) -> None:
    client = start_pool(catalogue)
    page = open_panel(client).until_live().page
    page.get_by_text("Add a model", exact=True).click()
    page.get_by_label("Name", exact=True).fill("chat")
    page.get_by_label("Model", exact=True).fill(tiny_model)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#add-error")).to_contain_text("already the name of a model")
    page.get_by_label("Name", exact=True).fill("new")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(row(page, "new")).to_be_visible()
    assert model(client, "new")["kind"] == "chat"


def test_key_that_may_only_read_is_offered_nothing_else(
    start_pool: Start, open_panel: Open, catalogue: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "ann.key").write_text("s3cret-of-ann")
    catalogue["keys"] = {"ann": {"key_file": str(tmp_path / "ann.key"), "models": ["chat"]}}
    panel = open_panel(start_pool(catalogue))
    panel.page.get_by_label("API key").fill("s3cret-of-ann")
    panel.page.keyboard.press("Enter")
    panel.until_live()
    expect(row(panel.page, "chat")).to_be_visible()
    expect(panel.page.get_by_role("link", name="second", exact=True)).to_be_hidden()
    expect(panel.page.get_by_role("button", name="Load chat")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, (1024, 768), DESKTOP], ids=["phone", "tablet", "desktop"])
def test_pool_is_accessible_and_fits(
    start_pool: Start,
    open_panel: Open,
    catalogue: dict[str, Any],
    size: tuple[int, int],
    scheme: str,
) -> None:
    """With models ready, pinned, failed and at rest, and everything unfolded."""
    catalogue["models"]["vectors"]["pinned"] = True
    catalogue["models"]["broken"] = {
        **catalogue["models"]["vectors"],
        "llama_extra_args": ["--top-k", "bogus"],
    }
    client = start_pool(catalogue)
    for name in ("chat", "vectors", "broken"):
        client.post(f"{MODELS}/{name}/load")
    page = open_panel(client, size=size, scheme=scheme).until_live().page
    expect(row(page, "broken")).to_contain_text("failed")
    expect(row(page, "large")).to_contain_text("Does not fit")
    for path in ("", "model?name=chat", "model?name=broken"):
        if path:
            page.goto(str(client.base_url) + "/" + path)
            expect(page.locator("#link")).to_have_text("live")
        page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        expect(page.get_by_text("Looking …")).to_have_count(0)
        assert not violations(page)
        assert page.evaluate(WIDE) == 0
