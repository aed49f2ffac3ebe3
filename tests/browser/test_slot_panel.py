"""The page of one slot: the steps of a load, loads again, the output, and what can be tried."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from orchestrator import RestartPolicy
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.http import create_app
from tests.browser.test_panel import violations
from tests.kit.fake_hub import Hub, Repo
from tests.kit.http import PREFIX, Gate, is_at_gate, serving, until, using_the_server
from tests.kit.panel import PHONE, Open, Panel, Start

BAD = ["--seed", "bogus"]


def _is_another(pid: int, status: dict[str, Any]) -> bool:
    return not status["loaded"] or status["loaded"]["pid"] != pid


def step(page: Page, name: str) -> str:
    """Return the text of a step of the load."""
    return page.locator("#steps li").filter(has_text=name).inner_text()


# ----------------------------------------------------------------------------------- the steps


def test_steps_show_the_time_of_each_and_the_present_one_grows(
    start: Start, open_panel: Open, gate: Gate, tiny_model: str
) -> None:
    client = start(gate.binary)
    panel = open_panel(client).until_live()
    panel.apply(model_path=tiny_model)
    until(client, is_at_gate)
    current = panel.page.locator("#steps [aria-current=step]")
    expect(current).to_contain_text(re.compile(r"WaitingHealth\s*[1-9]\d* s"))
    bar = panel.page.locator("#loads .bar i").last
    expect(bar).to_have_class("health")
    width = "part => part.style.flexGrow"
    before = float(bar.evaluate(width))
    expect(panel.page.locator("#loads .took")).to_have_text(re.compile(r"[2-9] s"))
    assert float(bar.evaluate(width)) > before
    gate.open()
    panel.expect_state("Healthy")
    expect(current).to_contain_text("Healthy")
    for name in ("Killing", "Downloading", "Spawning", "WaitingHealth"):
        assert re.search(r"\d m?s", step(panel.page, name)), name


def test_adopted_server_is_marked(open_panel: Open, state_dir: Path, tiny_model: str) -> None:
    options: dict[str, Any] = {
        "llama_server": "embedded",
        "state_dir": state_dir,
        "on_host_exit": "keep",
    }
    with serving(create_app(**options)) as client:
        client.post(PREFIX + "/load", json={"model_path": tiny_model})
    with serving(create_app(**options)) as client:
        panel = open_panel(client).until_live()
        panel.expect_state("Healthy")
        expect(panel.page.locator("#steps .mark")).to_have_text("adopted")
        client.post(PREFIX + "/unload")
        panel.expect_state("Idle")
        panel.page.context.close()


def test_crash_is_marked_where_it_was_and_can_be_loaded_again(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start(restart=RestartPolicy(backoff_s=0.5, limit=1, cool_down_s=60))
    settings = {"model_path": tiny_model, "max_seq_length": 512}
    client.post(PREFIX + "/load", json=settings)
    panel = open_panel(client).until_live()
    for _ in range(2):
        panel.expect_state("Healthy")
        loaded = until(client, lambda s: s["loaded"])["loaded"]
        psutil.Process(loaded["pid"]).kill()
        until(client, partial(_is_another, loaded["pid"]))
    expect(panel.page.locator("#steps .mark")).to_have_text(["cools down", "exited"])
    expect(panel.page.locator("#max_seq_length")).to_have_value("512")
    panel.page.get_by_role("button", name="Load again", exact=True).click()
    panel.expect_state("Healthy")
    assert client.get(PREFIX + "/status").json()["loaded"]["requested_context_length"] == 512


def test_failed_load_is_red_where_it_failed_and_can_be_repeated(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    """The form has what failed, also on a page that is opened later."""
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    body = {"model_path": tiny_model, "llama_extra_args": BAD, "cache_type_kv": "q8_0"}
    client.post(PREFIX + "/load", json=body)
    panel = open_panel(client).until_live()
    page = panel.page
    failed = page.locator("#steps .failed")
    expect(failed).to_contain_text("WaitingHealth")
    expect(failed).to_contain_text("failed here")
    rows = page.locator("#loads li")
    expect(rows.nth(0).locator(".broke")).to_have_class("health broke")
    expect(rows.nth(1).locator(".broke")).to_have_count(0)
    expect(page.locator("#extra-text")).to_have_value("--seed bogus")
    expect(page.locator("#cache_type_kv")).to_have_value("q8_0")
    page.get_by_role("button", name="Load again", exact=True).click()
    expect(rows).to_have_count(3)
    assert panel.sent[-1]["llama_extra_args"] == BAD
    page.get_by_role("button", name="Load generation 1 again").click()
    panel.expect_state("Healthy")
    assert panel.sent[-1]["llama_extra_args"] == []
    assert "cache_type_kv" not in panel.sent[-1]


def test_draining_says_for_whom_it_waits(start: Start, open_panel: Open, tiny_model: str) -> None:
    client = start(drain_timeout_s=600)
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    panel = open_panel(client).until_live()
    with using_the_server(str(client.base_url)):
        panel.page.get_by_role("button", name="Unload").click()
        panel.expect_state("Killing")
        expect(panel.page.locator("#notes")).to_contain_text(
            re.compile(r"Waits for 1 request of this server, (9|10) min \d+ s at most")
        )
        panel.page.get_by_role("button", name="Cut now").click()
        panel.expect_state("Idle")


# ---------------------------------------------------------------------------------- the output


def test_output_marks_the_cause_and_is_filtered_copied_and_saved(
    start: Start, open_panel: Open, tiny_model: str, tmp_path: Path
) -> None:
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    panel = open_panel(client).until_live()
    page, log = panel.page, panel.page.locator("#log")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(log.locator(".divider")).to_have_text(["generation 1"])
    expect(log).to_contain_text("listening on")
    at_end = "log => log.scrollTop + log.clientHeight >= log.scrollHeight - 8"
    assert log.evaluate(at_end)
    client.post(PREFIX + "/load", json={"model_path": tiny_model, "llama_extra_args": BAD})
    expect(log.locator(".divider")).to_have_text(["generation 1", "generation 2"])
    expect(log.locator(".cause")).to_have_text(re.compile('handling argument "--seed"'))
    page.get_by_label("Show only lines with").fill("listening ON")
    expect(log.locator("li:visible")).to_have_count(3)
    page.locator("#log-copy").click()
    expect(page.locator("#announce")).to_have_text("The output is copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert [line[:4] for line in copied.splitlines()][::2] == ["----", "----"]
    assert "listening on" in copied.splitlines()[1]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download", exact=True).click()
    saved.value.save_as(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == copied + "\n"


# ---------------------------------------------------------------------------- finding and trying


def test_model_is_found_on_disk_and_on_the_hub(
    start: Start, open_panel: Open, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    write_tiny_model(tmp_path / "models" / "mine.gguf")
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=3 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big, "tiny-Q4_K_M.gguf": big}))
    client = start(models_dir=tmp_path / "models")
    panel = open_panel(client).until_live()
    page = panel.page
    page.get_by_text("Find a model").click()
    mine = page.get_by_role("listitem").filter(has_text="mine.gguf")
    expect(mine).to_contain_text("470 KB · folder · used")
    expect(page.locator(".find .hint")).to_contain_text(re.compile(r"Free: Host .*, disk .*B\."))
    search = page.get_by_label("or a Hub repo (owner/name)")
    search.fill("org/Tiny-GGUF")
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem").filter(has_text="Q8_0")).to_contain_text("to be downloaded")
    page.get_by_role("button", name="Q8_0").click()
    expect(page.locator("#model_path")).to_have_value("org/Tiny-GGUF:Q8_0")
    search.fill("mine")
    mine.get_by_role("button").click()
    expect(page.locator("#model_path")).to_have_value("mine.gguf")
    page.click("#apply")
    panel.expect_state("Healthy")


def test_download_only_leaves_the_running_model(
    start: Start, open_panel: Open, hub: Hub, tmp_path: Path, tiny_model: str
) -> None:
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=1 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big}))
    client = start()
    panel = open_panel(client).until_live()
    button = panel.page.get_by_role("button", name="Download only")
    panel.page.fill("#model_path", "org/Tiny-GGUF")
    panel.page.keyboard.press("Tab")
    expect(panel.page.locator("#plan")).to_contain_text("after a download")
    expect(button).to_be_hidden()
    pid = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()["pid"]
    button.click()
    expect(panel.page.locator("#sent")).to_have_text("org/Tiny-GGUF is on disk.")
    assert client.get(PREFIX + "/status").json()["loaded"]["pid"] == pid
    assert not panel.sent


def test_chat_streams_and_is_stopped(start: Start, open_panel: Open, tiny_model: str) -> None:
    """The model gets the conversation so far, and nothing of it stays when the page is left."""
    client = start()
    panel = open_panel(client).until_live()
    page = panel.page
    expect(page.get_by_role("heading", name="Try it")).to_be_hidden()
    client.post(PREFIX + "/load", json={"model_path": tiny_model, "max_seq_length": 4096})
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    answer = page.locator("#talk .answer")
    expect(answer).not_to_be_empty()
    page.locator("#stop").dispatch_event("click")  # at once, while it is written
    expect(page.locator("#try-about")).to_have_text(re.compile("Stopped|tokens/s"))
    until(client, lambda status: not status["leases"])
    page.get_by_label("Message").fill("And then?")
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    sent: dict[str, Any] = request.value.post_data_json or {}
    said = [one["role"] for one in sent["messages"]]
    assert said == ["user", "assistant", "user"]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#talk")).to_be_empty()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0


def test_requests_are_shown_with_their_figures(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    client.post("/v1/chat/completions", json=body)
    client.post("/v1/embeddings", json={"input": "x"})
    page = open_panel(client).until_live().page
    rows = page.locator("#activity tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("embeddings")
    expect(rows.nth(0)).to_contain_text("400")
    expect(rows.nth(1)).to_contain_text("chat/completions")
    page.get_by_label("Show only requests with").fill("chat")
    expect(rows).to_have_count(1)
    figures = page.locator("#live .figure")
    expect(figures.filter(has_text="In flight").locator("strong")).to_have_text("0")
    expect(figures.filter(has_text="Free memory").locator("strong")).to_have_text(
        re.compile(r"\d (M|G)iB")
    )
    line = figures.filter(has_text="Free memory").get_by_role("img")
    expect(line).to_have_attribute("aria-label", re.compile(r"at most \d+ (M|G)iB"))


# ------------------------------------------------------------------------------------- every state


def test_page_at_rest_requests_little(start: Start, open_panel: Open, tiny_model: str) -> None:
    """Many open panels cost the service next to nothing."""
    client = start()
    assert client.post(PREFIX + "/load", json={"model_path": tiny_model}).status_code == 200
    panel = open_panel(client)
    page = panel.page
    page.clock.install()
    page.reload()
    panel.until_live().expect_state("Healthy")
    expect(page.locator("#plan")).to_contain_text("Nothing to do")
    sent: list[str] = []
    begun = page.evaluate("Date.now()")  # this clock runs by itself, too
    page.on("request", lambda request: sent.append(request.url))
    for _ in range(60):
        page.clock.run_for(1000)
    minutes = (page.evaluate("Date.now()") - begun) / 60_000
    assert len(sent) <= 6 * minutes + 3, [url.rpartition("/")[2] for url in sent]
    assert any("usage" in url for url in sent)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible_while_it_loads_drains_and_is_cut_off(
    open_panel: Open, state_dir: Path, tiny_model: str, gate: Gate, scheme: str
) -> None:
    """And after an exit, and with an answer in the box."""
    options: dict[str, Any] = {"state_dir": state_dir, "restart": RestartPolicy(backoff_s=600)}
    with serving(create_app(llama_server=gate.binary, drain_timeout_s=600, **options)) as client:
        panel = open_panel(client, scheme=scheme, size=PHONE).until_live()
        panel.apply(model_path=tiny_model)
        panel.expect_state("WaitingHealth")
        _check(panel.page)
        gate.open()
        panel.expect_state("Healthy")
        panel.page.get_by_label("Message").fill("Hello")
        panel.page.get_by_role("button", name="Send").click()
        expect(panel.page.locator("#try-about")).to_contain_text("tokens/s")
        panel.page.locator("#stop").dispatch_event("click")  # it may have ended by itself
        _check(panel.page)
        with using_the_server(str(client.base_url)):
            panel.page.get_by_role("button", name="Unload").click()
            panel.expect_state("Killing")
            _check(panel.page)
            panel.page.get_by_role("button", name="Cut now").click()
        panel.expect_state("Idle")
        loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
        psutil.Process(loaded["pid"]).kill()
        expect(panel.page.get_by_role("alert").filter(has_text="server_exited")).to_be_visible()
        _check(panel.page)
    expect(panel.page.locator("#link")).to_have_text("reconnecting …")
    _check(panel.page)


def _check(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert not violations(page)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0


def test_touch_and_reduced_motion_are_respected(
    start: Start, chromium: Browser, tiny_model: str
) -> None:
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    context = chromium.new_context(
        viewport={"width": 390, "height": 800},
        has_touch=True,
        is_mobile=True,
        reduced_motion="reduce",
    )
    page = context.new_page()
    Panel(page, str(client.base_url)).open().until_live().expect_state("Healthy")
    heights = page.locator("button:visible, select:visible, summary:visible").evaluate_all(
        "all => all.map(one => [one.textContent, one.getBoundingClientRect().height])"
    )
    assert len(heights) > 8
    assert [one for one in heights if one[1] < 44] == []
    moving = "getComputedStyle(document.querySelector('#dot')).animationName"
    assert page.evaluate(moving) == "none"
    context.close()
