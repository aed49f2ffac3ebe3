"""Files that extra args name: the server opens them, so they are looked for beforehand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator
from orchestrator.errors import RefusedArgument
from orchestrator.models.local import check_named_files
from orchestrator.settings import reach
from tests.kit.sentences import assert_sentence


@pytest.fixture
def there(tmp_path: Path) -> str:
    path = tmp_path / "there, with a comma.gguf"
    path.touch()
    return str(path)


def refusal(*args: str) -> str:
    with pytest.raises(RefusedArgument) as refused:
        check_named_files(args)
    assert refused.value.field == "llama_extra_args"
    return refused.value.message


@pytest.mark.parametrize("flag", reach.FILES.split())
def test_file_of_every_flag_must_be_there(flag: str, there: str) -> None:
    check_named_files((flag, there, "--top-k", "20"))
    check_named_files((f"{flag}={there}",))
    assert_sentence("args.no_file", refusal(flag, "/no/file"), flag=flag)
    assert_sentence("args.no_file", refusal("--top-k", "20", f"{flag}=/no/file"), flag=flag)


def test_files_of_a_list_and_with_scales_are_looked_for_one_by_one(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one.gguf"), str(tmp_path / "two:2.gguf")
    for path in (one, two):
        Path(path).touch()
    for value in (one, f"{one},{two}", f"{one}:0.5", f"{one}:0.5,{two}:1,{two}"):
        check_named_files(("--lora-scaled", value))
    check_named_files(("--lora-scaled", one, "0.5"))
    for value in (f"{one},/no/file", f"{one},/no/file:0.5", f"{one}:0.5,/no/file", "", ":0.5"):
        message = refusal("--lora-scaled", value)
        assert "--lora-scaled" in message
        assert "/no/file" in message or not value.startswith("/")


def test_folder_or_unreadable_file_is_refused(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal("--grammar-file", str(tmp_path))
    assert_sentence("args.folder", message, path=tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    message = refusal("--lora", there)
    assert_sentence("args.unreadable", message, path=there)


def test_home_is_not_expanded_because_the_server_does_not(there: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", os.path.dirname(there))
    refusal("--lora", f"~/{os.path.basename(there)}")


def test_value_that_is_no_file_of_a_flag_is_not_looked_for() -> None:
    check_named_files(("--override-kv", "/no/file", "--lora-base", "x", "-1", "/no/file"))


@pytest.mark.external
def test_running_model_survives_extra_args_whose_file_is_gone(
    llama_server: str, state_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    """Also inherited ones: the file was there when they were given (B71)."""
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "a"')
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
        args = ["--grammar-file", str(grammar)]
        first = orch.load(tiny_model, llama_extra_args=args)
        grammar.unlink()
        assert orch.load(tiny_model).status == "already_loaded"
        for call in (orch.plan, orch.load):
            for fields in ({"max_seq_length": 64}, {"llama_extra_args": [*args, "--mlock"]}):
                with pytest.raises(RefusedArgument) as refused:
                    call(tiny_model, **fields)
                assert str(grammar) in refused.value.message
        loaded = orch.status().loaded
        assert loaded is not None
        assert loaded.pid == first.pid
        assert orch.load(tiny_model, llama_extra_args=[], max_seq_length=64).status == "loaded"
