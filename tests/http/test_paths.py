"""Local paths are hidden in every answer, whatever the request."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchestrator
from orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.errors import OrchestratorError
from orchestrator.http import create_app
from orchestrator.http.paths import PathRenamer
from tests.kit.http import PREFIX, Gate, Serve, serving

LOAD, PLAN = PREFIX + "/load", PREFIX + "/plan"
REPO = "owner/name"
COMMIT = "0" * 39 + "1"


class Folders:
    """Models behind links, in a home and in a Hub cache."""

    def __init__(self, base: Path, tiny_model: str) -> None:
        self.home, self.disk, self.hub = base / "home", base / "disk", base / "hub"
        self.links = base / "links"
        for folder in (self.home, self.disk / "deep", self.links):
            folder.mkdir(parents=True)
        self.real = Path(shutil.copy(tiny_model, self.disk / "deep" / "real.gguf"))
        self.link = self.links / "model.gguf"
        self.link.symlink_to(self.real)
        self.damaged = self.links / "damaged.gguf"
        (self.disk / "damaged.gguf").write_bytes(self.real.read_bytes()[:5000])
        self.damaged.symlink_to(self.disk / "damaged.gguf")
        self.at_home = Path(shutil.copy(tiny_model, self.home / "mine.gguf"))
        cached = self.hub / "models--owner--name"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(COMMIT)
        (cached / "snapshots" / COMMIT).mkdir(parents=True)
        shutil.copy(tiny_model, cached / "snapshots" / COMMIT / "name-Q4_K_M.gguf")


@pytest.fixture
def folders(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Folders:
    folders = Folders(tmp_path, tiny_model)
    monkeypatch.setenv("HOME", str(folders.home))
    monkeypatch.setenv("HF_HUB_CACHE", str(folders.hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folders


@pytest.fixture
def ask(folders: Folders, state_dir: Path, gate: Gate, serve: Serve) -> Iterator[Any]:
    """Send a request, and fail if its answer has a hidden path."""
    hidden = [str(path) for path in (folders.disk, folders.hub, state_dir)]
    hidden += [str(Path(file).parent) for file in (sys.executable, orchestrator.__file__)]
    hidden.append(str(Path(gate.binary).parent) + "/gated")
    gate.open()
    with serve(gate.binary) as client:

        def send(method: str, path: str, **body: Any) -> Any:
            answer = client.request(method, path, json=body or None)
            assert [path for path in hidden if path in answer.text] == []
            return answer.json()

        yield send


def test_linked_model_is_named_as_sent(ask: Any, folders: Folders) -> None:
    """In plans, reload reasons, the server's output and errors."""
    name = str(folders.link)
    argv = ask("POST", PLAN, model_path=name)["argv"]
    assert argv[:3] == ["gated-server", "-m", name]
    loaded = ask("POST", LOAD, model_path=name, chat_template_override="{{ x }}")
    assert loaded["model_path"] == name
    ask("GET", PREFIX + "/status")
    logs = ask("GET", PREFIX + "/logs?lines=2000")["lines"]
    assert any(name in line for line in logs)
    other = ask("POST", PLAN, model_path=str(folders.at_home))
    (reason, *_) = other["reload_reasons"]
    assert reason["running"].startswith(name + " (")
    assert reason["requested"].startswith(str(folders.at_home) + " (")
    problem = ask("POST", LOAD, model_path=name, llama_extra_args=["--seed", "bogus"])
    assert problem["category"] == "server_start_failed"
    assert ask("GET", PREFIX + "/status")["last_error"]["log_tail"]
    problem = ask("POST", LOAD, model_path=str(folders.damaged))
    assert problem["detail"].startswith(f"{folders.damaged} ")
    ask("POST", LOAD, model_path=str(folders.links))
    ask("POST", LOAD, model_path=str(folders.links / "none.gguf"))
    ask("POST", LOAD, model_path=name, mmproj_path=str(folders.damaged))


