"""llama-server's flags: what is refused, in every spelling; what a field takes over; the argv.

The tables are written down here a second time, from the record of what llama-server accepts: a
flag dropped from the library's own table by accident is noticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, RefusedArgument
from orchestrator.settings.argv import build_argv
from orchestrator.settings.fields import REFUSED, SHADOWED, check_extra_args, strip_shadowed
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.flags import (
    CACHE_TYPES,
    MAX_BYTES,
    MAX_TOKENS,
    flag_of,
    normal_cache_type,
    normal_speculative_type,
    speculative_flags,
)
from orchestrator.settings.help_text import Catalogue, FlagHelp
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target, differences, groups_set_by
from tests.kit.labels import label

repeatable = settings(derandomize=True, deadline=None, max_examples=200)

REFUSED_TEXT = """
    -m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hfv -hfrv
    --hf-repo-v -hffv --hf-file-v -hft --hf-token -mm --mmproj -mmu --mmproj-url -a --alias
    --host --port --path --api-prefix --reuse-port
    --api-key --api-key-file --ssl-key-file --ssl-cert-file
    --webui --no-webui --ui --no-ui --ui-config --webui-config --ui-config-file
    --webui-config-file --ui-mcp-proxy --no-ui-mcp-proxy --webui-mcp-proxy --no-webui-mcp-proxy
    --models-dir --models-preset --models-max --models-autoload --no-models-autoload
    --tools --tools-runtime -ag --agent -no-ag --no-agent --mcp-servers-config --mcp-servers-json
    --cors-origins --cors-methods --cors-headers --cors-credentials --no-cors-credentials
    --media-path --slot-save-path --log-file --log-disable --log-prompts-dir
    --embedding --embeddings --rerank --reranking --pooling -h --help --usage --version
    --list-devices -cl --cache-list --completion-bash
    --embd-gemma-default --embd-bge-small-en-default --embd-e5-small-en-default
    --embd-gte-small-default --fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default
    --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default
    --gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
    -np --parallel --n-parallel
"""
REFUSED_FLAGS = REFUSED_TEXT.split()

SHADOW_GROUPS = {
    "max_seq_length": "-c --ctx-size",
    "cache_type_kv": "-ctk --cache-type-k -ctv --cache-type-v",
    "speculative_type": (
        "--spec-type --spec-ngram-size-n --spec-ngram-size --draft-min --draft-max "
        "--spec-ngram-mod-n-match --spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-draft-n-max "
        "--spec-draft-n-min --spec-draft-p-min --spec-draft-p-split -md --model-draft "
        "--spec-draft-model -hfd -hfrd --hf-repo-draft --spec-draft-hf "
        "--draft --draft-n --draft-n-min --draft-p-min --draft-p-split"
    ),
    "chat_template_override": "--chat-template --chat-template-file --chat-template-kwargs",
    "cache_ram_mib": "-cram --cache-ram",
}
BOOLEAN_FLAGS = {
    "speculative_type": "--spec-default",
    "chat_template_override": "--jinja --no-jinja",
}


def spellings(flag: str) -> list[tuple[str, ...]]:
    """Every way to write a flag that some parser might understand."""
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
    """B42: a denied flag slips through as `--flag=value`, `--flag_with_underscores` or `-np8`."""
    for args in spellings(flag):
        with pytest.raises(RefusedArgument) as caught:
            check_extra_args(args)
        assert caught.value.field == "llama_extra_args"
        assert f"{flag} is refused: " in str(caught.value), args
        with pytest.raises(RefusedArgument):
            LoadRequest(model_path="/m.gguf", llama_extra_args=args)


@pytest.mark.parametrize(
    "token",
    ["-mmodel.gguf", "-hfowner/name:Q4_K_M", "-aname1", "-hffile.gguf", "-drrepo/x", "-agon!"],
)
def test_a_value_that_runs_into_a_short_flag_is_seen(token: str) -> None:
    """No build takes it; refused here, it does not cost the running server first."""
    with pytest.raises(RefusedArgument):
        check_extra_args((token,))


def test_the_table_of_refused_flags_is_this_one() -> None:
    """No alias lost, none added without a test."""
    assert sorted(" ".join(REFUSED.values()).split()) == sorted(REFUSED_FLAGS)
    assert len(set(REFUSED_FLAGS)) == len(REFUSED_FLAGS)


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
def test_an_allowed_flag_is_accepted_as_it_is(args: tuple[str, ...]) -> None:
    """Sampling, threads, offload, cache, drafting, templates: the caller's business."""
    check_extra_args(args)
    assert LoadRequest(model_path="/m.gguf", llama_extra_args=args).llama_extra_args == args


