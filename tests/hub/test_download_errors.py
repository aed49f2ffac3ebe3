"""Downloads that fail: each failure has its category and says what to do; no token leaks."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import (
    HubError,
    HubUnreachable,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
    Stalled,
)
from orchestrator.models.hub import cache
from tests.kit import fake_hub
from tests.kit.downloads import (
    BIG,
    BIG_FILE,
    FILE,
    Download,
    add_partial,
    assert_whole,
    fetch,
    fetchers,
    look_up,
    root_of,
)
from tests.kit.models import MODEL
from tests.kit.sentences import assert_sentence
from tests.kit.shell.records import captured

pytestmark = pytest.mark.usefixtures("hub")

FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str | None, str]] = {
    # the fault, the request, and the problem: category, field, sentence
    "missing": ({}, {"model_path": "owner/none"}, "model_not_found", "model_path", "hub.missing"),
    "private": (
        *({}, {"model_path": "owner/private"}),
        *("model_not_found", "model_path", "hub.missing"),
    ),
    "gated": ({}, {"model_path": "owner/gated"}, "hub_gated", "hf_token", "hub.gated"),
    "gated to you": (
        *({}, {"model_path": "owner/gated", "hf_token": "hf_stranger"}),
        *("hub_gated", "hf_token", "hub.gated"),
    ),
    "bad token": ({}, {"hf_token": "hf_nobody"}, "hub_unauthorized", "hf_token", "hub.refused"),
    "odd token": ({}, {"hf_token": "hf_sécret"}, "hub_unauthorized", "hf_token", "hub.odd_token"),
    "revision": ({}, {"revision": "v9"}, "model_not_found", "revision", "hub.no_revision"),
    "variant": ({}, {"gguf_variant": "Q2_K"}, "model_not_found", "gguf_variant", "hub.no_variant"),
    "limited": (
        *({"status": 429, "retry_after_s": 99}, {}),
        *("hub_rate_limited", None, "hub.rate_limited"),
    ),
    "broken": ({"status": 503}, {}, "hub_unreachable", None, "hub.failed"),
    "refused": ({"status": 403}, {}, "hub_unauthorized", "hf_token", "hub.refused"),
    "page": ({"html": True}, {}, "hub_unreachable", None, "hub.web_page"),
    "cut json": ({"truncate_json": True}, {}, "hub_unreachable", None, "hub.unusable_answer"),
    "circle": ({"redirect": "/api/models/a/b"}, {}, "hub_unreachable", None, "hub.unreachable"),
    "file page": ({"html": True, "path": "/resolve/"}, {}, "hub_unreachable", None, "hub.web_page"),
    "file gone": ({"status": 404, "path": "/resolve/"}, {}, "hub_unreachable", None, "hub.failed"),
    "cdn": ({"status": 403, "path": "/cdn/"}, {}, "hub_unreachable", None, "hub.failed"),
    "listing resets": ({"reset_after": 0}, {}, "hub_unreachable", None, "hub.unreachable"),
    "body resets": (
        *({"reset_after": 0, "path": "/cdn/"}, {}),
        *("hub_unreachable", None, "hub.unreachable"),
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_has_its_category_and_says_what_to_do(
    hub: fake_hub.Hub,
    gguf_repo: fake_hub.Repo,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    case: str,
) -> None:
    fault, fields, category, field, sentence = FAILURES[case]
    files = {FILE: gguf_files[FILE]}
    hub.add(fake_hub.Repo("owner/private", files, private=True, readers=["hf_reader"]))
    hub.add(fake_hub.Repo("owner/gated", files, gated=True, readers=["hf_reader"]))
    hub.add(fake_hub.Repo("owner/other", files, private=True, readers=["hf_stranger"]))
    if fault:
        hub.fail(**fault)
    with pytest.raises(OrchestratorError) as caught:
        fetch(records, **{"stall_timeout_s": 6, **fields})
    problem = caught.value.problem
    assert (problem.category, problem.field) == (category, field)
    message = re.sub(r"(reached|used) \(.+\):", r"\1 ({reason}):", problem.message)
    repo, status = fields.get("model_path", MODEL), fault.get("status", 401)
    assert_sentence(sentence, message, endpoint=hub.endpoint, repo=repo, status=status)
    assert "Traceback" not in str(caught.value)
    if fault.get("status") == 429:
        assert problem.retry_after_s == 99
        assert len(hub.requests) == 1
    assert len(hub.seen(server="cdn")) <= 6
    assert gguf_repo.commit not in str(list(root_of().glob("snapshots/*/*.gguf")))


@pytest.mark.usefixtures("gguf_repo")
def test_unreachable_hub_and_untrusted_hub_are_different_reasons(
    hub: fake_hub.Hub, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("http://", "https://"))
    with pytest.raises(HubUnreachable) as caught:
        fetch(records)
    assert caught.value.reason == "tls"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.stop()
    with pytest.raises(HubUnreachable) as caught:
        fetch(records, stall_timeout_s=3)
    assert caught.value.reason is None


@pytest.mark.usefixtures("gguf_repo")
@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("hub.proxy_socks", "HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1"),
        ("hub.proxy_socks", "all_proxy", "socks5h://me:secret@127.0.0.1:1"),
        ("hub.proxy", "https_proxy", "proxy://me:secret@127.0.0.1:1"),
        ("hub.proxy", "HTTPS_PROXY", "http://[me:secret@::1"),
    ],
)
def test_proxy_that_the_client_cannot_use_is_named_by_its_variable(
    hub: fake_hub.Hub,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:2")
    monkeypatch.setenv(name, value)
    with pytest.raises(HubUnreachable) as caught:
        fetch(records)
    assert caught.value.reason == "proxy"
    assert_sentence(key, caught.value.message.replace(name, "{name}"))
    assert not hub.requests


@pytest.mark.usefixtures("gguf_repo")
@pytest.mark.parametrize("path", ["/api/models", "/resolve/", "/cdn/"])
def test_transient_failures_are_retried(
    hub: fake_hub.Hub, download: Callable[..., Download], path: str
) -> None:
    fault = hub.fail(path=path, status=503, times=2)
    one = download(gguf_variant="Q8_0", mmproj_path="/own.gguf", stall_timeout_s=4)
    assert one.files().is_on_disk
    assert fault.hits == 2
    assert one.progress.note is None


@pytest.mark.usefixtures("gguf_repo")
def test_retry_after_is_honoured_within_the_stall_timeout(
    hub: fake_hub.Hub, download: Callable[..., Download]
) -> None:
    hub.fail(path="/api/models", status=429, retry_after_s=1, times=1)
    one = download(gguf_variant="Q8_0", stall_timeout_s=30)
    one.wait_until(lambda p: p.note and "too many requests" in p.note, "the note")
    assert one.files().is_on_disk
    first, second = hub.seen("/api/models")
    assert second.at - first.at >= 1


@pytest.mark.usefixtures("big")
def test_listing_that_hangs_is_requested_four_times(
    hub: fake_hub.Hub, download: Callable[..., Download]
) -> None:
    fault = hub.fail(path="/api/models", hang=True)
    error = download(model_path=BIG, stall_timeout_s=8).error()
    assert error.problem.category == "hub_unreachable"
    assert fault.hits == 4


@pytest.mark.usefixtures("big")
def test_file_that_hangs_is_requested_again_until_the_download_stalls(
    hub: fake_hub.Hub, download: Callable[..., Download]
) -> None:
    fault = hub.fail(path="/cdn/", hang=True)
    error = download(model_path=BIG, stall_timeout_s=3).error()
    assert isinstance(error, Stalled)
    assert (error.field, error.reason) == ("stall_timeout_s", "download")
    assert fault.hits >= 2


@pytest.mark.usefixtures("big")
def test_slow_download_is_not_stalled(
    hub: fake_hub.Hub, download: Callable[..., Download], big_file: Path
) -> None:
    """Nor one that starts again: received bytes count, not their total."""
    add_partial(big_file, b"\0" * (big_file.stat().st_size - 1))
    hub.fail(path="/cdn/", bytes_per_s=5 << 20)
    one = download(model_path=BIG, stall_timeout_s=3)
    assert_whole(one.files(), big_file)


@pytest.mark.usefixtures("gguf_repo")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model_path": f"{MODEL}:Q8_0", "gguf_variant": "Q4_K_M"}, "gguf_variant"),
        ({"revision": "../../x"}, "revision"),
        ({"revision": "/etc/passwd"}, "revision"),
        ({"revision": "main?x"}, "revision"),
        ({"revision": "a/./b"}, "revision"),
    ],
)
def test_contradictory_or_malformed_request_is_refused_without_a_request_to_the_hub(
    hub: fake_hub.Hub, records: Path, fields: dict[str, Any], field: str
) -> None:
    for call in (fetch, look_up):
        with pytest.raises(InvalidRequest) as caught:
            call(records, **fields)
        assert caught.value.field == field
    assert not hub.requests


# ------------------------------------------------------------------------------------ hostile hub

EVIL = "../../../../evil-Q8_0.gguf"


def test_files_with_impossible_names_hashes_or_sizes_are_ignored(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(fake_hub.Repo("owner/evil", {FILE: gguf_files[FILE]}))
    changes: list[dict[str, Any]] = [
        {"rfilename": EVIL},
        {"rfilename": "/tmp/evil-Q8_0.gguf"},
        {"rfilename": "a/../../../evil-Q8_0.gguf"},
        {"rfilename": "evil\0-Q8_0.gguf"},
        {"rfilename": ""},
        {"rfilename": "1.gguf", "lfs": {"sha256": EVIL, "size": 1}},
        {"rfilename": "2.gguf", "lfs": {"sha256": "a" * 63 + "\n", "size": 1}},
        {"rfilename": "3.gguf", "lfs": {"sha256": "", "size": 1}},
        {"rfilename": "4.gguf", "size": -1},
        {"rfilename": "5.gguf", "size": "12"},
        {"rfilename": "6.gguf", "size": 1.5},
        {"rfilename": "7.gguf", "size": 1 << 60},
    ]

    def poison(info: dict[str, Any]) -> None:
        (good,) = info["siblings"]
        info["siblings"] = [{**good, **change} for change in changes]

    alter_info(monkeypatch, poison)
    with pytest.raises(ModelNotFound) as caught:
        fetch(records, model_path="owner/evil")
    assert caught.value.message.endswith("contains no .gguf model"), "one of them was accepted"
    assert not hub.seen("/resolve/")
    assert not cache.directory().exists()


@pytest.mark.parametrize(
    "change",
    [
        {"sha": "../../x"},
        {"sha": None},
        {"sha": 5},
        {"siblings": None},
        {"siblings": [1]},
        {"pad": "x" * 99},
    ],
    ids=str,
)
@pytest.mark.usefixtures("gguf_repo")
def test_unusable_listing_is_an_error_of_the_hub(
    hub: fake_hub.Hub,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    if "pad" in change:
        change = {"pad": "x" * (100 << 20)}
    alter_info(monkeypatch, lambda info: info.update(change))
    with pytest.raises(HubError) as caught:
        fetch(records)
    assert caught.value.problem.category == "hub_unreachable"
    assert "the Hub's answer cannot be used" in caught.value.message
    assert len(hub.requests) == 1


def test_repo_that_gives_itself_another_name_stays_in_its_folder(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(fake_hub.Repo("owner/evil", {FILE: gguf_files[FILE]}))
    alter_info(monkeypatch, lambda info: info.update(id="../../../evil"))
    files = fetch(records, model_path="owner/evil")
    assert Path(files.weights[0].path).is_relative_to(root_of("owner/evil"))


def alter_info(monkeypatch: pytest.MonkeyPatch, alter: Callable[[dict[str, Any]], object]) -> None:
    original = fake_hub._info

    def altered(*args: Any) -> dict[str, Any]:
        info = original(*args)
        alter(info)
        return info

    monkeypatch.setattr(fake_hub, "_info", altered)


# ------------------------------------------------------------------------- tokens, and the parent


def test_token_is_sent_to_the_hub_only(
    hub: fake_hub.Hub,
    gguf_files: dict[str, fake_hub.Content],
    download: Callable[..., Download],
    records: Path,
) -> None:
    """It is not in the command line, the environment, a log or a file."""
    token = "hf_reader"
    repo = fake_hub.Repo("owner/gated", {FILE: gguf_files[FILE]}, gated=True, readers=[token])
    hub.add(repo)
    hold = hub.fail(path="/cdn/", stall_after=1000, times=1)
    with captured() as logs:
        one = download(model_path="owner/gated", hf_token=token)
        hub.wait_for(lambda: hold.held)
        (fetcher,) = fetchers()
        assert token not in str(fetcher.cmdline())
        assert token not in str(fetcher.environ())
        hold.release()
        assert one.files().is_on_disk
    assert {request.token for request in hub.seen(server="hub")} == {token}
    assert not [request for request in hub.seen(server="cdn") if request.has_token]
    assert token not in str(logs) + str(one.progress)
    assert not [path for path in records.rglob("*") if token in path.read_text()]


@pytest.mark.usefixtures("gguf_repo")
def test_token_is_redacted_whatever_it_looks_like(hub: fake_hub.Hub, records: Path) -> None:
    secret = "quite-an-unusual-secret"
    hub.add(fake_hub.Repo("owner/private", {}, private=True, readers=[secret]))
    with pytest.raises(ModelNotFound) as caught, captured() as logs:
        fetch(records, hf_token=secret, revision=secret)
    assert caught.value.field == "revision"
    assert secret not in str(caught.value) + str(logs)


def test_fetcher_exits_when_its_parent_is_killed(hub: fake_hub.Hub, tmp_path: Path) -> None:
    """Even if a fork of the parent keeps its pipes open."""
    hub.add(fake_hub.Repo(BIG, {BIG_FILE: b"GGUF"}))
    hold = hub.fail(path="/api/models", hang=True)
    program = (
        "import pathlib, sys, threading\n"
        "from tests.kit.downloads import BIG, fetch\n"
        f"args, fields = (pathlib.Path({str(tmp_path)!r}),), dict(model_path=BIG)\n"
        "threading.Thread(target=fetch, args=args, kwargs=fields, daemon=True).start()\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    hub.wait_for(lambda: hold.held)
    (fetcher,) = psutil.Process(parent.pid).children()
    fd = os.pidfd_open(fetcher.pid)
    try:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
        assert select.select([fd], [], [], 5)[0], "it still runs"
    finally:
        os.close(fd)
