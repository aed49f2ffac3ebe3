"""The command line of the server, and which drafting mode it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.server import embedded
from orchestrator.settings.argv import build_argv
from orchestrator.settings.files import HubModel
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.help_text import Catalogue, FlagHelp
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target, differences
from tests.kit.settings import (
    FIELDS,
    PROJECTOR,
    SECRET,
    TOKENS,
    file,
    local,
    not_downloaded,
    repeatable,
    request,
)
from tests.kit.settings import target as any_target

SHARDS = ("/m/a-00001-of-00002.gguf", "/m/a-00002-of-00002.gguf")
PREFIX = ("/bin/python", "-m", "server")
START = (*PREFIX, "-m", SHARDS[0], "--alias", "a", "--host", "127.0.0.1", "--port", "0")
SERVER = ServerBinary("embedded", PREFIX, file("/bin/python"))


def target(*, projector: bool = False, **values: Any) -> Target:
    model = local(*SHARDS, projector=PROJECTOR if projector else None)
    return any_target(model=model, server=SERVER, **values)


def managed(wanted: Target, template_file: str | None = None) -> tuple[str, ...]:
    """Return what follows the model and the address."""
    argv = build_argv(wanted, template_file=template_file)
    assert argv[: len(START)] == START
    return argv[len(START) :]


def test_a_request_without_settings_adds_no_flags() -> None:
    assert managed(target()) == ()


def test_extra_args_come_last_after_flags_in_a_fixed_order() -> None:
    """The last flag wins: an explicit one beats a field."""
    wanted = target(
        max_seq_length=4096,
        n_parallel=2,
        cache_type_kv="q8_0",
        speculative_type="ngram-simple",
        chat_template_override="{{ x }}",
        llama_extra_args=["-c", "512", "--temp", "-1"],
        hf_token=SECRET,
    )
    assert managed(wanted, "/tmp/t.jinja") == (
        *("-c", "4096", "-ctk", "q8_0", "-ctv", "q8_0", "--parallel", "2"),
        *("--spec-type", "ngram-simple", "--jinja", "--chat-template-file", "/tmp/t.jinja"),
        *("-c", "512", "--temp", "-1"),
    )


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"kind": "embedding"}, "--embedding --cache-ram 0"),
        ({"kind": "rerank", "cache_ram_mib": 64}, "--rerank --cache-ram 64"),
        ({"kind": "embedding", "pooling": "cls"}, "--embedding --pooling cls --cache-ram 0"),
        ({"cache_ram_mib": 0}, "--cache-ram 0"),
    ],
)
def test_kind_sets_its_flags_and_caches_prompts_for_chat_only(
    values: dict[str, Any], flags: str
) -> None:
    assert managed(target(**values)) == tuple(flags.split())


def test_argv_uses_the_flag_names_of_its_binary() -> None:
    """B43: builds name the same flag differently, or lack it."""
    flags = ("-m --model", "--spec-type", "--spec-ngram-size-n", "--draft-min", "--draft-max")
    old = Catalogue(tuple(FlagHelp(tuple(f.split()), placeholder="N") for f in flags))
    wanted = target(speculative_type="ngram-mod")
    wanted = replace(wanted, server=replace(wanted.server, catalogue=old))
    assert managed(wanted)[:4] == ("--spec-type", "ngram-mod", "--spec-ngram-size-n", "24")


def test_argv_of_a_plan_names_a_model_that_is_not_downloaded() -> None:
    argv = build_argv(any_target(model=not_downloaded(), server=SERVER), template_file=None)
    assert argv[3:5] == ("-m", "</models/a.gguf>")


def test_a_vision_model_gets_its_projector_and_no_drafting() -> None:
    """llama-server cannot draft with images."""
    flags = managed(target(projector=True, speculative_type="default"))
    assert flags == ("--mmproj", PROJECTOR.path)


@repeatable
@given(
    st.integers(0, 9999),
    st.none() | st.integers(1, 64),
    st.sampled_from([None, *CACHE_TYPES]),
    st.sampled_from([None, "default", "ngram-mod", "other"]),
    st.none() | st.just("{{ x }}"),
    st.lists(TOKENS, max_size=8),
    st.booleans(),
)
def test_argv_contains_no_secret_and_ends_with_the_extra_args(
    context: int,
    parallel: int | None,
    cache: str | None,
    mode: str | None,
    template: str | None,
    args: list[str],
    projector: bool,
) -> None:
    """Every user of the machine can read an argv."""
    wanted = target(
        projector=projector,
        max_seq_length=context,
        n_parallel=parallel,
        cache_type_kv=cache,
        speculative_type=mode,
        chat_template_override=template,
        llama_extra_args=args,
        hf_token=SECRET,
    )
    argv = build_argv(wanted, template_file="/t" if template else None)
    assert all(SECRET not in token for token in argv)
    assert argv[len(argv) - len(args) :] == tuple(args)
    assert all(isinstance(token, str) and token for token in argv)
    assert argv.count("--port") == 1
    ours = argv[len(START) : len(argv) - len(args)]
    assert ("-c" in ours) == (context > 0)
    assert ("--parallel" in ours) == (parallel is not None)


# ---------------------------------------------------------------------------------------- drafting


@pytest.mark.parametrize("value", ["off", "OFF", "none", "None"])
def test_off_adds_no_flags(value: str) -> None:
    assert request(speculative_type=value).speculative_type == "off"
    assert target(speculative_type=value).speculative_type is None
    assert managed(target(speculative_type=value)) == ()


@pytest.mark.parametrize(
    ("args", "mode"),
    [
        ((), "off"),
        (("--temp", "1"), "off"),
        (("--spec-default",), "default"),
        (("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "12"), "ngram-mod"),
        (("--spec_type=NGRAM-Simple",), "ngram-simple"),
        (("--spec-type", "ngram-mod", "--spec-type", "ngram-simple"), "ngram-mod,ngram-simple"),
        (("--spec-type", "ngram-mod,ngram-simple"), "ngram-mod,ngram-simple"),
        (("--spec-type", "none"), "off"),
        (("--spec-type", "none", "-md", "d.gguf"), "off"),
        (("-md", "d.gguf"), "draft"),
        (("--spec-type", "draft-eagle3", "-md", "d.gguf"), "draft-eagle3"),
        (("--spec-type",), "off"),
        (("--spec-type", "a,none,,b,a"), "a,b"),
        (("--spec-type=a,none,b", "--temp", "1"), "a,b"),
    ],
)
def test_explicit_mode_is_reported_and_survives_being_posted_back(
    args: tuple[str, ...], mode: str
) -> None:
    """B44: a panel shows it and posts it back."""
    running = target(llama_extra_args=args)
    assert running.effective_speculative_type == mode
    committed = {running.source: running.extra_args}
    back = target(speculative_type=mode).inheriting(committed)
    assert back.extra_args == args
    assert not differences(running, back)
    assert build_argv(back, template_file=None) == build_argv(running, template_file=None)
    both = target(speculative_type=mode, llama_extra_args=args)
    assert not differences(running, both)


@pytest.mark.parametrize("chosen", ["off", "default", "ngram-simple"])
def test_requested_mode_replaces_an_inherited_explicit_one(chosen: str) -> None:
    """`off` too: otherwise drafting would silently stay on."""
    args = ("--spec-type", "ngram-mod", "--temp", "1", "--spec-ngram-mod-n-match", "12")
    wanted = target(speculative_type=chosen)
    made = wanted.inheriting({wanted.source: args})
    assert made.extra_args == ("--temp", "1")
    assert made.effective_speculative_type == chosen


# ---------------------------------------------------------------------------------------- read back

EXPLICIT = st.lists(
    st.sampled_from(
        [
            ("-c", "512"),
            ("--ctx-size", "1024"),
            ("-ctk", "f16"),
            ("--cache-type-v", "f32"),
            ("--spec-type", "ngram-simple"),
            ("--spec-default",),
            ("--temp", "-1"),
            ("--seed", "-1"),
            ("--no-jinja",),
            ("-t", "4"),
        ]
    ),
    max_size=4,
)


def as_read(argv: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return the values of each flag in order, as a server parses a command line."""
    read: dict[str, list[Any]] = {}
    for flag, value in embedded.parse(argv):
        read.setdefault(flag.names.split()[0], []).append(value)
    return read