@pytest.mark.parametrize(
    "value",
    ["-1", "-0.5", "-.5", "-1.", "-1e-5", "-0.5e3", "-2E+3", "+1", " -3 ", "7", "-inf", "-NaN"],
)
def test_a_negative_number_is_a_value(value: str) -> None:
    """`--seed -1` is one flag with a value, not two flags."""
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
    """One reading of a token for refusing, stripping and drafting alike."""
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
def test_what_no_server_could_take_is_refused(args: tuple[str, ...]) -> None:
    """At most 256 tokens and 32 KiB, no NUL or control characters, nothing that is not text."""
    with pytest.raises(InvalidRequest) as caught:
        check_extra_args(args)
    assert caught.value.field == "llama_extra_args"
    assert not isinstance(caught.value, RefusedArgument)


def test_the_limits_themselves_are_allowed() -> None:
    """256 tokens; 32 KiB."""
    check_extra_args(("x",) * MAX_TOKENS)
    check_extra_args(("x" * MAX_BYTES,))
    assert (MAX_TOKENS, MAX_BYTES) == (256, 32 * 1024)


# ---------------------------------------------------------------------------------------- shadows

SHADOWS = [(g, f, True) for g, flags in SHADOW_GROUPS.items() for f in flags.split()] + [
    (g, f, False) for g, flags in BOOLEAN_FLAGS.items() for f in flags.split()
]


@pytest.mark.parametrize(("group", "flag", "takes_value"), SHADOWS)
def test_a_shadowed_flag_goes_with_its_value_and_nothing_else(
    group: str, flag: str, takes_value: bool
) -> None:
    """B39: stripping eats the next positional when a boolean is taken for a flag with a value."""

    def strip(*args: str) -> tuple[str, ...]:
        return strip_shadowed(args, [group])

    value = () if takes_value else ("value",)
    assert strip("--mlock", flag, "value", "--temp", "1") == ("--mlock", *value, "--temp", "1")
    assert strip(f"{flag}=value", "next") == ("next",)
    assert strip(flag, "--mlock") == ("--mlock",)
    assert strip(flag, "-1") == (() if takes_value else ("-1",))
    assert strip(flag) == ()
    assert strip(f" {flag} ", "value") == value
    if flag.startswith("--"):
        assert strip(f"--{flag[2:].replace('-', '_')}", "value") == value
    others = [other for other in SHADOWED if other != group]
    assert strip_shadowed((flag, "value"), others) == (flag, "value")


def test_the_table_of_shadows_is_this_one() -> None:
    """No flag lost, none added without a test, booleans marked."""
    ours = {group: {flag for g, flag, _ in SHADOWS if g == group} for group, _, _ in SHADOWS}
    assert {g: {f.rstrip("!") for f in flags.split()} for g, flags in SHADOWED.items()} == ours
    booleans = {f[:-1] for flags in SHADOWED.values() for f in flags.split() if f.endswith("!")}
    assert booleans == {flag for _, flag, takes_value in SHADOWS if not takes_value}


def test_an_inherited_template_file_survives_a_load_that_sets_no_template() -> None:
    """Only what this request sets takes over."""
    args = ("--chat-template-file", "/t.jinja", "--jinja")
    made = LoadRequest(model_path="/m.gguf", max_seq_length=4096)
    assert strip_shadowed(args, groups_set_by(made)) == args


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        ({}, set()),
        ({"max_seq_length": 0}, set()),
        ({"max_seq_length": 1}, {"max_seq_length"}),
        ({"cache_type_kv": "f16"}, {"cache_type_kv"}),
        ({"cache_type_kv": " "}, set()),
        ({"speculative_type": "off"}, {"speculative_type"}),
        ({"speculative_type": ""}, set()),
        ({"speculative_type": "default"}, {"speculative_type"}),
        (
            {"chat_template_override": "x", "max_seq_length": 2, "cache_ram_mib": 0},
            set(SHADOWED) - {"cache_type_kv", "speculative_type"},
        ),
        ({"n_parallel": 4, "mmproj_path": "/p"}, set()),
    ],
)
def test_a_group_is_set_by_its_field_alone(values: dict[str, Any], groups: set[str]) -> None:
    """Blank and Auto are not settings: they leave explicit flags as they are. Off is one."""
    assert groups_set_by(LoadRequest.from_dict({"model_path": "/m", **values})) == groups


