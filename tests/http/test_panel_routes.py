"""What the panel requests besides loads: its files, the last loads, variants and options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.demo import tiny_model
from orchestrator.http import create_app, pages
from orchestrator.machine import diagram
from tests.kit.http import PREFIX, Gate, Serve, is_at_gate, problem, serving, until

LOAD, LOADS, VARIANTS = PREFIX + "/load", PREFIX + "/loads", PREFIX + "/variants"


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One app, with a key, for all tests that start no server."""
    state_dir = tmp_path_factory.mktemp("idle")
    app = create_app(llama_server="embedded", state_dir=state_dir, api_keys=["s3cret"])
    with serving(app) as client:
        yield client


WITH_KEY = {"Authorization": "Bearer s3cret"}


# ------------------------------------------------------------------------------- the panel's files


def test_panel_files_need_no_key_and_have_strict_headers(idle: httpx.Client) -> None:
    """Each has its own type, and the page has no inline script or style."""
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert {"/", "/panel/main.js", "/panel/panel.css", "/panel/diagram.css"} < pages.PANEL_PATHS
    for path in pages.PANEL_PATHS - {pages.MODEL}:
        answer = idle.get(path)
        assert answer.status_code == 200, path
        kind = "text/html" if path == "/" else kinds[path.rpartition(".")[2]]
        assert answer.headers["content-type"].startswith(kind)
        for name, value in pages.HEADERS.items():
            assert answer.headers[name] == value
    page = idle.get("/").text
    assert not re.search(r"<style|<script(?! type=\"module\" src)|\son\w+=|\sstyle=", page)
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert idle.get("/" + name).status_code == 200, name


def test_browser_receives_at_most_60_kb(idle: httpx.Client) -> None:
    """All files of both pages together, as they are sent to a browser."""
    panel = pages.PANEL_PATHS - {pages.MODEL}
    with idle.stream("GET", "/panel/main.js") as answer:
        assert answer.headers["content-encoding"] == "gzip"
    sent = 0
    for path in panel:
        with idle.stream("GET", path) as answer:
            sent += len(b"".join(answer.iter_raw()))
    assert sent <= 60_000


def test_docs_page_has_the_strict_headers_and_needs_the_key(idle: httpx.Client) -> None:
    """It runs scripts of a package, at the origin that may do everything."""
    docs = pages.PATHS - pages.PANEL_PATHS
    assert {"/docs", "/docs/swagger-ui-bundle.js"} < docs
    for path in docs:
        assert problem(idle.get(path)) == (401, "unauthorized")
        answer = idle.get(path, headers=WITH_KEY)
        assert answer.status_code == 200
        assert answer.headers.items() >= {n.lower(): v for n, v in pages.HEADERS.items()}.items()
    page = idle.get("/docs", headers=WITH_KEY).text
    links = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert links == {path[1:] for path in docs} - {"docs"} | {"panel/icon.svg", "openapi.json"}
    for path in ("/docs/", "/docs/main.py", "/docs/__init__.py", "/redoc"):
        assert idle.get(path, headers=WITH_KEY).status_code in {307, 404}