@repeatable
@given(FIELDS, EXPLICIT, st.booleans())
def test_parsed_command_line_is_the_request_it_was_built_from(
    values: dict[str, Any], chosen: list[tuple[str, ...]], vision: bool
) -> None:
    """Extra args follow the fields, and nothing changes the address."""
    args = [token for tokens in chosen for token in tokens]
    wanted = target(**values, llama_extra_args=args, projector=vision)
    made = wanted.request
    argv = build_argv(wanted, template_file=None)
    read = as_read(argv[len(PREFIX) :])
    explicit = as_read(("-m", "any", *args))

    assert (read["-m"], read["--host"], read["--port"]) == ([SHARDS[0]], [["127.0.0.1"]], [0])
    assert read.get("-mm", []) == ([PROJECTOR.path] if vision else [])
    assert read.get("-np", []) == ([] if made.n_parallel is None else [made.n_parallel])
    context = [made.max_seq_length] if made.max_seq_length else []
    assert read.get("-c", []) == context + explicit.get("-c", [])
    kv = [f"GGML_TYPE_{made.cache_type_kv.upper()}"] if made.cache_type_kv else []
    for name in ("-ctk", "-ctv"):
        assert read.get(name, []) == kv + explicit.get(name, [])

    by_hand = "--spec-type" in explicit or "--spec-default" in explicit
    mode = None if by_hand or vision else made.speculative_type
    assert len(read.get("--spec-default", [])) == (
        (mode == "default") + len(explicit.get("--spec-default", []))
    )
    managed = [["ngram-mod"]] if mode == "ngram-mod" else []
    assert read.get("--spec-type", []) == managed + explicit.get("--spec-type", [])

    again = replace(wanted, request=LoadRequest.from_dict(made.as_dict()))
    assert build_argv(again, template_file=None) == argv


@pytest.mark.parametrize(
    ("path", "alias"),
    [
        ("/m/Qwen3-0.6B-Q4_K_M.gguf", "Qwen3-0.6B-Q4_K_M"),
        ("/m/big-00001-of-00009.gguf", "big"),
        ("/m/a,b.gguf", "a_b"),
        ("/m/caf\udce9\n.gguf", "caf__"),
        ("/m/--port.gguf", "port"),
        ("/m/--.gguf", "model"),
        ("/m/no ending", "no ending"),
    ],
)
def test_a_file_is_called_by_its_name_in_answers(path: str, alias: str) -> None:
    """No path of this machine, no list of names, no second flag, and valid UTF-8."""
    assert any_target(model=local(path), server=SERVER).alias == alias


@pytest.mark.parametrize(("variant", "alias"), [("Q4_K_M", "o/B:Q4_K_M"), (None, "o/B")])
def test_a_model_of_the_hub_is_called_by_repo_and_variant(variant: str | None, alias: str) -> None:
    model = replace(not_downloaded(), variant=variant)
    model = replace(model, hub=replace(cast("HubModel", model.hub), repo="o/B"))
    assert any_target(model=model, server=SERVER).alias == alias
