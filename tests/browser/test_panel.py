"""The panel as a person meets it: what it says, what it sends, and what becomes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from orchestrator import RestartPolicy
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.http import create_app
from tests.kit.fake_hub import Hub, Repo
from tests.kit.http import PREFIX, Gate, is_held, serving, until
from tests.kit.panel import DESKTOP, PHONE, Open, Start
from tests.kit.process.servers import servers_of


def loads(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(PREFIX + "/loads").json()["loads"]
    return found


# ---------------------------------------------------------------------------------------- apply


def test_ten_rapid_applies_leave_one_server_with_the_last_settings(
    start: Start, panel: Open, tiny_model: str, state_dir: Path
) -> None:
    """Apply is never disabled: every click is a load of its own, and the last one wins."""
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", tiny_model)
    contexts = [str(256 + 32 * n) for n in range(10)]
    for context in contexts:
        shown.apply(max_seq_length=context)
    settled = until(
        client, lambda s: s["loaded"] and s["loaded"]["requested_context_length"] == 544
    )
    shown.shows("Healthy")
    expect(shown.page.locator("#facts")).to_contain_text("asked: 544")
    assert [body["max_seq_length"] for body in shown.sent] == [int(c) for c in contexts]
    assert len({body["load_request_id"] for body in shown.sent}) == 10
    assert len(servers_of(state_dir)) == 1, settled
    became = {load["outcome"].get("category", "loaded") for load in loads(client)}
    assert became <= {"loaded", "superseded"}
    expect(shown.page.locator("#error")).to_be_empty()
    expect(shown.page.locator("#sent")).to_contain_text("is Healthy")


def test_it_says_what_apply_would_do_and_why(start: Start, panel: Open, tiny_model: str) -> None:
    client = start()
    shown = panel(client).is_live()
    shown.plan_says("Name a model")
    shown.page.fill("#model_path", tiny_model)
    shown.plan_says("Load")
    shown.page.click("#apply")
    shown.shows("Healthy")
    shown.plan_says("Nothing to do: this runs already.")
    shown.page.fill("#max_seq_length", "512")
    shown.plan_says("max_seq_length 0 → 512")
    shown.page.get_by_text("Command line").click()
    expect(shown.page.locator("#argv")).to_contain_text("-c 512")
    shown.page.click("#match")
    expect(shown.page.locator("#max_seq_length")).to_have_value("0")
    shown.plan_says("Nothing to do: this runs already.")


def test_apply_needs_no_mouse(start: Start, panel: Open, tiny_model: str) -> None:
    """Also the tri-state of the extra arguments is reached and changed by keys alone."""
    client = start()
    page = panel(client).is_live().page
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            if page.evaluate("document.activeElement.id || document.activeElement.name") == name:
                return
            keys.press("Tab")
        pytest.fail(f"no way by Tab to {name}")

    tab_to("model_path")
    keys.type(tiny_model)
    tab_to("llama_extra_args")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    tab_to("extra-text")
    keys.type("--top-k 7")
    tab_to("apply")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    expect(page.locator("#state")).to_have_text("Healthy")
    loaded = client.get(PREFIX + "/status").json()["loaded"]
    assert loaded["llama_extra_args"] == ["--top-k", "7"]


# ----------------------------------------------------------------------------------- the settings


def test_a_manual_drafting_mode_survives_the_round_trip(
    start: Start, panel: Open, tiny_model: str
) -> None:
    """It is shown as itself, and what is sent back means the same."""
    flags = ["--spec-type", "ngram-simple,ngram-mod"]
    client = start()
    body = {"model_path": tiny_model, "llama_extra_args": flags}
    first = client.post(PREFIX + "/load", json=body).json()
    assert first["speculative_type"] == "ngram-simple,ngram-mod"
    shown = panel(client).is_live()
    mode = shown.page.locator("#speculative_type")
    expect(mode).to_have_value("ngram-simple,ngram-mod")
    expect(mode.locator("option:checked")).to_have_text("ngram-simple,ngram-mod (manual)")
    shown.plan_says("Nothing to do: this runs already.")
    shown.page.click("#apply")
    expect(shown.page.locator("#sent")).to_have_text("Generation 1 runs already.")
    assert client.get(PREFIX + "/status").json()["loaded"]["pid"] == first["pid"]
    shown.apply(max_seq_length="512")
    until(client, lambda s: s["loaded"] and s["loaded"]["requested_context_length"] == 512)
    second = client.get(PREFIX + "/status").json()["loaded"]
    assert second["llama_extra_args"] == flags
    assert second["speculative_type"] == "ngram-simple,ngram-mod"
    assert shown.sent[-1]["speculative_type"] == "ngram-simple,ngram-mod"
    assert "llama_extra_args" not in shown.sent[-1]


def test_inherit_none_and_set_are_three_things(start: Start, panel: Open, tiny_model: str) -> None:
    """Quoting is a shell's; what is shown of what runs can be set again unchanged."""
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", tiny_model)
    shown.set_extra("--top-k 7  --alias-of-mine\\ x 'it''s' \"a \\\"b\\\"\"\n")
    shown.page.click("#apply")
    expect(shown.page.locator("#error")).to_contain_text("--alias-of-mine x")
    assert shown.sent[-1]["llama_extra_args"] == [
        *("--top-k", "7", "--alias-of-mine x", "its", 'a "b"')
    ]
    shown.set_extra("--top-k 7")
    shown.page.click("#apply")
    shown.shows("Healthy")
    shown.choose_extra("Inherit")
    expect(shown.page.locator("#extra-hint")).to_contain_text("Now: --top-k 7")
    shown.plan_says("Nothing to do")
    shown.choose_extra("None")
    shown.plan_says("llama_extra_args")
    shown.page.click("#apply")
    until(client, lambda s: s["loaded"] and s["loaded"]["llama_extra_args"] == [])
    assert shown.sent[-1]["llama_extra_args"] == []


