"""Refused flags: in every spelling, in extra args and as environment variables."""

from __future__ import annotations

import time
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, RefusedArgument
from orchestrator.server import embedded_flags
from orchestrator.server.environment import check_server_env, child_environment
from orchestrator.settings import flags, reach
from orchestrator.settings.fields import REFUSED, SHADOWED, check_extra_args, strip_shadowed
from orchestrator.settings.flags import MAX_BYTES, MAX_TOKENS, flag_of
from orchestrator.settings.help_text import Catalogue, parse_help
from tests.kit.labels import label
from tests.kit.sentences import assert_sentence
from tests.kit.settings import (
    ANY_TEXT,
    PADDING,
    REFUSED_FLAGS,
    SLOT,
    refusal,
    repeatable,
    request,
)

# --------------------------------------------------------------------------------- refused flags


def is_accepted(*args: str) -> bool:
    error = refusal(lambda: check_extra_args(args))
    assert error is None or (error.field == "llama_extra_args" and len(str(error)) < 400)
    return error is None


def spellings(flag: str) -> list[tuple[str, ...]]:
    """Return every way to write a flag that some parser might understand."""
    ways = [
        (flag,),
        (flag, "value"),
        (f"{flag}=value",),
        (f"{flag}=",),
        (f"{flag} = value",),
        (f"  {flag}",),
        (f"{flag}  ",),
        (f"\u00a0{flag}\u2003",),
        (flag.upper(),),
        (f"{flag.title()}=1",),
        (f"{flag} value",),
        (f"{flag}:value",),
        (f"{flag}/value",),
        (flag.replace("-", "_").replace("_", "-", 1),),
        ("--temp", "0.5", flag),
        ("--temp", flag),
    ]
    if flag.startswith("--"):
        ways += [(f"--{flag[2:].replace('-', '_')}",), (f"--{flag[2:].replace('-', '_')}=x",)]
        ways += [(flag[1:],), (f"{flag[1:]}=x",)]
    else:
        ways += [(f"{flag}8",), (f"{flag.upper()}16",), (f"{flag}8x",), (f"{flag}/models/x.gguf",)]
    return ways


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_a_flag_the_orchestrator_owns_is_refused_in_every_spelling(flag: str) -> None:
    """B42: as `--flag=value`, `--flag_with_underscores` or `-np8`."""
    for args in spellings(flag):
        with pytest.raises(RefusedArgument) as caught:
            check_extra_args(args)
        assert caught.value.field == "llama_extra_args"
        assert str(caught.value).startswith(f"{flag} is refused in "), args
        with pytest.raises(RefusedArgument):
            request(llama_extra_args=args)


@pytest.mark.parametrize(
    "token",
    ["-mmodel.gguf", "-hfowner/name:Q4_K_M", "-aname1", "-hffile.gguf", "-drrepo/x", "-agon!"],
)
def test_a_value_attached_to_a_short_flag_is_refused(token: str) -> None:
    """No build accepts it, but finding that out would cost the running server."""
    with pytest.raises(RefusedArgument):
        check_extra_args((token,))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("-b", "-b is refused in llama_extra_args: why b"),
        ("-bc", "-bc is refused in llama_extra_args: why bc"),
        ("-b7", "-b is refused in llama_extra_args: why b"),
        ("-bcd/x", "-bc is refused in llama_extra_args: why bc"),
        ("--long=1", "--long is refused in llama_extra_args: why b"),
        ("-long", "--long is refused in llama_extra_args: why b"),
        ("--longer", None),
        ("--longer7", None),
        ("-cb", None),
    ],
)
def test_longest_refused_flag_that_a_token_begins_with_is_named(
    token: str, message: str | None
) -> None:
    refused = flags.RefusedFlags({"why b": "-b --long", "why bc": "-bc"})
    if message is None:
        refused.check((token,))
    else:
        with pytest.raises(RefusedArgument) as raised:
            refused.check((token,))
        assert raised.value.message == message