WORDS = ["value", "-1", "4096", "--temp", "--mlock", "-t", "-t=4", "--seed", "x=y", "-"]
TOKENS = st.sampled_from([*WORDS, *(f for _, f, _ in SHADOWS), *(f"{f}=v" for _, f, _ in SHADOWS)])


@repeatable
@given(st.lists(TOKENS, max_size=12), st.sets(st.sampled_from(sorted(SHADOWED))))
def test_stripping_is_idempotent_and_keeps_every_other_flag(
    args: list[str], groups: set[str]
) -> None:
    """Whatever is not owned stays, with its order; whatever is owned is gone for good."""
    once = strip_shadowed(tuple(args), groups)
    assert strip_shadowed(once, groups) == once
    owned = {flag for group, flag, _ in SHADOWS if group in groups}
    assert not owned & {flag_of(token) for token in once}
    flags = [t for t in args if flag_of(t) is not None and flag_of(t) not in owned]
    assert [t for t in once if flag_of(t) is not None] == flags
    rest = iter(args)
    assert all(token in rest for token in once), "the order of what stays is kept"


@repeatable
@given(st.lists(TOKENS, max_size=12))
def test_stripping_nothing_changes_nothing(args: list[str]) -> None:
    """A request that sets no such field inherits exactly what was committed."""
    assert strip_shadowed(tuple(args), ()) == tuple(args)


# -------------------------------------------------------------------------------------- the modes


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_a_cache_type_is_known_by_its_lower_case_name(name: str) -> None:
    """`Q8_0` in a user interface is `q8_0` on the command line."""
    assert normal_cache_type(name.upper()) == name
    assert normal_cache_type(None) is None


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        (None, ()),
        ("default", ("--spec-default",)),
        ("ngram-simple", ("--spec-type", "ngram-simple")),
        ("draft-mtp", ("--spec-type", "draft-mtp")),
        (
            "ngram-mod",
            (
                "--spec-type",
                "ngram-mod",
                "--spec-ngram-mod-n-match",
                "24",
                "--spec-ngram-mod-n-min",
                "48",
                "--spec-ngram-mod-n-max",
                "64",
            ),
        ),
    ],
)
def test_a_speculative_mode_is_its_flags_unless_the_caller_drafts_by_hand(
    mode: str | None, flags: tuple[str, ...]
) -> None:
    """Spec types accumulate and cannot be undone: explicit ones make the managed stand back."""
    assert speculative_flags(mode, ()) == flags
    assert speculative_flags(mode, ("--temp", "1")) == flags
    for explicit in ("--spec-default", "--spec-type", "--spec_type=x", " --spec-default "):
        assert speculative_flags(mode, (explicit,)) == ()


@pytest.mark.parametrize("value", ["off", "OFF", "none", "None"])
def test_off_is_no_mode_at_all(value: str) -> None:
    """It has no flags; unlike null it is said on purpose, and takes inherited ones away."""
    assert normal_speculative_type(value) == "off"
    assert target(speculative_type=value).speculative_type is None


# ------------------------------------------------------------------------------------------- argv

SECRET = "hf_doNotShowThisToken"


def target(*, projector: bool = False, **values: Any) -> Target:
    def file(path: str) -> FileIdentity:
        return FileIdentity(path, 1, 1, 1, 1)

    shards = (file("/m/a-00001-of-00002.gguf"), file("/m/a-00002-of-00002.gguf"))
    model = ModelFiles(shards, file("/m/mmproj.gguf") if projector else None)
    server = ServerBinary("embedded", ("/bin/python", "-m", "server"), file("/bin/python"))
    return Target(LoadRequest.from_dict({"model_path": "/m", **values}), model, server)


def test_the_smallest_argv_is_the_model_and_the_address() -> None:
    """Auto means no flag: the server decides."""
    argv = build_argv(target(), template_file=None)
    assert argv == (
        *("/bin/python", "-m", "server"),
        *("-m", "/m/a-00001-of-00002.gguf", "--host", "127.0.0.1", "--port", "0"),
    )


