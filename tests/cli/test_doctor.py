"""`doctor` on machines with something wrong: it finds each problem and names a remedy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.cli import doctor
from orchestrator.cli.doctor import PAGES
from orchestrator.server import process_table
from orchestrator.server.slot import Slot
from tests.kit.command import COMMAND, Cli, Start, environment
from tests.kit.copies import ROOT
from tests.kit.fake_hub import Hub, Repo
from tests.kit.sentences import assert_sentence

Found = dict[str, dict[str, str | None]]
Look = Callable[..., Found]
UNREACHABLE = "http://127.0.0.1:9"  # discard: nothing listens there


@pytest.fixture
def free_port() -> str:
    """Not one of those that the kernel hands to whoever asks for any, until this test has ended."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)
    raise AssertionError("no port is free")


@pytest.fixture
def look(cli: Cli, state_dir: Path, tmp_path: Path, free_port: str) -> Look:
    """Run it with the embedded server and this test's own folders; return the checks by name."""

    def run(*args: str, is_ok: bool = True, **env: str) -> Found:
        done = cli(
            *("doctor", "--json", "--state-dir", str(state_dir), "--port", free_port),
            *("--llama-server", "embedded", *args),  # the last one of an option wins
            **{"HF_ENDPOINT": UNREACHABLE, "HF_HUB_CACHE": str(tmp_path / "hub"), **env},
        )
        assert done.stderr == ""
        report = json.loads(done.stdout)
        assert report["ok"] is is_ok, report
        assert done.returncode == (0 if is_ok else 1)
        checks: Found = {check["name"]: check for check in report["checks"]}
        assert all(check["remedy"] for check in checks.values() if check["verdict"] == "problem")
        assert all(
            (check["page"] is None) is (check["verdict"] == "ok") for check in checks.values()
        )
        return checks

    return run


def problems(found: Found) -> set[str]:
    return {name for name, check in found.items() if check["verdict"] == "problem"}


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_healthy_machine_passes_every_check(
    cli: Cli, look: Look, state_dir: Path, free_port: str
) -> None:
    found = look()
    names = (
        "python platform llama-server embedded slot keep pidfd flock proc memory disk gpu port hub"
    )
    assert found.keys() == {*names.split(), "server flags", "state dir", "model cache"}
    text = cli(
        *("doctor", "--llama-server", "embedded", "--state-dir", str(state_dir)),
        *("--port", free_port),
        HF_HUB_OFFLINE="1",
    )
    assert text.returncode == 0
    assert "ready" in text.stdout


def test_a_container_that_ends_keeps_no_server(tmp_path: Path) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*COMMAND, "doctor", "--json", "--state-dir", str(tmp_path)]
    env = {**environment(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*inside, *command], capture_output=True, check=False, env=env)
    [found] = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "keep"]
    assert found["verdict"] == "note"
    assert re.match(r"pid 1 is \S+: at its end everything ends", found["detail"])


@pytest.mark.parametrize(("mode", "is_kept"), [("process", True), ("mixed", False)])
def test_a_unit_that_systemd_ends_as_a_whole_keeps_no_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, is_kept: bool
) -> None:
    monkeypatch.setattr(doctor, "_other_init", lambda: None)
    monkeypatch.setattr(doctor, "_kill_mode", lambda: mode)
    intent = doctor.Intent("embedded", "default", str(tmp_path), 1, None)
    [check] = doctor._keeping(intent)
    assert (check.verdict == "ok") is is_kept
    assert is_kept or f"KillMode={mode}" in check.detail


def test_a_missing_server_is_a_problem(look: Look, tmp_path: Path) -> None:
    found = look("--llama-server", str(tmp_path / "llama-server"), is_ok=False)
    assert problems(found) == {"llama-server"}
    assert str(tmp_path / "llama-server") in str(found["llama-server"]["detail"])
    assert "llama-orchestrator[embedded]" in str(found["llama-server"]["remedy"])


