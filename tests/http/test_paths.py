"""Where things are on this machine stays here: whatever is asked, by whatever way it could leak."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchestrator
from orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.errors import OrchestratorError
from orchestrator.http import create_app
from orchestrator.http.paths import Renamed
from tests.kit.http import PREFIX, Gate, Serve, serving

LOAD, PLAN = PREFIX + "/load", PREFIX + "/plan"
REPO = "owner/name"
COMMIT = "0" * 39 + "1"


class House:
    """Models behind links, in a home, in a cache of the Hub; and what may not be told of it."""

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
def house(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> House:
    house = House(tmp_path, tiny_model)
    monkeypatch.setenv("HOME", str(house.home))
    monkeypatch.setenv("HF_HUB_CACHE", str(house.hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return house


@pytest.fixture
def told(house: House, state_dir: Path, gate: Gate, serve: Serve) -> Iterator[Any]:
    """A client that looks at everything it is told."""
    secrets = [
        *(
            str(house.disk),
            str(house.hub),
            str(state_dir),
            str(Path(gate.binary).parent) + "/gated",
        ),
        *(str(Path(sys.executable).parent), str(Path(orchestrator.__file__).parent)),
    ]
    gate.open()

    def ask(client: httpx.Client, method: str, path: str, **body: Any) -> Any:
        answer = client.request(method, path, json=body or None)
        assert [secret for secret in secrets if secret in answer.text] == []
        return answer.json()

    with serve(gate.binary) as client:
        yield lambda method, path, **body: ask(client, method, path, **body)


def test_a_model_behind_a_link_is_called_as_it_was_sent(told: Any, house: House) -> None:
    """In the plan, in what a reload says, in what the server prints, in what fails."""
    name = str(house.link)
    argv = told("POST", PLAN, model_path=name)["argv"]
    assert argv[:3] == ["gated-server", "-m", name]
    loaded = told("POST", LOAD, model_path=name, chat_template_override="{{ x }}")
    assert loaded["model_path"] == name
    told("GET", PREFIX + "/status")
    logs = told("GET", PREFIX + "/logs?lines=2000")["lines"]
    assert any(name in line for line in logs)
    other = told("POST", PLAN, model_path=str(house.at_home))
    (reason, *_) = other["reload_reasons"]
    assert reason["running"].startswith(name + " (")
    assert reason["requested"].startswith(str(house.at_home) + " (")
    problem = told("POST", LOAD, model_path=name, llama_extra_args=["--bogus"])
    assert problem["category"] == "server_start_failed"
    assert told("GET", PREFIX + "/status")["last_error"]["log_tail"]
    problem = told("POST", LOAD, model_path=str(house.damaged))
    assert problem["detail"].startswith(f"{house.damaged} ")
    told("POST", LOAD, model_path=str(house.links))
    told("POST", LOAD, model_path=str(house.links / "none.gguf"))
    told("POST", LOAD, model_path=name, mmproj_path=str(house.damaged))


def test_a_name_is_known_as_long_as_what_it_is_of(told: Any, house: House) -> None:
    """However many models others have asked about since: it runs, or it is among the last loads."""
    name = str(house.link)
    told("POST", LOAD, model_path=name)
    told("POST", LOAD, model_path=name, llama_extra_args=["--bogus"])
    told("POST", LOAD, model_path=name)
    for number in range(80):
        other, real = house.links / f"{number}.gguf", house.disk / f"{number}.gguf"
        real.write_bytes(b"GGUF")
        other.symlink_to(real)
        told("POST", PLAN, model_path=str(other))
    assert any(name in line for line in told("GET", PREFIX + "/logs?lines=2000")["lines"])
    assert told("GET", PREFIX + "/loads")["loads"][1]["outcome"]["log_tail"]
    told("GET", PREFIX + "/status")
    told("POST", PLAN, model_path=str(house.at_home))


def test_names_do_not_cross_from_one_orchestrator_to_another(
    house: House, tmp_path: Path, gate: Gate
) -> None:
    """Each tells what its own callers have sent, though both are of one process."""
    gate.open()
    mine, yours = (
        AsyncOrchestrator(llama_server=gate.binary, state_dir=tmp_path / name)
        for name in ("mine", "yours")
    )
    with serving(create_app(mine)) as client, serving(create_app(yours)) as other:
        for asked, name in ((client, house.link), (other, house.real)):
            asked.post(LOAD, json={"model_path": str(name)})
        for asked, name in ((client, house.link), (other, house.real)):
            assert asked.post(PLAN, json={"model_path": str(name)}).json()["argv"][2] == str(name)
            lines = asked.get(PREFIX + "/logs?lines=2000").json()["lines"]
            assert any(str(name) in line for line in lines)


def test_a_model_of_the_hub_is_told_by_its_place_in_the_cache(told: Any, house: House) -> None:
    argv = told("POST", PLAN, model_path=REPO)["argv"]
    assert argv[2] == f"<hub cache>/models--owner--name/snapshots/{COMMIT}/name-Q4_K_M.gguf"
    assert told("POST", LOAD, model_path=REPO)["gguf_variant"] == "Q4_K_M"
    logs = told("GET", PREFIX + "/logs?lines=2000")["lines"]
    assert any("<hub cache>/models--owner--name" in line for line in logs)
    told("POST", PLAN, model_path=str(house.link))
    told("POST", LOAD, model_path=REPO, gguf_variant="Q8_0")
    told("POST", LOAD, model_path="owner/other")


def test_what_streams_says_no_more(house: House, serve: Serve, gate: Gate) -> None:
    gate.open()
    with serve(gate.binary) as client:
        client.post(LOAD, json={"model_path": str(house.link)})
        client.post(LOAD, json={"model_path": str(house.link), "llama_extra_args": ["--bogus"]})
        client.post(LOAD, json={"model_path": str(house.link)})
        with client.stream("GET", PREFIX + "/logs?follow=true&lines=2000") as stream:
            line = next(line for line in stream.iter_lines() if "model.gguf" in line)
        assert str(house.disk) not in line
        events = []
        with client.stream("GET", PREFIX + "/events", headers={"Last-Event-ID": "0"}) as stream:
            for line in stream.iter_lines():
                events.append(line)
                if len(events) > 40:
                    break
        assert str(house.disk) not in "".join(events)


def test_the_state_folder_has_no_place_in_a_problem(
    told: Any, house: House, state_dir: Path
) -> None:
    (state_dir / "default" / "chat-template.jinja").mkdir()
    body = {"model_path": str(house.link), "chat_template_override": "{{ x }}"}
    problem = told("POST", LOAD, **body)
    assert "<state>/default/chat-template.jinja" in problem["detail"]
    assert told("GET", PREFIX + "/status")["last_error"]["detail"] == problem["detail"]
    (state_dir / "default" / "chat-template.jinja").rmdir()


def test_settings_come_back_as_they_were_sent(told: Any, house: House) -> None:
    """They may be posted back: a file in the home of this user stays that file."""
    grammar = house.home / "g.gbnf"
    grammar.write_text('root ::= "x"')
    flags = ["--chat-template-file", str(grammar)]
    told("POST", LOAD, model_path=str(house.at_home), llama_extra_args=flags)
    shown = told("GET", PREFIX + "/status")["loaded"]
    assert shown["llama_extra_args"] == flags
    assert shown["model_path"] == str(house.at_home)
    again = told("POST", LOAD, model_path=shown["model_path"], llama_extra_args=flags)
    assert again["status"] == "already_loaded"
    argv = told("POST", PLAN, model_path=str(house.at_home))["argv"]
    assert argv[-2:] == ["--chat-template-file", "~/g.gbnf"]


def test_a_server_that_is_missing_is_called_by_its_name(
    house: House, serve: Serve, state_dir: Path
) -> None:
    with serve(str(house.disk / "llama-server")) as client:
        answer = client.post(LOAD, json={"model_path": str(house.link)})
        assert answer.json()["category"] == "server_unavailable"
        assert "llama-server" in answer.json()["detail"]
        assert str(house.disk) not in answer.text


def test_the_python_api_keeps_the_truth(house: House, state_dir: Path) -> None:
    """Whoever runs this program wants to know where things are."""
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        assert str(house.real) in orch.plan(str(house.link)).argv
        with pytest.raises(OrchestratorError, match=str(house.disk / "damaged.gguf")):
            orch.load(str(house.damaged))


RENAMED = Renamed(
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
def test_only_whole_paths_are_renamed_and_only_once(words: list[str], between: str) -> None:
    """A name within a longer name is another name, and a name may look like a path."""
    said = RENAMED.text(between.join(words))
    assert said == between.join(WORDS[word] for word in words)


def test_a_name_has_edges() -> None:
    for text, said in (
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
        assert RENAMED.text(text) == said, text


def test_an_answer_is_changed_in_its_texts_only() -> None:
    answer = {"detail": "/kept", "model_path": "/kept", "x": [{"argv": ["/kept"], "y": "/kept"}]}
    said = RENAMED.members(answer)
    assert said == {
        "detail": "<kept>",
        "model_path": "/kept",
        "x": [{"argv": ["<kept>"], "y": "/kept"}],
    }
    assert json.dumps(answer).count("<kept>") == 0