def test_refused_flags_are_exactly_those_of_the_kit() -> None:
    assert sorted(" ".join(REFUSED.values()).split()) == sorted(REFUSED_FLAGS)
    assert len(set(REFUSED_FLAGS)) == len(REFUSED_FLAGS)


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("settings.refused_model", "-m"),
        ("settings.refused_repo", "--hf-repo"),
        ("settings.refused_file", "--hf-file"),
        ("settings.refused_token", "--hf-token"),
        ("settings.refused_source", "--model-url"),
        ("settings.refused_alias", "--alias"),
        ("settings.refused_kind", "--embeddings"),
        ("settings.refused_pooling", "--pooling"),
        ("settings.refused_address", "--port"),
        ("settings.refused_keys", "--api-key"),
        ("settings.refused_ui", "--webui"),
        ("settings.refused_router", "--models-dir"),
        ("settings.refused_tools", "--tools"),
        ("settings.refused_cors", "--cors-origins"),
        ("settings.refused_files", "--log-file"),
        ("settings.refused_exit", "--help"),
        ("settings.refused_preset", "--embd-gemma-default"),
        ("settings.refused_field", "--parallel"),
    ],
)
def test_refusal_says_why(key: str, flag: str) -> None:
    with pytest.raises(RefusedArgument) as caught:
        check_extra_args((flag,))
    assert_sentence(key, str(caught.value))


ALLOWED: list[tuple[str, ...]] = [
    ("-c", "4096"),
    ("--ctx-size=8192",),
    ("-ngl", "99"),
    ("-ngl", "-1"),
    ("-t", "4"),
    ("-t8",),
    ("-fa", "on"),
    ("--flash-attn",),
    ("--fit", "on"),
    ("--fit-target", "512"),
    ("--fit-ctx", "4096"),
    ("-ctk", "q8_0", "-ctv", "q8_0"),
    ("--cache-type-k", "f16"),
    ("--spec-default",),
    ("--spec-type", "ngram-simple"),
    ("-md", "/models/draft.gguf"),
    ("--chat-template", "chatml"),
    ("--chat-template-file", "/t.jinja"),
    ("--chat-template-kwargs", '{"enable_thinking": false}'),
    ("--jinja",),
    ("--mlock",),
    ("--no-mmap",),
    ("--slots",),
    ("--props",),
    ("--metrics",),
    ("--temp", "0.7", "--top-k", "20", "--top-p", "0.95", "--min-p", "0", "--seed", "42"),
    ("--seed", "-1"),
    ("-mg", "0"),
    ("-hfd", "owner/draft"),
    ("-mg0", "-md/draft.gguf", "-mmdev", "none"),  # not `-m`
    ("-mla", "3", "-amb", "512", "-fmoe"),  # a fork's own
    ("-C", "0xff", "-Cr", "0-3"),  # not `-c`: case matters to llama-server
    ("--no-host", "--no-mmproj", "--mmproj-offload", "--offline", "--models-are-fun"),
    ("--reverse-prompt", "-already seen", "-r", "- stop"),
    ("--modelling", "x"),
    ("-", "--", ""),
    ("--grammar", 'root ::= "--host"'),
    ("--threads-http", "4"),
    ("--no-webui-but-not-really",),
    ("ä", "日本", "'; rm -rf /'"),
]


@pytest.mark.parametrize("args", ALLOWED, ids=label)
def test_an_allowed_flag_is_accepted_unchanged(args: tuple[str, ...]) -> None:
    assert request(llama_extra_args=args).llama_extra_args == args


@pytest.mark.parametrize(
    "value",
    ["-1", "-0.5", "-.5", "-1.", "-1e-5", "-0.5e3", "-2E+3", "+1", " -3 ", "7", "-inf", "-NaN"],
)
def test_a_negative_number_is_a_value(value: str) -> None:
    assert flag_of(value) is None
    check_extra_args(("--temp", value))
    assert strip_shadowed(("-c", value, "--mlock"), ["max_seq_length"]) == ("--mlock",)