def test_the_variants_of_a_folder_are_offered_with_their_sizes(
    start: Start, panel: Open, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    for seed, label in enumerate(("Q4_K_M", "Q8_0")):
        write_tiny_model(tmp_path / "models" / f"tiny-{label}.gguf", seed=seed)
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", str(tmp_path / "models"))
    shown.page.keyboard.press("Tab")
    expect(shown.page.locator("#gguf_variant option")).to_have_text(
        ["Auto (Q4_K_M)", "Q4_K_M · 470 KB · on disk", "Q8_0 · 470 KB · on disk"]
    )
    shown.page.select_option("#gguf_variant", "Q8_0")
    shown.page.click("#apply")
    shown.shows("Healthy")
    expect(shown.page.locator("#model")).to_contain_text("Q8_0")


# -------------------------------------------------------------------------------------- the machine


def test_the_picture_shows_where_it_is_and_how_it_came_there(
    start: Start, panel: Open, tiny_model: str
) -> None:
    """Also of a load that was before this page; in the colours the policy would have kept out."""
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    page = panel(client).is_live().page
    expect(page.locator("#diagram .current")).to_have_id("state-Healthy")
    expect(page.locator("#diagram .traced")).to_have_count(5)
    fill = "getComputedStyle(document.querySelector('#state-Healthy rect')).fill"
    assert page.evaluate(fill) == "rgb(9, 105, 218)"
    page.click("#unload")
    expect(page.locator("#diagram .current")).to_have_id("state-Idle")
    expect(page.locator("#diagram .traced")).to_have_count(2)


def test_a_load_is_cancelled_while_the_server_starts(
    start: Start, panel: Open, gate: Gate, tiny_model: str, state_dir: Path
) -> None:
    client = start(gate.binary)
    shown = panel(client).is_live()
    expect(shown.page.locator("#cancel")).to_be_hidden()
    shown.apply(model_path=tiny_model)
    shown.shows("WaitingHealth")
    until(client, is_held)
    shown.page.click("#cancel")
    shown.shows("Idle")
    expect(shown.page.locator("#sent")).to_have_text("Generation 1 was cancelled.")
    expect(shown.page.locator("#error")).to_be_empty()
    assert not servers_of(state_dir)


def test_a_load_is_cancelled_while_it_downloads(
    start: Start, panel: Open, hub: Hub, tmp_path: Path
) -> None:
    """With the bytes that are there, and what is still to come, shown meanwhile."""
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big, "mmproj-F16.gguf": b"no model"}))
    hub.fail(bytes_per_s=1 << 20, path="/cdn/")
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", "org/Tiny-GGUF")
    shown.page.keyboard.press("Tab")
    options = shown.page.locator("#gguf_variant option")
    expect(options).to_have_text(["Auto (Q8_0)", re.compile(r"^Q8_0 · 6\.\d MB$")])
    shown.plan_says("after a download of")
    shown.page.click("#apply")
    shown.shows("Downloading")
    expect(shown.page.locator("#progress-text")).to_contain_text(
        re.compile(r"Downloading · .* of 6\.\d MB · .*/s · .* left")
    )
    shown.page.click("#cancel")
    shown.shows("Idle")
    expect(shown.page.locator("#sent")).to_have_text("Generation 1 was cancelled.")
    assert loads(client)[0]["outcome"]["category"] == "cancelled"