def test_a_full_argv_has_one_order_and_the_callers_args_last() -> None:
    """Last wins: an explicit flag beats a field, and a log line can be compared with another."""
    wanted = target(
        max_seq_length=4096,
        n_parallel=2,
        cache_type_kv="q8_0",
        speculative_type="ngram-simple",
        chat_template_override="{{ x }}",
        llama_extra_args=["-c", "512", "--temp", "-1"],
        hf_token=SECRET,
    )
    argv = build_argv(wanted, template_file="/tmp/t.jinja")
    assert argv[9:] == (
        *("-c", "4096", "-ctk", "q8_0", "-ctv", "q8_0", "--parallel", "2"),
        *("--spec-type", "ngram-simple", "--jinja", "--chat-template-file", "/tmp/t.jinja"),
        *("-c", "512", "--temp", "-1"),
    )
    assert argv == build_argv(wanted, template_file="/tmp/t.jinja")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "embedding"}, ("--embedding", "--cache-ram", "0")),
        ({"kind": "rerank", "cache_ram_mib": 64}, ("--rerank", "--cache-ram", "64")),
        ({"kind": "embedding", "pooling": "cls"}, ("--embedding", "--pooling", "cls")),
        ({"cache_ram_mib": 0}, ("--cache-ram", "0")),
    ],
)
def test_what_a_server_is_for_is_said_by_its_flags(
    settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Prompts are cached for chats only, unless somebody asks for it."""
    argv = build_argv(target(**settings), template_file=None)
    assert argv[9 : 9 + len(words)] == words


def test_an_argv_is_for_the_binary_that_will_run_it() -> None:
    """B43: another build has another name for the same, or none."""
    flags = ("-m --model", "--spec-type", "--spec-ngram-size-n", "--draft-min", "--draft-max")
    old = Catalogue(tuple(FlagHelp(tuple(f.split()), takes_value=True) for f in flags))
    wanted = target(speculative_type="ngram-mod")
    wanted = replace(wanted, server=replace(wanted.server, catalogue=old))
    argv = build_argv(wanted, template_file=None)
    assert argv[9:13] == ("--spec-type", "ngram-mod", "--spec-ngram-size-n", "24")


def test_an_argv_names_what_is_still_to_be_downloaded() -> None:
    """A plan shows the command before there is a file."""
    hub = ModelFiles((), hub=HubModel("Org/A"))
    argv = build_argv(replace(target(), model=hub), template_file=None)
    assert argv[3:5] == ("-m", "</m>")


def test_a_vision_model_gets_its_projector_and_no_drafting() -> None:
    """Drafting with images is not supported by the server."""
    argv = build_argv(target(projector=True, speculative_type="default"), template_file=None)
    assert argv[9:11] == ("--mmproj", "/m/mmproj.gguf")
    assert "--spec-default" not in argv


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
def test_an_argv_holds_no_secret_and_ends_with_the_callers_args(
    context: int,
    parallel: int | None,
    cache: str | None,
    mode: str | None,
    template: str | None,
    args: list[str],
    projector: bool,
) -> None:
    """Secrets are never in argv: every user of the machine can read it."""
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
    managed = argv[9 : len(argv) - len(args)]
    assert ("-c" in managed) == (context > 0)
    assert ("--parallel" in managed) == (parallel is not None)


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
def test_a_manual_mode_is_shown_as_itself_and_survives_being_sent_back(
    args: tuple[str, ...], mode: str
) -> None:
    """B44: shown blank or silently changed to default. A panel shows it, and posts it back."""
    running = target(llama_extra_args=args)
    assert running.drafting == mode
    committed = {running.source: running.extra_args}
    back = target(speculative_type=mode).inheriting(committed)
    assert back.extra_args == args
    assert not differences(running, back)
    assert build_argv(back, template_file=None) == build_argv(running, template_file=None)
    both = target(speculative_type=mode, llama_extra_args=args)
    assert not differences(running, both)


@pytest.mark.parametrize("chosen", ["off", "default", "ngram-simple"])
def test_a_mode_that_is_chosen_takes_the_place_of_an_inherited_manual_one(chosen: str) -> None:
    """An Off that leaves drafting on is a setting that silently never arrived."""
    args = ("--spec-type", "ngram-mod", "--temp", "1", "--spec-ngram-mod-n-match", "12")
    asked = target(speculative_type=chosen)
    made = asked.inheriting({asked.source: args})
    assert made.extra_args == ("--temp", "1")
    assert made.drafting == chosen