def test_names_of_loaded_and_past_models_are_kept(ask: Any, folders: Folders) -> None:
    """However many other models are planned since."""
    name = str(folders.link)
    ask("POST", LOAD, model_path=name)
    ask("POST", LOAD, model_path=name, llama_extra_args=["--seed", "bogus"])
    ask("POST", LOAD, model_path=name)
    for number in range(80):
        other, real = folders.links / f"{number}.gguf", folders.disk / f"{number}.gguf"
        real.write_bytes(b"GGUF")
        other.symlink_to(real)
        ask("POST", PLAN, model_path=str(other))
    assert any(name in line for line in ask("GET", PREFIX + "/logs?lines=2000")["lines"])
    assert ask("GET", PREFIX + "/loads")["loads"][1]["outcome"]["log_tail"]
    ask("GET", PREFIX + "/status")
    ask("POST", PLAN, model_path=str(folders.at_home))


def test_names_are_not_shared_between_orchestrators(
    folders: Folders, tmp_path: Path, gate: Gate
) -> None:
    """Each names what its own callers have sent, although both are in one process."""
    gate.open()
    mine, yours = (
        AsyncOrchestrator(llama_server=gate.binary, state_dir=tmp_path / name)
        for name in ("mine", "yours")
    )
    with serving(create_app(mine)) as first, serving(create_app(yours)) as second:
        for client, name in ((first, folders.link), (second, folders.real)):
            client.post(LOAD, json={"model_path": str(name)})
        for client, name in ((first, folders.link), (second, folders.real)):
            assert client.post(PLAN, json={"model_path": str(name)}).json()["argv"][2] == str(name)
            lines = client.get(PREFIX + "/logs?lines=2000").json()["lines"]
            assert any(str(name) in line for line in lines)


def test_hub_model_is_named_by_its_place_in_the_cache(ask: Any, folders: Folders) -> None:
    argv = ask("POST", PLAN, model_path=REPO)["argv"]
    assert argv[2] == f"<hub cache>/models--owner--name/snapshots/{COMMIT}/name-Q4_K_M.gguf"
    assert ask("POST", LOAD, model_path=REPO)["gguf_variant"] == "Q4_K_M"
    logs = ask("GET", PREFIX + "/logs?lines=2000")["lines"]
    assert any("<hub cache>/models--owner--name" in line for line in logs)
    ask("POST", PLAN, model_path=str(folders.link))
    ask("POST", LOAD, model_path=REPO, gguf_variant="Q8_0")
    ask("POST", LOAD, model_path="owner/other")


def test_streams_hide_local_paths(folders: Folders, serve: Serve, gate: Gate) -> None:
    gate.open()
    with serve(gate.binary) as client:
        client.post(LOAD, json={"model_path": str(folders.link)})
        bogus = {"model_path": str(folders.link), "llama_extra_args": ["--seed", "bogus"]}
        client.post(LOAD, json=bogus)
        client.post(LOAD, json={"model_path": str(folders.link)})
        with client.stream("GET", PREFIX + "/logs?follow=true&lines=2000") as stream:
            line = next(line for line in stream.iter_lines() if "model.gguf" in line)
        assert str(folders.disk) not in line
        events = []
        with client.stream("GET", PREFIX + "/events", headers={"Last-Event-ID": "0"}) as stream:
            for line in stream.iter_lines():
                events.append(line)
                if len(events) > 40:
                    break
        assert str(folders.disk) not in "".join(events)


def test_problem_hides_the_state_folder(ask: Any, folders: Folders, state_dir: Path) -> None:
    (state_dir / "default" / "chat-template.jinja").mkdir()
    body = {"model_path": str(folders.link), "chat_template_override": "{{ x }}"}
    problem = ask("POST", LOAD, **body)
    assert "<state>/default/chat-template.jinja" in problem["detail"]
    assert ask("GET", PREFIX + "/status")["last_error"]["detail"] == problem["detail"]
    (state_dir / "default" / "chat-template.jinja").rmdir()