def test_a_model_is_downloaded_while_another_runs_until_that_is_cancelled(
    start: Start, panel: Open, hub: Hub, tmp_path: Path, tiny_model: str
) -> None:
    """It is a load like any other, shown with its rate, and what runs stays on the page."""
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big}))
    hub.fail(bytes_per_s=1 << 20, path="/cdn/")
    client = start()
    pid = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()["pid"]
    shown = panel(client).is_live()
    shown.page.get_by_text("More").click()
    shown.page.get_by_label("Download first").check()
    shown.apply(model_path="org/Tiny-GGUF")
    expect(shown.page.locator("#notes")).to_contain_text("org/Tiny-GGUF is being fetched")
    expect(shown.page.locator("#progress-text")).to_contain_text("Downloading · ")
    shown.shows("Healthy")
    shown.page.click("#cancel")
    expect(shown.page.locator("#sent")).to_have_text("Generation 2 was cancelled.")
    status = until(client, lambda s: not s["loading"])
    assert status["loaded"]["pid"] == pid
    expect(shown.page.locator("#notes")).to_be_empty()
    expect(shown.page.locator("#cancel")).to_be_hidden()


def test_a_server_that_ended_by_itself_is_told_with_what_is_done_about_it(
    start: Start, panel: Open, tiny_model: str
) -> None:
    client = start(restart=RestartPolicy(backoff_s=1.0, limit=1, cool_down_s=60))
    loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
    shown = panel(client).is_live()
    shown.shows("Healthy")
    psutil.Process(loaded["pid"]).kill()
    notes = shown.page.locator("#notes")
    expect(notes).to_contain_text("ended by itself (1 in a row) and starts again in")
    shown.shows("Healthy")
    expect(notes).to_be_empty()
    psutil.Process(client.get(PREFIX + "/status").json()["loaded"]["pid"]).kill()
    expect(notes).to_contain_text("cools down for")


def test_the_last_loads_are_told_with_what_became_of_them(
    start: Start, panel: Open, tiny_model: str
) -> None:
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    bad = {"model_path": tiny_model, "llama_extra_args": ["--nope"]}
    client.post(PREFIX + "/load", json=bad)
    page = panel(client).is_live().page
    rows = page.locator("#loads li")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("server start failed")
    expect(rows.nth(1)).to_contain_text("loaded")
    expect(rows.nth(1).locator(".bar i")).to_have_count(4)
    rows.nth(0).get_by_text("What happened").click()
    expect(rows.nth(0)).to_contain_text("does not know --nope")


# --------------------------------------------------------------------------------------- failures


def test_the_error_of_a_failed_start_is_readable_and_leads_to_its_field(
    start: Start, panel: Open, tiny_model: str
) -> None:
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", tiny_model)
    shown.set_extra("--nope")
    shown.page.click("#apply")
    alert = shown.page.get_by_role("alert").filter(has_text="The server did not start")
    expect(alert).to_contain_text("this llama-server does not know --nope: remove it")
    expect(alert).to_contain_text("error: invalid argument: --nope")
    expect(alert).to_contain_text("Last lines of its output")
    alert.get_by_role("button", name="Go to “Extra arguments”").click()
    expect(shown.page.locator("#extra-text")).to_be_focused()
    alert.get_by_text("Story").click()
    expect(alert).to_contain_text("WaitingHealth -> Killing on not_ready")
    expect(shown.page.locator("#sent")).to_have_text("Generation 1 failed.")


