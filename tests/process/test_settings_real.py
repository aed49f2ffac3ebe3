"""Every setting on the real llama-server, as the server itself reports it after each kind of Apply.

Rows are settings (`ROWS`), tests are situations. Every Apply is compared with a `plan` before it,
including the command line of the process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from orchestrator import LoadOutcome, Orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import (
    InvalidModel,
    ModelNotFound,
    RefusedArgument,
    ServerStartFailed,
    ServerUnavailable,
)
from orchestrator.models import gguf_file
from tests.kit.process.projector import write_projector
from tests.kit.process.read_back import Reported, reported, write_server
from tests.kit.process.support import is_running

pytestmark = pytest.mark.external


# ------------------------------------------------------------------------------------- an Apply


def apply(orch: Orchestrator, model: str, **fields: Any) -> LoadOutcome:
    """Plan, load, and compare the plan with the outcome."""
    before, events = orch.status().loaded, orch.last_event_id
    plan = orch.plan(model, **fields)
    assert (orch.status().loaded, orch.last_event_id) == (before, events), "plan did something"
    outcome = orch.load(model, **fields)
    if before is None:
        assert (plan.action, outcome.status) == ("load", "loaded")
    elif plan.action == "none":
        assert (outcome.status, outcome.pid) == ("already_loaded", before.pid)
    else:
        assert (plan.action, outcome.status) == ("reload", "loaded")
        assert not is_running(before.pid)
    if plan.action != "none":
        assert plan.reload_reasons == outcome.reload_reasons
    planned, running = plan.argv[1:], command_line(outcome.pid)[1:]
    where = [n for n, token in enumerate(planned) if token == "<chat template>"]
    for n in where:  # written only when the server is started
        planned[n] = running[n]
    assert planned == running
    return outcome


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def reasons(outcome: LoadOutcome) -> list[str]:
    return [reason.field for reason in outcome.reload_reasons]


# ----------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        values: Two values of the field, each with what the server then reports.
        flags: A third value as extra args, with what the server then reports; empty for a field
            whose flag is refused.
        blank: What a client may send for "not set".
    """

    name: str
    values: tuple[tuple[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
    flags: tuple[str, ...] = ()
    flags_reported: dict[str, Any] = field(default_factory=dict)
    blank: Any = None


ROWS = (
    Row(
        "max_seq_length",
        ((512, {"context": 512}), (768, {"context": 768})),
        ("-c", "1024"),
        {"context": 1024},
        blank=0,
    ),
    Row(
        "cache_type_kv",
        (("q8_0", {"kv": ("q8_0", "q8_0")}), (" Q4_0", {"kv": ("q4_0", "q4_0")})),
        ("-ctk", "q5_0", "--cache-type-v", "q5_1"),
        {"kv": ("q5_0", "q5_1")},
        blank="",
    ),
    Row(
        "chat_template_override",
        (
            ("one:\n{{ messages[0].content }}", {"template": "one:\n{{ messages[0].content }}"}),
            ("'zwölf' \"{{ 12 }}\" \\", {"template": "'zwölf' \"{{ 12 }}\" \\"}),
        ),
        ("--chat-template", "three: {{ 3 }}"),
        {"template": "three: {{ 3 }}"},
        blank=" ",
    ),
    Row(
        "speculative_type",
        (
            ("ngram-simple", {"drafting": ("ngram-simple",)}),
            ("default", {"drafting": ("ngram-mod",)}),
        ),
        ("--spec-type", "ngram-map-k"),
        {"drafting": ("ngram-map-k",)},
        blank="",
    ),
    Row("n_parallel", ((1, {"slots": 1}), (3, {"slots": 3}))),
    Row(
        "llama_extra_args",
        (
            (["--top-k", "7"], {"top_k": 7}),
            (["--seed", "43", "--top_k", "9"], {"seed": 43, "top_k": 9}),
        ),
        ("--top-k", "11"),
        {"top_k": 11},
    ),
)
SEED = ("--seed", "42")
SEED_REPORTED: dict[str, Any] = {"seed": 42}


@pytest.fixture
def orch(talking_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=talking_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_with_flags = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.flags], ids=lambda row: row.name
)
each_field_with_flags = pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.flags and row.name != "llama_extra_args"],
    ids=lambda row: row.name,
)


# ------------------------------------------------------------------------------- the situations