def test_an_old_server_is_a_problem_that_lists_the_missing_flags(
    look: Look, tmp_path: Path
) -> None:
    """It runs; only the first load with such a setting would fail."""
    old = script(
        tmp_path / "llama-server",
        """case "$1" in
        --version) echo 'version: 1200 (abcdef)' ;;
        *) printf '%s\\n' '-m,    --model FNAME   model path' '--host HOST   address' \\
             '--port PORT   port' '-c,    --ctx-size N   context' '--parallel N   slots' ;;
        esac""",
    )
    found = look("--llama-server", old, is_ok=False)
    assert problems(found) == {"server flags"}
    assert "version: 1200" in str(found["llama-server"]["detail"])
    assert "--chat-template-file" in str(found["server flags"]["detail"])
    assert "--ctx-size" not in str(found["server flags"]["detail"])


def test_a_server_that_is_not_executable_is_a_problem(look: Look, tmp_path: Path) -> None:
    path = script(tmp_path / "llama-server", "exit 0")
    os.chmod(path, 0o644)
    found = look("--llama-server", path, is_ok=False)
    assert problems(found) == {"llama-server"}
    assert "chmod +x" in str(found["llama-server"]["detail"])


def test_a_state_dir_that_cannot_be_created_is_a_problem(look: Look, tmp_path: Path) -> None:
    """Not even root can create a folder inside a file."""
    (tmp_path / "file").write_text("")
    found = look("--state-dir", str(tmp_path / "file"), is_ok=False)
    assert problems(found) == {"state dir"}


def test_a_full_disk_at_the_model_cache_is_a_problem(look: Look) -> None:
    """/proc is a file system without a free byte."""
    found = look(HF_HUB_CACHE="/proc/hub", is_ok=False)
    assert problems(found) == {"model cache"}
    assert "0 bytes free for /proc/hub" in str(found["model cache"]["detail"])