@pytest.mark.parametrize(
    ("fields", "extra", "field", "said"),
    [
        ({"max_seq_length": "many"}, "", "max_seq_length", "max_seq_length must be"),
        ({}, "--port 1", "extra-text", "--port is refused"),
        ({}, "'open", "extra-text", "a ' is not closed"),
        ({"model_path": "/no/<b>such</b>"}, "", "model_path", "/no/<b>such</b> does not exist"),
    ],
)
def test_what_is_refused_is_said_beside_its_field(
    start: Start,
    panel: Open,
    tiny_model: str,
    fields: dict[str, str],
    extra: str,
    field: str,
    said: str,
) -> None:
    """Before anything is asked for, and again by Apply, which puts the cursor there."""
    client = start()
    shown = panel(client).is_live()
    shown.page.fill("#model_path", tiny_model)
    if extra:
        shown.set_extra(extra)
    for name, text in fields.items():
        shown.page.fill(f"#{name}", text)
    shown.plan_says(said)
    expect(shown.page.locator("#field-error")).to_contain_text(said)
    expect(shown.page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    shown.page.click("#apply")
    expect(shown.page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    expect(shown.page.locator(f"#{field}")).to_be_focused()
    shown.shows("Idle")


def test_it_comes_back_by_itself_after_the_backend_was_restarted(
    panel: Open, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    """With what is true then: the events of the new backend have smaller numbers."""
    with serving(create_app(llama_server="embedded", state_dir=state_dir)) as client:
        shown = panel(client).is_live()
        for model in (other_model, tiny_model):
            client.post(PREFIX + "/load", json={"model_path": model})
        shown.shows("Healthy")
        port = client.base_url.port or 0
    expect(shown.page.locator("#link")).to_have_text("reconnecting …")
    app = create_app(llama_server="embedded", state_dir=state_dir)
    with serving(app, port) as client:
        client.post(PREFIX + "/load", json={"model_path": other_model, "max_seq_length": 640})
        shown.is_live()
        expect(shown.page.locator("#facts")).to_contain_text("asked: 640")
        expect(shown.page.locator("#loads li")).to_have_count(1)
        client.post(PREFIX + "/unload")
        shown.shows("Idle")


def test_a_key_is_asked_for_and_kept_in_this_tab_only(
    start: Start, panel: Open, tiny_model: str
) -> None:
    client = start(api_keys=["s3cret"])
    shown = panel(client)
    field = shown.page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(shown.page.locator("#link")).to_have_text("locked")
    for key, said in (("wrong", "That key was not accepted."), ("s3cret", "")):
        field.fill(key)
        shown.page.keyboard.press("Enter")
        if said:
            expect(shown.page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    shown.is_live()
    expect(field).to_be_hidden()
    shown.apply(model_path=tiny_model)
    shown.shows("Healthy")
    assert shown.page.evaluate("Object.values(sessionStorage)") == ["s3cret"]
    assert shown.page.evaluate("localStorage.length + document.cookie.length") == 0
    expect(panel(client).page.get_by_label("API key")).to_be_visible()


# ----------------------------------------------------------------------------------- for everybody


def violations(page: Page) -> str:
    """What axe objects to, in words."""
    found = Axe().run(page)
    return str(found.generate_report()) if found.violations_count else ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_is_accessible_and_fits(
    start: Start, panel: Open, tiny_model: str, size: tuple[int, int], scheme: str
) -> None:
    """Idle, with everything unfolded; Healthy; and after a failure."""
    client = start()
    page = panel(client, size=size, scheme=scheme).is_live().page
    for state, extra in (("Idle", None), ("Healthy", []), ("Idle", ["--nope"])):
        if extra is not None:
            body = {"model_path": tiny_model, "llama_extra_args": extra}
            client.post(PREFIX + "/load", json=body)
        expect(page.locator("#state")).to_have_text(state)
        expect(page.locator("#diagram .current")).to_have_id(f"state-{state}")
        if extra:
            expect(page.locator("#error")).to_contain_text("--nope")
        page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        assert not violations(page)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0


# ------------------------------------------------------------------------------- the list of routes


def test_the_list_of_routes_needs_no_other_host_and_can_be_tried(
    start: Start, chromium: Browser
) -> None:
    """A page of this origin may do all that its user may, so no script of somebody else runs in it;
    and a host without the internet has documentation, too.
    """
    client = start()
    context = chromium.new_context()
    page = context.new_page()
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.goto(f"{client.base_url}/docs")
    route = page.locator("#operations-inference-status_api_inference_status_get")
    route.click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    expect(route.locator(".live-responses-table")).to_contain_text('"state": "Idle"')
    context.close()
    assert {host for host in asked if host} == {urlsplit(str(client.base_url)).netloc}