@each
def test_a_changed_setting_reaches_the_server_and_is_the_only_reason(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """A change was once answered with "already loaded". Includes the change back to Auto."""
    plain = Reported(tiny_model)
    apply(orch, tiny_model)
    assert reported(orch) == plain
    for value, expected in row.values:
        outcome = apply(orch, tiny_model, **{row.name: value})
        assert reasons(outcome) == [row.name]
        assert reported(orch) == replace(plain, **expected)
        again = apply(orch, tiny_model, **{row.name: value})
        assert (again.status, again.pid) == ("already_loaded", outcome.pid)
    unset = [] if row.name == "llama_extra_args" else row.blank
    outcome = apply(orch, tiny_model, **{row.name: unset})
    assert reasons(outcome) == [row.name]
    assert reported(orch) == plain


def test_changing_one_of_many_settings_keeps_the_others(
    orch: Orchestrator, tiny_model: str
) -> None:
    """The panel always sends all of them."""
    settings = {row.name: row.values[0][0] for row in ROWS}
    expected = {name: what for row in ROWS for name, what in row.values[0][1].items()}
    apply(orch, tiny_model, **settings)
    assert reported(orch) == Reported(tiny_model, **expected)
    for row in ROWS:
        if row.name == "n_parallel":
            continue  # it divides the context, which has been given
        value, differs = row.values[1]
        settings[row.name] = value
        expected |= differs
        assert reasons(apply(orch, tiny_model, **settings)) == [row.name]
        assert reported(orch) == Reported(tiny_model, **expected)


@each_with_flags
def test_after_an_unload_extra_args_are_inherited_and_fields_are_not(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """Flags given at the start were once lost at the first Apply, which does not repeat them."""
    apply(orch, tiny_model, llama_extra_args=[*row.flags, *SEED])
    orch.unload()
    apply(orch, tiny_model)
    assert reported(orch) == Reported(tiny_model, **row.flags_reported | SEED_REPORTED)
    value, expected = row.values[0]
    apply(orch, tiny_model, **{"llama_extra_args": SEED, row.name: value})
    assert reported(orch) == Reported(
        tiny_model, **expected if row.name == "llama_extra_args" else expected | SEED_REPORTED
    )
    orch.unload()
    apply(orch, tiny_model)
    assert reported(orch) == Reported(
        tiny_model, **expected if row.name == "llama_extra_args" else SEED_REPORTED
    )


@each_with_flags
def test_an_empty_list_clears_extra_args_for_good(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """An omitted list inherits."""
    first = apply(orch, tiny_model, llama_extra_args=row.flags)
    assert reported(orch) == Reported(tiny_model, **row.flags_reported)
    again = apply(orch, tiny_model)
    assert (again.status, again.pid) == ("already_loaded", first.pid)
    assert reasons(apply(orch, tiny_model, llama_extra_args=[])) == ["llama_extra_args"]
    assert reported(orch) == Reported(tiny_model)
    orch.unload()
    apply(orch, tiny_model)
    assert reported(orch) == Reported(tiny_model)


@each_field_with_flags
def test_explicit_flags_beat_a_field_and_a_field_beats_inherited_flags(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """An inherited `-c 4096` once beat the new context, because the last flag wins."""
    (one, _), (two, two_reported) = row.values
    apply(orch, tiny_model, **{row.name: one, "llama_extra_args": [*row.flags, *SEED]})
    assert reported(orch) == Reported(tiny_model, **row.flags_reported | SEED_REPORTED)
    overridden = apply(orch, tiny_model, **{row.name: two})
    assert reasons(overridden) == [row.name, "llama_extra_args"]
    assert reported(orch) == Reported(tiny_model, **two_reported | SEED_REPORTED)
    assert reasons(apply(orch, tiny_model)) == [row.name]
    assert reported(orch) == Reported(tiny_model, **SEED_REPORTED)


@each_field_with_flags
def test_a_blank_field_leaves_inherited_flags_alone(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """A form always sends every field."""
    first = apply(orch, tiny_model, llama_extra_args=row.flags)
    again = apply(orch, tiny_model, **{row.name: row.blank})
    assert (again.status, again.pid) == ("already_loaded", first.pid)
    assert reported(orch) == Reported(tiny_model, **row.flags_reported)


def test_a_drafting_mode_from_extra_args_is_kept_until_it_is_switched_off(
    orch: Orchestrator, tiny_model: str
) -> None:
    """B44: a panel shows the mode and may send it back unchanged."""
    row = next(row for row in ROWS if row.name == "speculative_type")
    first = apply(orch, tiny_model, llama_extra_args=row.flags)
    assert first.speculative_type == "ngram-map-k"
    back = apply(orch, tiny_model, speculative_type=first.speculative_type)
    assert (back.status, back.pid) == ("already_loaded", first.pid)
    off = apply(orch, tiny_model, speculative_type="off")
    assert (off.status, off.speculative_type, off.llama_extra_args) == ("loaded", "off", [])
    assert reported(orch) == Reported(tiny_model)


@each_with_flags
def test_flags_of_one_model_never_reach_another(
    orch: Orchestrator, tiny_model: str, other_model: str, row: Row
) -> None:
    """And they still apply when the first model is loaded again."""
    apply(orch, tiny_model, llama_extra_args=[*row.flags, *SEED])
    assert reasons(apply(orch, other_model)) == ["model_path", "llama_extra_args"]
    assert reported(orch) == Reported(other_model)
    apply(orch, tiny_model)
    assert reported(orch) == Reported(tiny_model, **row.flags_reported | SEED_REPORTED)


@each
def test_a_failed_load_changes_no_inherited_args(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """Arguments that were stored before the load succeeded once broke every later start."""
    (one, one_reported), (two, _) = row.values
    good = {row.name: one} | ({} if row.name == "llama_extra_args" else {"llama_extra_args": SEED})
    expected = one_reported | ({} if row.name == "llama_extra_args" else SEED_REPORTED)
    running = apply(orch, tiny_model, **good)
    bad = {row.name: two, "llama_extra_args": [*row.flags, "--seed", "bogus"]}
    refused = {row.name: two, "llama_extra_args": [*row.flags, "--port=1"]}
    for call in (orch.plan, orch.load):
        with pytest.raises(RefusedArgument, match="--port is refused"):
            call(tiny_model, **refused)
    assert reported(orch) == Reported(tiny_model, **expected)
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.pid == running.pid
    assert orch.plan(tiny_model, **bad).action == "reload"
    with pytest.raises(ServerStartFailed, match="--seed"):
        orch.load(tiny_model, **bad)
    del good["llama_extra_args"]
    assert apply(orch, tiny_model, **good).status == "loaded"
    assert reported(orch) == Reported(tiny_model, **expected)


def test_a_first_load_that_fails_leaves_nothing_to_inherit(
    orch: Orchestrator, tiny_model: str, other_model: str
) -> None:
    """Neither for its own model nor for the previous one."""
    apply(orch, other_model)
    with pytest.raises(ServerStartFailed, match="--seed"):
        orch.load(tiny_model, llama_extra_args=[*SEED, "--seed", "bogus"])
    apply(orch, tiny_model)
    assert reported(orch) == Reported(tiny_model)
    apply(orch, other_model)
    assert reported(orch) == Reported(other_model)


@each
def test_the_settings_in_a_status_may_be_posted_back(
    orch: Orchestrator, tiny_model: str, row: Row
) -> None:
    """They mean the same process, and after an unload the same settings."""
    value, _ = row.values[0]
    ways: list[dict[str, Any]] = [{row.name: value}]
    if row.flags:
        ways += [{"llama_extra_args": row.flags}, {row.name: value, "llama_extra_args": row.flags}]
    for settings in ways:
        apply(orch, tiny_model, **{"llama_extra_args": (), **settings})
        before = reported(orch)
        loaded = orch.status().loaded
        assert loaded is not None
        posted = json.loads(json.dumps(loaded.as_dict()))
        back = {
            **settings,
            "gguf_variant": posted["gguf_variant"],
            "max_seq_length": posted["requested_context_length"],
            "cache_type_kv": posted["cache_type_kv"],
            "speculative_type": posted["speculative_type"],
            "llama_extra_args": posted["llama_extra_args"],
        }
        again = apply(orch, posted["model_path"], **back)
        assert (again.status, again.pid) == ("already_loaded", loaded.pid)
        orch.unload()
        apply(orch, posted["model_path"], **back)
        assert reported(orch) == before


# --------------------------------------------------------------------- what the file names decide


def test_a_replaced_model_file_is_a_reason_to_reload(orch: Orchestrator, tmp_path: Path) -> None:
    """Under the same path."""
    path = write_tiny_model(tmp_path / "m.gguf")
    apply(orch, str(path), llama_extra_args=SEED)
    assert reported(orch) == Reported(str(path), **SEED_REPORTED)
    write_tiny_model(path, context_length=1536)
    assert reasons(apply(orch, str(path))) == ["model_path"]
    assert reported(orch) == Reported(str(path), context=1536, **SEED_REPORTED)


def test_a_replaced_server_binary_is_a_reason_to_reload(
    llama_server: str, tiny_model: str, state_dir: Path, tmp_path: Path
) -> None:
    """An update of llama.cpp takes effect at the next Apply."""
    path = tmp_path / "llama-server"
    write_server(path, llama_server)
    with Orchestrator(llama_server=path, state_dir=state_dir) as orch:
        apply(orch, tiny_model, llama_extra_args=SEED)
        write_server(path, llama_server, LLAMA_ARG_CTX_SIZE="1280")
        assert reasons(apply(orch, tiny_model)) == ["llama_server"]
        assert reported(orch) == Reported(tiny_model, context=1280, **SEED_REPORTED)


def test_a_plan_reads_a_header_again_only_when_the_file_changed(
    llama_server: str,
    tiny_model: str,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replaced, truncated, removed and unreadable files are noticed."""
    read: list[str] = []

    def reading(path: str) -> Any:
        read.append(Path(path).name)
        return FileIO(path)

    monkeypatch.setattr(gguf_file, "FileIO", reading)
    count = 100  # a split model of terabytes
    parts = [tmp_path / f"m-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    for part in parts:
        shutil.copy(tiny_model, part)
    server = tmp_path / "llama-server"
    write_server(server, llama_server)
    orch = Orchestrator(llama_server=server, state_dir=state_dir)
    orch.plan(str(parts[0]))
    assert Counter(read) == {part.name: 2 for part in parts}, "whole, and for its role"
    orch.plan(str(parts[0]))
    assert len(read) == 2 * count
    write_tiny_model(parts[1], seed=1)
    orch.plan(str(parts[0]))
    assert read[2 * count :] == [parts[1].name] * 2
    server.chmod(0o644)
    with pytest.raises(ServerUnavailable, match="not executable"):
        orch.plan(str(parts[0]))
    os.truncate(parts[2], 1000)
    with pytest.raises(InvalidModel, match=parts[2].name):
        orch.plan(str(parts[0]))
    parts[3].unlink()
    with pytest.raises(ModelNotFound, match=parts[3].name):
        orch.plan(str(parts[0]))


def test_extra_args_belong_to_the_variant_that_was_picked(
    orch: Orchestrator, tmp_path: Path
) -> None:
    """The label of a picked variant once did not match itself."""
    small, large = tmp_path / "m-Q4_K_M.gguf", tmp_path / "m-Q8_0.gguf"
    write_tiny_model(small)
    write_tiny_model(large, seed=1)
    folder = str(tmp_path)
    picked = apply(orch, folder, llama_extra_args=SEED)
    assert reported(orch) == Reported(str(small), **SEED_REPORTED)
    for name in (picked.gguf_variant, "q4_k_m", small.name, None):
        again = apply(orch, folder, gguf_variant=name)
        assert (again.status, again.pid) == ("already_loaded", picked.pid)
    apply(orch, folder, gguf_variant="Q8_0")
    assert reported(orch) == Reported(str(large))
    apply(orch, folder, gguf_variant="Q4_K_M")
    assert reported(orch) == Reported(str(small), **SEED_REPORTED)


def test_drafting_is_ignored_for_a_vision_model(
    orch: Orchestrator, tiny_model: str, tmp_path: Path
) -> None:
    """It once made every Apply of a vision model a reload."""
    projector = str(write_projector(tmp_path / "mmproj.gguf"))
    apply(orch, tiny_model, speculative_type="ngram-mod")
    assert reported(orch) == Reported(tiny_model, drafting=("ngram-mod",))
    seeing = apply(orch, tiny_model, mmproj_path=projector, speculative_type="ngram-mod")
    assert reasons(seeing) == ["mmproj_path", "speculative_type"]
    assert reported(orch) == Reported(tiny_model, vision=True)
    for mode in ("ngram-mod", "ngram-simple", "default", "off", None):
        again = apply(orch, tiny_model, mmproj_path=projector, speculative_type=mode)
        assert (again.status, again.pid) == ("already_loaded", seeing.pid)
