"""The panel as a user sees it: what it shows, and what it sends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, Route, expect

from orchestrator import RestartPolicy
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.http import create_app
from tests.kit.fake_hub import Hub, Repo
from tests.kit.http import PREFIX, Gate, is_at_gate, serving, until, using_the_server
from tests.kit.panel import DESKTOP, PHONE, Open, Panel, Start
from tests.kit.process.servers import servers_of


def loads(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(PREFIX + "/loads").json()["loads"]
    return found


# ---------------------------------------------------------------------------------------- apply


def test_ten_rapid_applies_leave_one_server_with_the_last_settings(
    start: Start, open_panel: Open, tiny_model: str, state_dir: Path
) -> None:
    """Apply is never disabled: every click is a load of its own, and the last one wins."""
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", tiny_model)
    contexts = [str(256 + 32 * n) for n in range(10)]
    for context in contexts:
        panel.apply(max_seq_length=context)
    settled = until(
        client, lambda s: s["loaded"] and s["loaded"]["requested_context_length"] == 544
    )
    panel.expect_state("Healthy")
    expect(panel.page.locator("#facts")).to_contain_text("requested: 544")
    assert [body["max_seq_length"] for body in panel.sent] == [int(c) for c in contexts]
    assert len({body["load_request_id"] for body in panel.sent}) == 10
    assert len(servers_of(state_dir)) == 1, settled
    outcomes = {load["outcome"].get("category", "loaded") for load in loads(client)}
    assert outcomes <= {"loaded", "superseded"}
    expect(panel.page.locator("#error")).to_be_empty()
    expect(panel.page.locator("#sent")).to_contain_text("is Healthy")


def test_plan_shows_what_apply_would_do_and_why(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start()
    panel = open_panel(client).until_live()
    panel.expect_sentence("#plan", "panel.plan.no_model")
    panel.page.fill("#model_path", tiny_model)
    panel.expect_text("#plan", "Load")
    panel.page.click("#apply")
    panel.expect_state("Healthy")
    panel.expect_sentence("#plan", "panel.plan.loaded")
    panel.page.fill("#max_seq_length", "512")
    panel.expect_text("#plan", "max_seq_length 0 → 512")
    panel.page.get_by_text("Command line").click()
    expect(panel.page.locator("#argv")).to_contain_text("-c 512")
    panel.page.click("#match")
    expect(panel.page.locator("#max_seq_length")).to_have_value("0")
    panel.expect_sentence("#plan", "panel.plan.loaded")


def test_form_can_be_used_by_keyboard(start: Start, open_panel: Open, tiny_model: str) -> None:
    """Even the three-way choice of the extra arguments."""
    client = start()
    page = open_panel(client).until_live().page
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            if page.evaluate("document.activeElement.id || document.activeElement.name") == name:
                return
            keys.press("Tab")
        pytest.fail(f"Tab does not reach {name}")

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


def test_manual_drafting_mode_survives_the_round_trip(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    """It is shown as it is, and means the same when it is sent back."""
    flags = ["--spec-type", "ngram-simple,ngram-mod"]
    client = start()
    body = {"model_path": tiny_model, "llama_extra_args": flags}
    first = client.post(PREFIX + "/load", json=body).json()
    assert first["speculative_type"] == "ngram-simple,ngram-mod"
    panel = open_panel(client).until_live()
    mode = panel.page.locator("#speculative_type")
    expect(mode).to_have_value("ngram-simple,ngram-mod")
    expect(mode.locator("option:checked")).to_have_text("ngram-simple,ngram-mod (manual)")
    panel.expect_sentence("#plan", "panel.plan.loaded")
    panel.page.click("#apply")
    panel.expect_sentence("#sent", "panel.sent.loaded_already", generation=1)
    assert client.get(PREFIX + "/status").json()["loaded"]["pid"] == first["pid"]
    panel.apply(max_seq_length="512")
    until(client, lambda s: s["loaded"] and s["loaded"]["requested_context_length"] == 512)
    second = client.get(PREFIX + "/status").json()["loaded"]
    assert second["llama_extra_args"] == flags
    assert second["speculative_type"] == "ngram-simple,ngram-mod"
    assert panel.sent[-1]["speculative_type"] == "ngram-simple,ngram-mod"
    assert "llama_extra_args" not in panel.sent[-1]


def test_extra_args_can_be_inherited_cleared_or_set(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    """Text is quoted as in a shell, and the running arguments can be set again unchanged."""
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", tiny_model)
    panel.set_extra("--top-k 7  --alias-of-mine\\ x 'it''s' \"a \\\"b\\\"\"\n")
    panel.page.click("#apply")
    expect(panel.page.locator("#field-error")).to_contain_text("--alias-of-mine x")
    assert panel.sent[-1]["llama_extra_args"] == [
        *("--top-k", "7", "--alias-of-mine x", "its", 'a "b"')
    ]
    panel.set_extra("--top-k 7")
    panel.page.click("#apply")
    panel.expect_state("Healthy")
    panel.choose_extra("Inherit")
    expect(panel.page.locator("#extra-hint")).to_contain_text("Now: --top-k 7")
    panel.expect_sentence("#plan", "panel.plan.loaded")
    panel.choose_extra("None")
    panel.expect_text("#plan", "llama_extra_args")
    panel.page.click("#apply")
    until(client, lambda s: s["loaded"] and s["loaded"]["llama_extra_args"] == [])
    assert panel.sent[-1]["llama_extra_args"] == []


def test_variants_are_offered_with_their_sizes(
    start: Start, open_panel: Open, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    for seed, label in enumerate(("Q4_K_M", "Q8_0")):
        write_tiny_model(tmp_path / "models" / f"tiny-{label}.gguf", seed=seed)
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", str(tmp_path / "models"))
    panel.page.keyboard.press("Tab")
    expect(panel.page.locator("#gguf_variant option")).to_have_text(
        ["Auto (Q4_K_M)", "Q4_K_M · 470 KB · on disk", "Q8_0 · 470 KB · on disk"]
    )
    panel.page.select_option("#gguf_variant", "Q8_0")
    panel.page.click("#apply")
    panel.expect_state("Healthy")
    expect(panel.page.locator("#model")).to_contain_text("Q8_0")


# -------------------------------------------------------------------------------------- the machine


def test_diagram_shows_the_state_and_the_path_of_the_load(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    """Even of a load before the page was opened, and in colour, although its style is blocked."""
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    page = open_panel(client).until_live().page
    expect(page.locator("#diagram .current")).to_have_id("state-Healthy")
    expect(page.locator("#diagram .traced")).to_have_count(5)
    # the fill changes in a transition
    expect(page.locator("#state-Healthy rect")).to_have_css("fill", "rgb(9, 105, 218)")
    page.click("#unload")
    expect(page.locator("#diagram .current")).to_have_id("state-Idle")
    expect(page.locator("#diagram .traced")).to_have_count(2)


def test_cancel_while_the_server_starts(
    start: Start, open_panel: Open, gate: Gate, tiny_model: str, state_dir: Path
) -> None:
    client = start(gate.binary)
    panel = open_panel(client).until_live()
    expect(panel.page.locator("#cancel")).to_be_hidden()
    panel.apply(model_path=tiny_model)
    panel.expect_state("WaitingHealth")
    until(client, is_at_gate)
    text = panel.page.locator("#progress-text")
    expect(text).to_have_text(re.compile(r"^Loading · (\S+ \S+) of \1"))
    assert panel.page.locator("#bar").evaluate("bar => bar.position") == -1, "not indeterminate"
    panel.page.click("#cancel")
    panel.expect_state("Idle")
    panel.expect_sentence("#sent", "panel.sent.cancelled", generation=1)
    expect(panel.page.locator("#error")).to_be_empty()
    assert not servers_of(state_dir)


def test_cancel_while_the_model_downloads(
    start: Start, open_panel: Open, hub: Hub, tmp_path: Path
) -> None:
    """Meanwhile bytes, rate and remaining time are shown."""
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big, "mmproj-F16.gguf": b"no model"}))
    hub.fail(bytes_per_s=1 << 20, path="/cdn/")
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", "org/Tiny-GGUF")
    panel.page.keyboard.press("Tab")
    options = panel.page.locator("#gguf_variant option")
    expect(options).to_have_text(["Auto (Q8_0)", re.compile(r"^Q8_0 · 6\.\d MB$")])
    expect(panel.page.locator("#plan")).to_contain_text(re.compile(r"6\.\d MB"))
    panel.page.click("#apply")
    panel.expect_state("Downloading")
    expect(panel.page.locator("#progress-text")).to_contain_text(
        re.compile(r"Downloading · .* of 6\.\d MB · .*/s · .* left")
    )
    panel.page.click("#cancel")
    panel.expect_state("Idle")
    panel.expect_sentence("#sent", "panel.sent.cancelled", generation=1)
    assert loads(client)[0]["outcome"]["category"] == "cancelled"


def test_requests_that_hold_up_a_swap_can_be_cut(
    start: Start, open_panel: Open, tiny_model: str, other_model: str
) -> None:
    """The load that waits for them goes on."""
    client = start(drain_timeout_s=600)
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    panel = open_panel(client).until_live()
    expect(panel.page.locator("#cut")).to_be_hidden()
    with using_the_server(str(client.base_url)):
        panel.apply(model_path=other_model)
        expect(panel.page.locator("#notes")).to_contain_text("Waits for 1 request of this server")
        panel.page.get_by_role("button", name="Cut now").click()
        panel.expect_state("Healthy")
        expect(panel.page.locator("#model")).to_contain_text(Path(other_model).stem)
    expect(panel.page.locator("#cut")).to_be_hidden()


def test_cancelled_download_leaves_the_running_model(
    start: Start, open_panel: Open, hub: Hub, tmp_path: Path, tiny_model: str
) -> None:
    """A load that downloads first is shown with its rate, beside the running model."""
    big = write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    hub.add(Repo("org/Tiny-GGUF", {"tiny-Q8_0.gguf": big}))
    hub.fail(bytes_per_s=1 << 20, path="/cdn/")
    client = start()
    pid = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()["pid"]
    panel = open_panel(client).until_live()
    panel.page.get_by_text("More").click()
    panel.page.get_by_label("Download first").check()
    panel.apply(model_path="org/Tiny-GGUF")
    expect(panel.page.locator("#notes")).to_contain_text("org/Tiny-GGUF")
    expect(panel.page.locator("#progress-text")).to_contain_text("Downloading · ")
    panel.expect_state("Healthy")
    panel.page.click("#cancel")
    panel.expect_sentence("#sent", "panel.sent.cancelled", generation=2)
    status = until(client, lambda s: not s["loading"])
    assert status["loaded"]["pid"] == pid
    expect(panel.page.locator("#notes")).to_be_empty()
    expect(panel.page.locator("#cancel")).to_be_hidden()


def test_crash_is_shown_with_its_recovery(start: Start, open_panel: Open, tiny_model: str) -> None:
    client = start(restart=RestartPolicy(backoff_s=1.0, limit=1, cool_down_s=60))
    loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
    panel = open_panel(client).until_live()
    panel.expect_state("Healthy")
    psutil.Process(loaded["pid"]).kill()
    notes = panel.page.locator("#notes")
    panel.expect_sentence("#notes", "panel.note.restart", failures=1)
    panel.expect_state("Healthy")
    expect(notes).to_be_empty()
    psutil.Process(client.get(PREFIX + "/status").json()["loaded"]["pid"]).kill()
    panel.expect_sentence("#notes", "panel.note.cool_down", failures=2)


def test_last_loads_are_shown_with_their_outcomes(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start()
    client.post(PREFIX + "/load", json={"model_path": tiny_model})
    bad = {"model_path": tiny_model, "llama_extra_args": ["--seed", "bogus"]}
    client.post(PREFIX + "/load", json=bad)
    page = open_panel(client).until_live().page
    rows = page.locator("#loads li")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("server start failed")
    expect(rows.nth(1)).to_contain_text("loaded")
    expect(rows.nth(1).locator(".bar i")).to_have_count(4)
    rows.nth(0).get_by_text("What happened").click()
    expect(rows.nth(0).locator(".problem")).to_contain_text("--seed")


# --------------------------------------------------------------------------------------- failures


def test_failed_start_is_explained_and_links_to_its_field(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", tiny_model)
    panel.set_extra("--seed bogus")
    panel.page.click("#apply")
    alert = panel.page.get_by_role("alert").filter(has_text="server_start_failed")
    expect(alert.locator("p").first).to_contain_text("--seed")
    expect(alert.locator("pre").first).to_contain_text('handling argument "--seed"')
    alert.get_by_role("button", name="Go to “Extra arguments”").click()
    expect(panel.page.locator("#extra-text")).to_be_focused()
    alert.get_by_text("Story").click()
    expect(alert).to_contain_text("WaitingHealth -> Killing on not_ready")
    panel.expect_sentence("#sent", "panel.sent.failed", generation=1)


@pytest.mark.parametrize(
    ("fields", "extra", "field", "value"),
    [
        ({"max_seq_length": "many"}, "", "max_seq_length", "max_seq_length"),
        ({}, "--port 1", "extra-text", "--port"),
        ({}, "'open", "extra-text", "'"),
        ({"model_path": "/no/<b>such</b>"}, "", "model_path", "/no/<b>such</b>"),
    ],
)
def test_refusal_is_shown_beside_its_field(
    start: Start,
    open_panel: Open,
    tiny_model: str,
    fields: dict[str, str],
    extra: str,
    field: str,
    value: str,
) -> None:
    """By the plan, and again by Apply, which focuses the field."""
    client = start()
    panel = open_panel(client).until_live()
    panel.page.fill("#model_path", tiny_model)
    if extra:
        panel.set_extra(extra)
    for name, text in fields.items():
        panel.page.fill(f"#{name}", text)
    panel.expect_text("#plan", value)
    panel.expect_text("#field-error", value)
    expect(panel.page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    panel.page.click("#apply")
    expect(panel.page.get_by_role("alert").filter(has_text=value)).to_be_visible()
    expect(panel.page.locator(f"#{field}")).to_be_focused()
    panel.expect_state("Idle")


def test_late_hint_does_not_move_apply(start: Start, open_panel: Open) -> None:
    """A click whose button moves away between its two halves does nothing."""
    panel = open_panel(start()).until_live()
    held: list[Route] = []
    panel.page.route("**/variants", lambda route: held.append(route))
    panel.page.fill("#model_path", "/no/such/" + "folder/" * 20)
    panel.expect_text("#plan", "/no/such/")
    with panel.page.expect_request("**/variants"):
        panel.page.locator("#model_path").blur()  # as the press of a button does
    before = panel.page.locator("#apply").bounding_box()
    held[0].continue_()
    panel.expect_text("#gguf_variant-hint", "Variants cannot be listed")
    assert panel.page.locator("#apply").bounding_box() == before


def test_panel_reconnects_after_the_backend_restarts(
    open_panel: Open, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    """It shows the new status, although the ids of the new events are smaller."""
    with serving(create_app(llama_server="embedded", state_dir=state_dir)) as client:
        panel = open_panel(client).until_live()
        for model in (other_model, tiny_model):
            client.post(PREFIX + "/load", json={"model_path": model})
        panel.expect_state("Healthy")
        port = client.base_url.port or 0
    expect(panel.page.locator("#link")).to_have_text("reconnecting …")
    expect(panel.page.get_by_role("alert").filter(has_text="not answered since")).to_be_visible()
    expect(panel.page.locator("main")).to_have_css("filter", "grayscale(1)")
    app = create_app(llama_server="embedded", state_dir=state_dir)
    with serving(app, port) as client:
        client.post(PREFIX + "/load", json={"model_path": other_model, "max_seq_length": 640})
        panel.until_live()
        expect(panel.page.locator("#banner")).to_be_hidden()
        expect(panel.page.locator("main")).to_have_css("filter", "none")
        expect(panel.page.locator("#facts")).to_contain_text("requested: 640")
        expect(panel.page.locator("#loads li")).to_have_count(1)
        client.post(PREFIX + "/unload")
        panel.expect_state("Idle")


def test_key_is_requested_and_kept_in_this_tab(
    start: Start, open_panel: Open, tiny_model: str
) -> None:
    client = start(api_keys=["s3cret"])
    panel = open_panel(client)
    field = panel.page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(panel.page.locator("#link")).to_have_text("locked")
    field.fill("wrong")
    panel.page.keyboard.press("Enter")
    panel.expect_sentence("#key-error", "panel.key.refused")
    field.fill("s3cret")
    panel.page.keyboard.press("Enter")
    panel.until_live()
    expect(field).to_be_hidden()
    panel.apply(model_path=tiny_model)
    panel.expect_state("Healthy")
    assert panel.page.evaluate("Object.values(sessionStorage)") == ["s3cret"]
    assert panel.page.evaluate("localStorage.length + document.cookie.length") == 0
    expect(open_panel(client).page.get_by_label("API key")).to_be_visible()


def test_refusal_of_a_request_without_the_key_does_not_drop_the_key(
    start: Start, open_panel: Open
) -> None:
    """It was sent before the key was typed, and is answered after."""
    panel = open_panel(start(api_keys=["s3cret"]))
    page = panel.page
    held: list[Route] = []
    page.route("**/api/inference/events", lambda route: held.append(route), times=1)
    with page.expect_request("**/api/inference/events"):
        page.reload()
    page.get_by_label("API key").fill("s3cret")
    page.keyboard.press("Enter")
    with page.expect_response("**/api/inference/events"):
        held[0].continue_()
    panel.until_live()
    expect(page.get_by_label("API key")).to_be_hidden()


def test_key_typed_before_the_refusal_is_read_connects(start: Start, open_panel: Open) -> None:
    panel = open_panel(start(api_keys=["s3cret"]))
    page = panel.page
    page.add_init_script(
        "const read = Response.prototype.json;"
        "const typed = new Promise((resolve) => addEventListener('submit', () => "
        "setTimeout(resolve)));"
        "Response.prototype.json = async function () { await typed; return read.call(this); };"
    )
    page.reload()
    page.get_by_label("API key").fill("s3cret")
    page.keyboard.press("Enter")
    panel.until_live()


# --------------------------------------------------------------------------------- accessibility


def violations(page: Page) -> str:
    """Return the report of axe; "" if it finds nothing."""
    found = Axe().run(page)
    return str(found.generate_report()) if found.violations_count else ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_panel_is_accessible_and_fits(
    start: Start, open_panel: Open, tiny_model: str, size: tuple[int, int], scheme: str
) -> None:
    """With everything unfolded: Idle, Healthy, and after a failure."""
    client = start()
    page = open_panel(client, size=size, scheme=scheme).until_live().page
    for state, extra in (("Idle", None), ("Healthy", []), ("Idle", ["--seed", "bogus"])):
        if extra is not None:
            body = {"model_path": tiny_model, "llama_extra_args": extra}
            client.post(PREFIX + "/load", json=body)
        expect(page.locator("#state")).to_have_text(state)
        expect(page.locator("#diagram .current")).to_have_id(f"state-{state}")
        if extra:
            expect(page.locator("#error")).to_contain_text("--seed")
        page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        assert not violations(page)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0


# ----------------------------------------------------------------------------------------- /docs


@pytest.mark.parametrize("prefix", ["", "/llama"])
def test_docs_page_works_without_other_hosts(
    chromium: Browser, state_dir: Path, prefix: str
) -> None:
    """A script of another host could do all that the user may, and the page must work offline. Its
    policy allows no such script, and all that its own scripts do; a proxy or a host may have put
    the app below a path.
    """
    app = create_app(llama_server="embedded", state_dir=state_dir)
    if prefix:
        host = FastAPI(docs_url=None)
        host.mount(prefix, app)
        app = host
    with serving(app) as client:
        context = chromium.new_context()
        page = context.new_page()
        seen = Panel(page, str(client.base_url))
        page.goto(f"{client.base_url}{prefix}/docs")
        route = page.locator("#operations-inference-status_api_inference_status_get")
        route.click()
        route.get_by_role("button", name="Try it out").click()
        route.get_by_role("button", name="Execute").click()
        expect(route.locator(".live-responses-table")).to_contain_text('"state": "Idle"')
        page.locator("#operations-inference-load_api_inference_load_post").click()
        context.close()
    assert not seen.errors
    assert seen.hosts == {urlsplit(str(client.base_url)).netloc}