@pytest.mark.parametrize(
    ("token", "flag"),
    [
        ("-c", "-c"),
        ("--ctx_size", "--ctx-size"),
        ("--ctx_size=a_b", "--ctx-size"),
        (" --jinja ", "--jinja"),
        ("--x=a=b", "--x"),
        ("-a_b", "-a_b"),
        ("-1x", "-1x"),
        ("-.", "-."),
        ("-info", "-info"),
        ("-\u0661", "-\u0661"),  # an Arabic 1 is no number to llama-server
        ("\u2013\u2013host", None),  # dashes of a word processor: no flag to llama-server either
        ("-", None),
        ("--", None),
        ("", None),
        ("value", None),
        ("a-b", None),
        ("-5", None),
    ],
)
def test_a_token_names_a_flag_or_is_a_value(token: str, flag: str | None) -> None:
    assert flag_of(token) == flag


@pytest.mark.parametrize(
    "args",
    [
        ("x",) * (MAX_TOKENS + 1),
        ("x" * (MAX_BYTES + 1),),
        ("ä" * (MAX_BYTES // 2 + 1),),
        ("x" * (MAX_BYTES // 2), "x" * (MAX_BYTES // 2), "x"),
        ("a\x00b",),
        ("a\nb",),
        ("a\x1bb",),
        ("a\x7fb",),
        ("a\x85b",),
        ("--grammar", "\t"),
        ("\ud800",),
    ],
    ids=["tokens", "bytes", "bytes, not characters", "bytes in all", *"0n[78", "tab", "surrogate"],
)
def test_args_that_no_server_could_accept_are_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_extra_args(args)
    assert caught.value.field == "llama_extra_args"
    assert not isinstance(caught.value, RefusedArgument)


def test_largest_allowed_args_are_accepted() -> None:
    check_extra_args(("x",) * MAX_TOKENS)
    check_extra_args(("x" * MAX_BYTES,))
    assert (MAX_TOKENS, MAX_BYTES) == (256, 32 * 1024)


@st.composite
def respelled(draw: st.DrawFn, flag: str) -> str:
    """Draw a token that a caller could mean this flag by."""
    dashes = "--" if flag.startswith("--") else "-"
    swap = st.sampled_from([str.lower, str.upper, lambda c: "_" if c == "-" else c])
    name = "".join(draw(swap)(c) for c in flag.removeprefix(dashes))
    if dashes == "--" and draw(st.booleans()) and draw(st.booleans()):
        dashes = "-"
    values = ["", "=", "=x", " = x", " x", ":80", "/m.gguf", "=--temp", "=-1"]
    if not any(c.isdigit() for c in flag):
        values += ["8", "8080", "1.5"]
    return draw(PADDING) + dashes + name + draw(st.sampled_from(values)) + draw(PADDING)


HARMLESS = st.sampled_from(["--temp", "0.5", "-1", "-c", "4096", "x", "--jinja", "", "-", "--"])


@repeatable
@given(st.data(), st.lists(HARMLESS, max_size=6))
def test_a_flag_refused_in_one_spelling_is_refused_in_all(
    data: st.DataObject, others: list[str]
) -> None:
    """B42. Also in the place of another flag's value: only the server knows which it is."""
    flag = data.draw(st.sampled_from(REFUSED_FLAGS))
    at = data.draw(st.integers(0, len(others)))
    args = (*others[:at], data.draw(respelled(flag)), *others[at:])
    check_extra_args(tuple(others))
    with pytest.raises(RefusedArgument) as caught:
        check_extra_args(args)
    assert str(caught.value).startswith(f"{flag} is refused in "), args


EDITS = st.sampled_from(["-", "_", "--", "n", "o", "=", " ", "8", "/", "M", "host", "\u2003", "."])


@repeatable
@given(st.sampled_from(REFUSED_FLAGS), st.lists(st.tuples(st.integers(0, 12), EDITS), max_size=4))
def test_no_token_that_the_server_reads_as_a_refused_flag_passes(
    flag: str, edits: list[tuple[int, str]]
) -> None:
    """The server's rule: exact names, and `_` for `-` after two dashes."""
    token = flag
    for at, what in edits:
        token = token[:at] + what + token[at + (what == "_") :]
    read = token.replace("_", "-") if token.startswith("--") else token
    if is_accepted(token):
        assert edits
        assert read not in REFUSED_FLAGS
        assert flag_of(token) not in REFUSED_FLAGS


KNOWN = cast("Catalogue", parse_help(embedded_flags.usage()))
ALLOWED_FLAGS = sorted({n for f in KNOWN.flags for n in f.names} - set(REFUSED_FLAGS))


@repeatable
@given(st.sampled_from(ALLOWED_FLAGS), ANY_TEXT, st.booleans())
def test_an_allowed_flag_is_never_mistaken_for_a_refused_one(
    flag: str, value: str, has_underscores: bool
) -> None:
    """`-mg` is not `-m` with a value."""
    if has_underscores and flag.startswith("--"):
        flag = "--" + flag[2:].replace("-", "_")
    harmless = "".join(c for c in value if c.isprintable()).lstrip(" -")
    for args in ((flag,), (flag, harmless), (flag, "-1"), (f"{flag}={harmless}",)):
        check_extra_args(args)


@repeatable
@given(st.lists(ANY_TEXT | st.text(st.sampled_from("-_=mnph 8.\u2003\ud800\0"), max_size=9)))
def test_any_tokens_are_accepted_unchanged_or_refused(args: list[str]) -> None:
    if is_accepted(*args):
        assert request(llama_extra_args=args).llama_extra_args == tuple(args)
        assert not any(flag_of(token) in REFUSED_FLAGS for token in args)


LONG = MAX_BYTES - 8


@pytest.mark.parametrize(
    "token",
    [
        f"-{'1' * LONG}x",
        f"-1.{'1' * LONG}x",
        f"-1e{'1' * LONG}x",
        "-" * LONG,
        f"-{'a' * LONG}8",
        f"-{'m-' * (LONG // 2)}8",
        f"--{'a_' * (LONG // 2)}=",
        f"-{' ' * LONG}x",
        "\u2003" * (LONG // 3),
    ],
    ids=lambda token: label(f"{token[:3]}...{token[-2:]}"),
)
def test_hostile_token_is_read_in_linear_time(token: str) -> None:
    """A pattern that backtracks would block the event loop for seconds."""
    started = time.process_time()
    flag_of(token)
    strip_shadowed((token,), SHADOWED)
    is_accepted(token)
    assert time.process_time() - started < 0.2


# ------------------------------------------------------------------------ environment variables

VARIABLES = """
    LLAMA_ARG_MODEL LLAMA_ARG_MODEL_URL LLAMA_ARG_DOCKER_REPO LLAMA_ARG_HF_REPO LLAMA_ARG_HF_FILE
    LLAMA_ARG_HF_REPO_V LLAMA_ARG_HF_FILE_V LLAMA_ARG_MMPROJ LLAMA_ARG_MMPROJ_URL LLAMA_ARG_ALIAS
    LLAMA_ARG_HOST LLAMA_ARG_PORT LLAMA_ARG_STATIC_PATH LLAMA_ARG_API_PREFIX LLAMA_ARG_REUSE_PORT
    LLAMA_ARG_API_KEY_FILE LLAMA_ARG_SSL_KEY_FILE LLAMA_ARG_SSL_CERT_FILE
    LLAMA_ARG_UI LLAMA_ARG_NO_UI LLAMA_ARG_WEBUI LLAMA_ARG_NO_WEBUI LLAMA_ARG_UI_CONFIG
    LLAMA_ARG_UI_CONFIG_FILE LLAMA_ARG_UI_MCP_PROXY LLAMA_ARG_NO_UI_MCP_PROXY
    LLAMA_ARG_MODELS_DIR LLAMA_ARG_MODELS_PRESET LLAMA_ARG_MODELS_MAX LLAMA_ARG_MODELS_AUTOLOAD
    LLAMA_ARG_NO_MODELS_AUTOLOAD LLAMA_ARG_TOOLS LLAMA_ARG_TOOLS_RUNTIME LLAMA_ARG_AGENT
    LLAMA_ARG_MCP_SERVERS_CONFIG LLAMA_ARG_MCP_SERVERS_JSON
    LLAMA_ARG_CORS_ORIGINS LLAMA_ARG_CORS_METHODS LLAMA_ARG_CORS_HEADERS LLAMA_ARG_CORS_CREDENTIALS
    LLAMA_ARG_LOG_FILE LLAMA_ARG_EMBEDDINGS LLAMA_ARG_RERANKING LLAMA_ARG_POOLING
    LLAMA_ARG_N_PARALLEL
"""
OTHER_VARIABLES = "HF_TOKEN LLAMA_API_KEY LLAMA_SERVER_ROUTER_PORT AIP_MODE AIP_HTTP_PORT"


@pytest.mark.parametrize("name", (VARIABLES + OTHER_VARIABLES).split())
def test_the_variable_of_a_refused_flag_never_reaches_the_server(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server reads the environment before its arguments."""
    monkeypatch.setenv(name, "of the host")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = child_environment({"NAMED": "1"}, SLOT)
    assert "of the host" not in environment.values()
    assert {"CUDA_VISIBLE_DEVICES", "NAMED", "SLOT"} <= environment.keys()


@pytest.mark.parametrize("name", [*VARIABLES.split(), "HF_TOKEN", "AIP_HTTP_PORT"])
def test_server_env_cannot_set_the_variable_of_a_refused_flag(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        check_server_env({"FINE": "1", name: "secret"})
    assert caught.value.field == "server_env"
    assert "secret" not in str(caught.value)


# Files that args name


@pytest.mark.parametrize(
    ("args", "files"),
    [
        ("--lora a.gguf", [("--lora", "a.gguf")]),
        ("--lora=a.gguf", [("--lora", "a.gguf")]),
        ("--lora-scaled a.gguf 0.5", [("--lora-scaled", "a.gguf")]),
        ("--lora-scaled a:0.5,b:1 /c", [("--lora-scaled", "a:0.5,b:1")]),
        ("--lora --top-k", [("--lora", "--top-k")]),
        ("--lora= --top-k 1", [("--lora", "")]),
        ("-md -1 --mlock x", [("-md", "-1")]),
        ("--chat_template_file t --grammar-file g", [("--chat-template-file", "t"),
                                                     ("--grammar-file", "g")]),
        ("--top-k a.gguf --rpc /x stray", []),
        ("--lora", []),
        ("", []),
    ],
)  # fmt: skip
def test_files_are_the_values_of_flags_that_take_one(
    args: str, files: list[tuple[str, str]]
) -> None:
    """The token after such a flag is its file, whatever it looks like; no other token is."""
    assert list(reach.named_files(args.split())) == files


@pytest.mark.parametrize(
    ("args", "paths"),
    [
        ("--lora b", [("--lora", "b")]),
        (
            "--lora a:1,b",
            [("--lora", "a"), ("--lora", "a:1"), ("--lora", "a:1,b"), ("--lora", "b")],
        ),
        ("--new /x ~y ./z ../w v", [("--new", p) for p in ("/x", "~y", "./z", "../w")]),
        ("--new=/x", [("--new", "/x")]),
        ("/stray", [("", "/stray")]),
        (
            "--rpc host --rpc=/x",
            [("--rpc", None), ("--rpc", "host"), ("--rpc", None), ("--rpc", "/x")],
        ),
        ("--lora --rpc", [("--lora", "--rpc")]),
        ("--top-k 1 -5", []),
        ("-r /end --samplers a;b", []),  # listed, so their values are no paths
        ("--new 1.5 --new-file 2 --new on", []),
        ("--new-file x --new_url=y", [("--new-file", "x"), ("--new-url", "y")]),
        ("--new 10.0.0.1:50052", [("--new", "10.0.0.1"), ("--new", "10.0.0.1:50052")]),
        ("--new secret.txt", [("--new", "secret.txt")]),
        ("--new 10.0.0.1", [("--new", "10.0.0.1")]),  # an address is no number
    ],
)
def test_paths_are_files_of_flags_and_whatever_looks_like_one(
    args: str, paths: list[tuple[str, str | None]]
) -> None:
    assert list(reach.named_paths(args.split())) == paths