def test_unchanged_panel_file_is_304(idle: httpx.Client) -> None:
    first = idle.get("/panel/main.js")
    again = idle.get("/panel/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == pages.CSP
    other = idle.get("/panel/main.js", headers={"If-None-Match": '"another"'})
    assert other.content == first.content
    head = idle.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_only_panel_files_are_served(idle: httpx.Client) -> None:
    """No path leads out of the folder, and the API needs its key."""
    for path in ("/panel/", "/panel/../pages.py", "/panel/%2e%2e/pages.py", "/panel/none.js"):
        assert problem(idle.get(path)) == (401, "unauthorized")
        assert problem(idle.get(path, headers=WITH_KEY)) == (404, "not_found")
    for path in (LOADS, PREFIX + "/options", PREFIX + "/diagram.svg"):
        assert problem(idle.get(path)) == (401, "unauthorized")


def test_diagram_stylesheet_equals_the_style_in_the_diagram(idle: httpx.Client) -> None:
    """The policy forbids the style inside the diagram."""
    assert idle.get("/panel/diagram.css").text == diagram.STYLE
    assert f"<style>{diagram.STYLE}" in diagram.svg()


# ---------------------------------------------------------------------------------- the last loads


def listed(client: httpx.Client, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(LOADS + query).json()["loads"]
    return found


def test_loads_are_listed_newest_first(serve: Serve, tiny_model: str) -> None:
    """With the time of each phase, even of a failed load."""
    with serve() as client:
        assert listed(client) == []
        good = client.post(LOAD, json={"model_path": tiny_model}).json()
        client.post(LOAD, json={"model_path": tiny_model})  # already loaded: no load of its own
        bogus = {"model_path": tiny_model, "llama_extra_args": ["--seed", "bogus"]}
        bad = client.post(LOAD, json=bogus)
        failed, loaded = listed(client)
        assert loaded["outcome"] == good
        assert loaded["timings_s"] == good["timings_s"]
        assert loaded["took_s"] == good["timings_s"]["total"]
        assert (loaded["state"], failed["state"]) == ("Healthy", "Idle")
        assert failed["outcome"] == bad.json()
        assert failed["model_path"] == tiny_model
        phases = [failed["timings_s"][name] for name in ("kill", "download", "spawn", "health")]
        assert all(seconds > 0 for seconds in phases)
        assert failed["took_s"] >= sum(phases) * 0.99
        assert loaded["accepted_at"] <= failed["accepted_at"]
        assert listed(client, "?limit=1") == [failed]
        for bad_limit in ("0", "257", "x"):
            assert problem(client.get(f"{LOADS}?limit={bad_limit}")) == (422, "malformed")


def test_loads_in_flight_are_listed_without_an_outcome(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str
) -> None:
    """A queued load has no phase yet."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        queued = {"model_path": other_model, "on_busy": "queue"}
        client.post(LOAD + "?wait=false", json=queued)
        until(client, is_at_gate)
        second, first = listed(client)
        assert (first["state"], second["state"]) == ("WaitingHealth", "Idle")
        assert first["took_s"] is second["took_s"] is None
        assert "outcome" not in first
        assert first["timings_s"]["spawn"] > 0
        assert first["timings_s"]["health"] is second["timings_s"]["kill"] is None
        client.post(PREFIX + "/cancel", json={"generation": 1})
        first = next(load for load in listed(client) if load["generation"] == 1)
        assert first["outcome"]["category"] == "cancelled"
        assert first["timings_s"]["health"] > 0
        gate.open()
        until(client, lambda s: s["loaded"] and s["loaded"]["model_path"] == other_model)
        assert listed(client)[0]["outcome"]["generation"] == 2


# ---------------------------------------------------------------------------- variants and options


def test_variants_of_a_folder_are_listed_preferred_first(serve: Serve, tmp_path: Path) -> None:
    """Files that are no models, and incomplete ones, are left out."""
    folder = tmp_path / "models"
    folder.mkdir()
    sizes = {}
    for seed, label in enumerate(("Q8_0", "Q4_K_M")):
        path = tiny_model.write_tiny_model(folder / f"tiny-{label}.gguf", seed=seed)
        sizes[label] = path.stat().st_size
    for name in ("mmproj-F16.gguf", "imatrix.gguf", "tiny-F16-00001-of-00002.gguf", "notes.txt"):
        (folder / name).write_bytes(b"x")
    with serve() as client:
        answer = client.post(VARIANTS, json={"model_path": str(folder)})
        assert answer.json() == {
            "model_path": str(folder),
            "variants": [
                {
                    "gguf_variant": label,
                    "size_bytes": sizes[label],
                    "is_default": label == "Q4_K_M",
                    "is_cached": True,
                }
                for label in ("Q4_K_M", "Q8_0")
            ],
        }
        first = answer.json()["variants"][0]
        loaded = client.post(LOAD, json={"model_path": str(folder)}).json()
        assert loaded["gguf_variant"] == first["gguf_variant"]
        one = client.post(VARIANTS, json={"model_path": str(folder / "tiny-Q8_0.gguf")}).json()
        assert [v["gguf_variant"] for v in one["variants"]] == [None]
        assert one["variants"][0]["is_default"]


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, 422, "model_path"),
        ({"model_path": "x", "gguf_variant": "Q8_0"}, 422, "gguf_variant"),
        ({"model_path": "x", "hf_token": 1}, 422, "hf_token"),
        ({"model_path": "/nowhere"}, 404, "model_path"),
        ({"model_path": "{empty}"}, 404, "model_path"),
        ({"model_path": "{broken}"}, 400, "model_path"),
        ({"model_path": "owner/name", "revision": "a b"}, 400, "revision"),
    ],
)
def test_variants_are_refused_like_a_load(
    idle: httpx.Client, tmp_path: Path, body: dict[str, Any], code: int, field: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    places = {"{empty}": str(tmp_path / "empty"), "{broken}": str(tmp_path / "broken.gguf")}
    wanted = {name: places.get(value, value) for name, value in body.items()}
    answer = idle.post(VARIANTS, json=wanted, headers=WITH_KEY)
    assert problem(answer)[0] == code
    assert answer.json()["field"] == field
    if code == 404 or "revision" in body:
        load = idle.post(LOAD, json=wanted, headers=WITH_KEY)
        assert problem(load) == problem(answer)


def test_every_option_is_accepted_by_a_load(serve: Serve, tiny_model: str) -> None:
    """They come from the server binary, not from a list of ours."""
    with serve() as client:
        options = client.get(PREFIX + "/options").json()
        assert options["speculative_type"][:2] == ["off", "default"]
        assert {"ngram-mod", "ngram-simple"} < {*options["speculative_type"]}
        assert "none" not in options["speculative_type"], "off is called off"
        assert "q8_0" in options["cache_type_kv"]
        for name, values in options.items():
            for value in values:
                plan = client.post(PREFIX + "/plan", json={"model_path": tiny_model, name: value})
                assert plan.status_code == 200, plan.text
    with serve("/no/such/server") as client:
        assert problem(client.get(PREFIX + "/options")) == (424, "server_unavailable")