def test_a_port_in_use_is_a_problem(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = look("--port", str(taken.getsockname()[1]), is_ok=False)
    assert problems(found) == {"port"}
    assert "--port 0" in str(found["port"]["remedy"])


def test_a_running_orchestrator_is_a_note_for_its_slot_and_its_port(
    look: Look, start: Start, own: tuple[str, ...]
) -> None:
    running = start("serve", *own, "--json")
    port = running.json_line()["url"].rpartition(":")[2]
    found = look("--port", port)
    assert str(running.process.pid) in str(found["slot"]["detail"])
    assert (found["slot"]["verdict"], found["port"]["verdict"]) == ("note", "note")
    assert running.signal(signal.SIGTERM) == 0


def test_a_record_of_a_live_server_and_a_stale_record_are_different_notes(
    look: Look, state_dir: Path
) -> None:
    """The next start ends the live server; of the other only the record is left."""
    slot = Slot("default", state_dir)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as server:
        identity = process_table.identify(server.pid)
        assert identity is not None
        record = {"version": 1, "host": asdict(identity), "server": asdict(identity)}
        slot.record_path.write_text(json.dumps(record))
        left = look()["slot"]
        assert_sentence("cli.doctor.slot.left", str(left["detail"]), pid=server.pid)
        server.communicate(b"\n", timeout=10)
    stale = look()["slot"]
    assert_sentence("cli.doctor.slot.stale", str(stale["detail"]), pid=server.pid)
    assert {left["verdict"], stale["verdict"]} == {"note"}
    assert slot.record_path.exists(), "doctor only looks"


def test_an_unreachable_hub_is_a_note_until_a_model_needs_it(look: Look) -> None:
    assert problems(found := look()) == set()
    assert found["hub"]["verdict"] == "note"
    assert UNREACHABLE in str(found["hub"]["detail"])
    offline = look(HF_HUB_OFFLINE="1")["hub"]
    assert (offline["verdict"], "HF_HUB_OFFLINE" in str(offline["detail"])) == ("note", True)
    wanted = look("owner/name", is_ok=False)
    assert problems(wanted) == {"model"}
    assert "hub_unreachable" in str(wanted["model"]["remedy"])


def test_a_missing_gpu_tool_is_a_note(look: Look, tmp_path: Path) -> None:
    """Models run on the CPU then."""
    without = look(PATH=str(tmp_path))["gpu"]
    assert (without["verdict"], "CPU" in str(without["detail"])) == ("note", True)
    tool = script(tmp_path / "nvidia-smi", "exit 0")
    found = look(PATH=str(tmp_path))["gpu"]
    assert (found["verdict"], tool in str(found["detail"])) == ("ok", True)


def test_a_model_larger_than_the_memory_is_a_problem(
    look: Look, tiny_model: str, tmp_path: Path
) -> None:
    """Eight tebibytes, in a sparse file."""
    assert look(tiny_model)["model"]["verdict"] == "ok"
    large = tmp_path / "large.gguf"
    large.write_bytes(Path(tiny_model).read_bytes())
    os.truncate(large, 8 << 40)
    (tmp_path / "bin").mkdir()
    found = look(str(large), is_ok=False, PATH=str(tmp_path / "bin"))
    assert problems(found) == {"model"}
    assert "8.0 TiB" in str(found["model"]["detail"])
    assert "that does not fit" in str(found["model"]["detail"])


def test_an_incomplete_default_variant_is_a_problem_that_names_a_complete_one(
    look: Look, tiny_model: str, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    for name in ("m-Q4_K_M-00001-of-00002.gguf", "m-Q8_0.gguf"):
        (tmp_path / "models" / name).write_bytes(Path(tiny_model).read_bytes())
    found = look(str(tmp_path / "models"), is_ok=False)
    assert problems(found) == {"model"}
    assert str(found["model"]["remedy"]).endswith("Q8_0")


def test_the_named_variant_is_checked_rather_than_the_default_one(
    look: Look, tiny_model: str
) -> None:
    """The default one may fit where the named one does not."""
    with Hub() as hub:
        hub.add(Repo("owner/m-GGUF", {"m-Q4_K_M.gguf": Path(tiny_model), "m-F16.gguf": b"x" * 99}))
        named = look("owner/m-GGUF:q4_k_m", HF_ENDPOINT=hub.endpoint)["model"]
        assert (named["verdict"], "Q4_K_M has" in str(named["detail"])) == ("ok", True)
        default = look("owner/m-GGUF", HF_ENDPOINT=hub.endpoint)["model"]
        for found in (named, default):  # what is free changes
            found["detail"] = str(found["detail"]).rpartition(" of ")[0]
        assert default == named
        unknown = look("owner/m-GGUF:Q9_9", HF_ENDPOINT=hub.endpoint)["model"]
    assert (unknown["verdict"], "Q9_9" in str(unknown["detail"])) == ("note", True)
    assert "Q4_K_M, F16" in str(unknown["remedy"])


def test_a_server_that_fails_to_run_is_a_problem(look: Look, tmp_path: Path) -> None:
    """As when a library is missing."""
    found = look("--llama-server", script(tmp_path / "llama-server", "exit 127"), is_ok=False)
    assert problems(found) == {"llama-server"}
    assert "exit status 127" in str(found["llama-server"]["detail"])


def test_the_text_has_a_remedy_below_every_problem_and_their_number(
    cli: Cli, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = cli(
            *("doctor", "--llama-server", str(tmp_path), "--port", str(taken.getsockname()[1])),
            *("--state-dir", str(tmp_path / "no" / "no")),
            HF_HUB_OFFLINE="1",
        )
    assert done.returncode == 1
    assert "3 to fix" in done.stdout
    lines = done.stdout.splitlines()
    marked = [number for number, line in enumerate(lines) if line.startswith("✗")]
    assert len(marked) == 3
    assert all("→" in "".join(lines[number + 1 : number + 4]) for number in marked)
    assert all("docs/" in "".join(lines[number + 1 : number + 6]) for number in marked)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_finding_links_a_page_that_exists(name: str) -> None:
    page, _, anchor = PAGES[name].partition("#")
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert anchor == "" or anchor in anchors


def test_every_check_has_a_page(look: Look) -> None:
    assert look("owner/name", is_ok=False).keys() - {"python"} == PAGES.keys()