def test_settings_are_returned_as_sent(ask: Any, folders: Folders) -> None:
    """They may be posted back, so a file in this user's home keeps its path."""
    grammar = folders.home / "g.gbnf"
    grammar.write_text('root ::= "x"')
    flags = ["--chat-template-file", str(grammar)]
    ask("POST", LOAD, model_path=str(folders.at_home), llama_extra_args=flags)
    shown = ask("GET", PREFIX + "/status")["loaded"]
    assert shown["llama_extra_args"] == flags
    assert shown["model_path"] == str(folders.at_home)
    again = ask("POST", LOAD, model_path=shown["model_path"], llama_extra_args=flags)
    assert again["status"] == "already_loaded"
    argv = ask("POST", PLAN, model_path=str(folders.at_home))["argv"]
    assert argv[-2:] == ["--chat-template-file", "~/g.gbnf"]


def test_missing_server_is_reported_without_its_folder(
    folders: Folders, serve: Serve, state_dir: Path
) -> None:
    with serve(str(folders.disk / "llama-server")) as client:
        answer = client.post(LOAD, json={"model_path": str(folders.link)})
        assert answer.json()["category"] == "server_unavailable"
        assert "llama-server" in answer.json()["detail"]
        assert str(folders.disk) not in answer.text


def test_python_api_reports_real_paths(folders: Folders, state_dir: Path) -> None:
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        assert str(folders.real) in orch.plan(str(folders.link)).argv
        with pytest.raises(OrchestratorError, match=str(folders.disk / "damaged.gguf")):
            orch.load(str(folders.damaged))


RENAMER = PathRenamer(
    [(("/kept", "<kept>"),), (("/kept/inner", "<inner>"), ("/named/target", "/kept/link"))]
)
WORDS = {
    "/kept": "<kept>",
    "/kept/": "<kept>/",
    "/kept/x": "<kept>/x",
    "/kept/inner": "<inner>",
    "/kept/inner/x.gguf": "<inner>/x.gguf",
    "/kept/innermost": "<kept>/innermost",
    "/named/target": "/kept/link",  # as it was sent
    **{other: other for other in ("/kep", "/kept2", "x/kept", "/y", "~/kept", "kept", "")},
}


@given(st.lists(st.sampled_from(list(WORDS))), st.sampled_from([" ", ": ", ", ", "'", "(", "="]))
@settings(deadline=None)
def test_whole_paths_are_renamed_once(words: list[str], between: str) -> None:
    """A path within a longer path is another path, and a name may look like a path."""
    renamed = RENAMER.text(between.join(words))
    assert renamed == between.join(WORDS[word] for word in words)


def test_paths_within_longer_words_are_kept() -> None:
    for text, renamed in (
        ("/kept", "<kept>"),
        ("'/kept/x.gguf' is", "'<kept>/x.gguf' is"),
        ("in /kept.", "in <kept>."),
        ("--flag=/kept/x", "--flag=<kept>/x"),
        ("file:///kept/x", "file://<kept>/x"),
        ("/kept.old/x", "/kept.old/x"),
        ("/kept-2", "/kept-2"),
        ("/mnt/kept/x", "/mnt/kept/x"),
        ("~/kept", "~/kept"),
        ("http://127.0.0.1:80/keptx", "http://127.0.0.1:80/keptx"),
    ):
        assert RENAMER.text(text) == renamed, text


def test_only_texts_of_an_answer_are_renamed() -> None:
    answer = {"detail": "/kept", "model_path": "/kept", "x": [{"argv": ["/kept"], "y": "/kept"}]}
    assert RENAMER.members(answer) == {
        "detail": "<kept>",
        "model_path": "/kept",
        "x": [{"argv": ["<kept>"], "y": "/kept"}],
    }
    assert json.dumps(answer).count("<kept>") == 0
