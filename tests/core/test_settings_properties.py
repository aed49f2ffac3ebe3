"""What holds for every setting, flag and help text, not only for those somebody thought of.

Spellings of refused flags, stripping, inheritance and `plan` are each compared with a second,
simpler reading of the rule; whatever is not a request or a help text is refused or no answer.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.tokens import Ticket
from orchestrator.errors import (
    InvalidRequest,
    MalformedRequest,
    OrchestratorError,
    Problem,
    RefusedArgument,
)
from orchestrator.machine.commands import Accept, Answer, Loaded, Settle, Spawn
from orchestrator.machine.context import Context
from orchestrator.machine.facts import (
    BecameReady,
    Child,
    Completion,
    Emptied,
    Fact,
    Fetched,
    LoadRequested,
    NotReady,
    ServerFacts,
    SlotEvidence,
    Spawned,
)
from orchestrator.machine.plan import Plan, plan_load
from orchestrator.machine.states import State
from orchestrator.machine.step import step
from orchestrator.server import embedded
from orchestrator.server.environment import check_server_env, child_environment
from orchestrator.server.slot import Slot
from orchestrator.settings.argv import build_argv
from orchestrator.settings.fields import SHADOWED, check_extra_args, strip_shadowed
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.flags import MAX_BYTES, SPECULATIVE, flag_of, speculative_flags
from orchestrator.settings.help_text import Catalogue, FlagHelp, parse_help
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Source, Target, differences, groups_set_by
from tests.core.test_server_args import REFUSED_FLAGS, SHADOWS
from tests.kit.labels import label

repeatable = settings(derandomize=True, deadline=None, max_examples=150)
fewer = settings(repeatable, max_examples=60)

ANY_TEXT = st.text(st.characters(), max_size=12)
PADDING = st.text(st.sampled_from(" \u00a0\u2003"), max_size=2)

# ------------------------------------------------------------------- one flag, in every spelling


@st.composite
def respelled(draw: st.DrawFn, flag: str) -> str:
    """A token that somebody could mean this flag by."""
    dashes = "--" if flag.startswith("--") else "-"
    swap = st.sampled_from([str.lower, str.upper, lambda c: "_" if c == "-" else c])
    name = "".join(draw(swap)(c) for c in flag.removeprefix(dashes))
    if dashes == "--" and draw(st.booleans()) and draw(st.booleans()):
        dashes = "-"
    values = ["", "=", "=x", " = x", " x", ":80", "/m.gguf", "=--temp", "=-1"]
    if not any(c.isdigit() for c in flag):
        values += ["8", "8080", "1.5"]
    return draw(PADDING) + dashes + name + draw(st.sampled_from(values)) + draw(PADDING)


def refusal(call: Callable[[], object]) -> InvalidRequest | None:
    """What a call is refused with; whatever else it raises is a failure."""
    try:
        call()
    except InvalidRequest as error:
        return error
    return None


HARMLESS = st.sampled_from(["--temp", "0.5", "-1", "-c", "4096", "x", "--jinja", "", "-", "--"])


@repeatable
@given(st.data(), st.lists(HARMLESS, max_size=6))
def test_a_flag_refused_in_one_spelling_is_refused_in_all(
    data: st.DataObject, others: list[str]
) -> None:
    """B42. Also where it stands as another flag's value: what the server takes is its business."""
    flag = data.draw(st.sampled_from(REFUSED_FLAGS))
    at = data.draw(st.integers(0, len(others)))
    args = (*others[:at], data.draw(respelled(flag)), *others[at:])
    check_extra_args(tuple(others))
    with pytest.raises(RefusedArgument) as caught:
        check_extra_args(args)
    assert f" {flag} is refused: " in str(caught.value), args


EDITS = st.sampled_from(["-", "_", "--", "n", "o", "=", " ", "8", "/", "M", "host", "\u2003", "."])


@repeatable
@given(st.sampled_from(REFUSED_FLAGS), st.lists(st.tuples(st.integers(0, 12), EDITS), max_size=4))
def test_nothing_passes_that_the_server_would_read_as_a_refused_flag(
    flag: str, edits: list[tuple[int, str]]
) -> None:
    """Its own rule is short: exact names, and in what begins with two dashes `_` is `-`."""
    token = flag
    for at, what in edits:
        token = token[:at] + what + token[at + (what == "_") :]
    read = token.replace("_", "-") if token.startswith("--") else token
    if refusal(lambda: check_extra_args((token,))) is None:
        assert edits
        assert read not in REFUSED_FLAGS
        assert flag_of(token) not in REFUSED_FLAGS


HELP = embedded.usage()
KNOWN = cast("Catalogue", parse_help(HELP))
ALLOWED = sorted({n for f in KNOWN.flags for n in f.names} - set(REFUSED_FLAGS))


@repeatable
@given(st.sampled_from(ALLOWED), ANY_TEXT, st.booleans())
def test_an_allowed_flag_is_never_mistaken_for_a_refused_one(
    flag: str, value: str, has_underscores: bool
) -> None:
    """A refusal too many is a setting the caller cannot use: `-mg` is not `-m` with a value."""
    if has_underscores and flag.startswith("--"):
        flag = "--" + flag[2:].replace("-", "_")
    harmless = "".join(c for c in value if c.isprintable()).lstrip(" -")
    for args in ((flag,), (flag, harmless), (flag, "-1"), (f"{flag}={harmless}",)):
        check_extra_args(args)


@repeatable
@given(st.lists(ANY_TEXT | st.text(st.sampled_from("-_=mnph 8.\u2003\ud800\0"), max_size=9)))
def test_any_tokens_are_accepted_as_they_are_or_refused_by_their_field(args: list[str]) -> None:
    """Whatever JSON can hold; and nothing of it is changed on the way."""
    error = refusal(lambda: request(llama_extra_args=args))
    if error is None:
        assert request(llama_extra_args=args).llama_extra_args == tuple(args)
        assert not any(flag_of(token) in REFUSED_FLAGS for token in args)
    else:
        assert error.field == "llama_extra_args"
        assert len(as_sent(error)) < 400


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
def test_a_hostile_token_costs_no_time(token: str) -> None:
    """A pattern that backtracks takes seconds for 32 KiB of digits, on the event loop."""
    started = time.process_time()
    flag_of(token)
    strip_shadowed((token,), SHADOWED)
    refusal(lambda: check_extra_args((token,)))
    assert time.process_time() - started < 0.2


# --------------------------------------------------------------------- twins in the environment

TWINS = """
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
OTHER_TWINS = "HF_TOKEN LLAMA_API_KEY LLAMA_SERVER_ROUTER_PORT AIP_MODE AIP_HTTP_PORT"
ADDRESS = cast("Slot", SimpleNamespace(token="SLOT=token"))


@pytest.mark.parametrize("name", (TWINS + OTHER_TWINS).split())
def test_the_twin_of_a_refused_flag_never_reaches_the_server(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server reads the environment before its arguments. The host may have it set."""
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    environment = child_environment({"NAMED": "1"}, ADDRESS)
    assert name not in environment
    assert {"CUDA_VISIBLE_DEVICES", "NAMED", "SLOT"} <= environment.keys()


@pytest.mark.parametrize("name", [*TWINS.split(), "HF_TOKEN", "AIP_HTTP_PORT"])
def test_a_twin_cannot_be_named_by_the_caller_either(name: str) -> None:
    """`server_env` would be a way around the table."""
    with pytest.raises(InvalidRequest, match=name) as caught:
        check_server_env({"FINE": "1", name: "secret"})
    assert caught.value.field == "server_env"
    assert "secret" not in str(caught.value)


# ----------------------------------------------------------------------------------- stripping

VALUES = ["v", "-1", "-.5", "4096", "/t.jinja", '{"a": "--temp"}', "a=b", "-", "", "-inf"]
OWNERS = {flag: group for group, flag, _ in SHADOWS}
BOOLEAN = {flag for _, flag, takes_value in SHADOWS if not takes_value}
OTHER_FLAGS = [
    "--temp",
    "-t",
    "-C",
    "-ctkd",
    "--spec-draft-ngl",
    "--jinja-like",
    "--spec-synth-len",
]


class Setting(NamedTuple):
    """One flag, what belongs to it, and a stray value behind it that does not."""

    flag: str
    tokens: tuple[str, ...]
    stray: tuple[str, ...] = ()


@st.composite
def written(draw: st.DrawFn) -> Setting:
    """A flag as a caller writes it: alone, with its value, or both in one token."""
    flag = draw(st.sampled_from(list(OWNERS)) | st.sampled_from(OTHER_FLAGS))
    value = draw(st.sampled_from(VALUES))
    spelled = flag
    if flag.startswith("--") and draw(st.booleans()):
        spelled = "--" + flag[2:].replace("-", "_")
    stray = tuple(draw(st.lists(st.sampled_from(VALUES), max_size=1)))
    if flag in BOOLEAN:
        return Setting(flag, (draw(PADDING) + spelled,), stray)
    if draw(st.booleans()) and draw(st.booleans()):
        return Setting(flag, (spelled,))
    return Setting(flag, draw(st.sampled_from([(f"{spelled}={value}",), (spelled, value)])), stray)


def flat(written: list[Setting]) -> tuple[str, ...]:
    return tuple(token for setting in written for token in (*setting.tokens, *setting.stray))


GROUPS = st.sets(st.sampled_from(sorted(SHADOWED)))


@repeatable
@given(st.lists(written(), max_size=8), GROUPS, GROUPS)
def test_stripping_takes_whole_settings_and_no_token_of_another(
    args: list[Setting], groups: set[str], more: set[str]
) -> None:
    """B38, B39. A flag goes with its value, in any spelling; in two steps or in one."""
    left = [
        setting._replace(tokens=()) if OWNERS.get(setting.flag) in groups else setting
        for setting in args
    ]
    once = strip_shadowed(flat(args), groups)
    assert once == flat(left)
    assert strip_shadowed(once, groups) == once
    if not any(setting.stray for setting in args):
        assert strip_shadowed(once, more) == strip_shadowed(flat(args), groups | more)


@repeatable
@given(st.lists(ANY_TEXT, max_size=8), GROUPS)
def test_stripping_leaves_any_other_text_alone(args: list[str], groups: set[str]) -> None:
    """What names no flag of a group stays, whatever it is."""
    assert strip_shadowed(tuple(args), groups) == tuple(args)


# ------------------------------------------------------------------------------- the whole argv

BINARY = FileIdentity("/bin/server", 1, 1, 1, 1)
PROJECTOR = FileIdentity("/m/mmproj.gguf", 1, 9, 1, 1)
COMMAND = ("/bin/server",)


def target(request: LoadRequest, variant: str | None = "Q4_K_M", *, vision: bool = False) -> Target:
    path = f"/m/{request.model_path}.gguf"
    inode = sum(map(ord, request.model_path))
    model = ModelFiles(
        (FileIdentity(path, 1, inode, 1, 1),), PROJECTOR if vision else None, variant
    )
    return Target(request, model, ServerBinary("external", COMMAND, BINARY))


def request(**values: Any) -> LoadRequest:
    return LoadRequest.from_dict({"model_path": "m", **values})


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "max_seq_length": st.sampled_from([0, 256, 4096]),
        "cache_type_kv": st.sampled_from([None, "", "q8_0", "F16"]),
        "speculative_type": st.sampled_from([None, "off", "", "default", "ngram-mod"]),
        "n_parallel": st.sampled_from([None, 1, 4]),
        "chat_template_override": st.sampled_from([None, " ", "{{ x }}"]),
    },
)
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
    """What a server makes of a command line: the values of each flag in their order."""
    read: dict[str, list[Any]] = {}
    for flag, value in embedded.parse(argv):
        read.setdefault(flag.names.split()[0], []).append(value)
    return read


@repeatable
@given(FIELDS, EXPLICIT, st.booleans())
def test_a_command_line_reads_back_as_the_request_it_was_made_of(
    values: dict[str, Any], chosen: list[tuple[str, ...]], vision: bool
) -> None:
    """Explicit flags win over fields, the last one wins, and nothing moves the address."""
    args = [token for tokens in chosen for token in tokens]
    wanted = target(request(**values, llama_extra_args=args), vision=vision)
    made = wanted.request
    argv = build_argv(wanted, template_file=None)
    read = as_read(argv[len(COMMAND) :])
    explicit = as_read(("-m", "any", *args))

    assert (read["-m"], read["--host"], read["--port"]) == (["/m/m.gguf"], [["127.0.0.1"]], [0])
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

    again = target(LoadRequest.from_dict(json.loads(json.dumps(made.as_dict()))), vision=vision)
    assert build_argv(again, template_file=None) == argv


# ------------------------------------------------------------------- requests that mean the same

SPELLINGS: dict[str, list[list[Any]]] = {
    "gguf_variant": [[None, "", "  "], ["Q4_K_M", " Q4_K_M\t"]],
    "max_seq_length": [[0], [4096]],
    "cache_type_kv": [[None, "", " "], ["q8_0", " Q8_0", "q8_0\n"]],
    "speculative_type": [
        [None, "", " ", "off", "OFF", " Off ", "none"],
        ["ngram-mod", " NGRAM-MOD "],
        ["default", "Default"],
    ],
    "chat_template_override": [[None, "", " \n"], ["{{ x }}"], [" {{ x }}"]],
    "llama_extra_args": [[[], ()], [["-t", "4"], ("-t", "4")], [["4", "-t"]]],
    "n_parallel": [[None], [1], [2]],
}
CHOICES = st.fixed_dictionaries(
    {
        name: st.sampled_from(
            [(at, one, same) for at, group in enumerate(groups) for one in group for same in group]
        )
        for name, groups in SPELLINGS.items()
    }
)


@repeatable
@given(CHOICES, CHOICES)
def test_two_requests_are_the_same_exactly_when_they_differ_in_spelling_only(
    ours: dict[str, tuple[int, Any, Any]], theirs: dict[str, tuple[int, Any, Any]]
) -> None:
    """B28, B35: a changed setting is a reason and named; another way to write it is none."""
    one, same = (
        target(request(**{name: choice[which] for name, choice in ours.items()}))
        for which in (1, 2)
    )
    assert differences(one, same) == ()
    other = target(request(**{name: choice[1] for name, choice in theirs.items()}))
    changed = {name for name in SPELLINGS if ours[name][0] != theirs[name][0]}
    changed.discard("gguf_variant")  # what counts is the variant that was resolved
    found = differences(one, other)
    assert {reason.field for reason in found} == changed
    for reason in found:
        assert reason.running != reason.requested
    json.dumps([reason.as_dict() for reason in found])


@repeatable
@given(CHOICES, st.sampled_from(["default", "ngram-mod", "off"]))
def test_no_drafting_mode_makes_a_vision_model_another(
    chosen: dict[str, tuple[int, Any, Any]], mode: str
) -> None:
    """B32: it never applies there, so it would reload on every Apply."""
    values = {name: choice[1] for name, choice in chosen.items()}
    running = target(request(**values), vision=True)
    wanted = target(request(**{**values, "speculative_type": mode}), vision=True)
    assert differences(running, wanted) == ()
    as_text = target(request(**values))
    assert "mmproj_path" in {reason.field for reason in differences(running, as_text)}


# ---------------------------------------------------------------------- what is not a request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(LoadRequest.__dataclass_fields__))


def as_sent(error: OrchestratorError) -> str:
    """The problem document as a web framework sends it."""
    return json.dumps(error.problem.as_dict(), ensure_ascii=False).encode().decode()


@repeatable
@given(JSON | st.dictionaries(NAMES | ANY_TEXT, JSON, max_size=4))
def test_any_json_is_a_request_or_an_error_that_names_a_field(body: Any) -> None:
    """Never a bare TypeError, and never an answer that cannot be sent."""
    if isinstance(body, dict):
        body.setdefault("model_path", "m")
    error = refusal(lambda: LoadRequest.from_dict(body))
    if error is None:
        made = LoadRequest.from_dict(body)
        assert LoadRequest.from_dict({**made.as_dict(), "hf_token": made.hf_token}) == made
        hash(made)
    else:
        assert len(as_sent(error)) < 1500
        assert (error.field is not None) == isinstance(body, dict)


@pytest.mark.parametrize("body", [None, 7, "model_path", ["model_path"], [], True, b"{}"])
def test_what_is_no_object_at_all_is_malformed(body: Any) -> None:
    """A list of names would look like a mapping to a loop."""
    with pytest.raises(MalformedRequest, match="object of named fields"):
        LoadRequest.from_dict(body)


@pytest.mark.parametrize(
    "name",
    [7, None, ("model_path",), 10**5000, "\ud800", "x" * 10**6],
    ids=lambda name: type(name).__name__,
)
def test_a_name_that_is_no_name_is_refused_by_one_that_can_be_sent(name: Any) -> None:
    """The error travels as JSON, which holds no half surrogate pair, and no megabyte."""
    with pytest.raises(MalformedRequest, match="unknown field") as caught:
        LoadRequest.from_dict({"model_path": "m", name: 1})
    assert caught.value.field
    assert len(as_sent(caught.value)) < 1000


@pytest.mark.parametrize(
    "field", ["max_seq_length", "n_parallel", "idle_ttl_s", "stall_timeout_s", "deadline_s"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_too_long_to_write_down_is_out_of_range(field: str, sign: int) -> None:
    """Python refuses to make a text of more than 4300 digits, also inside an error message."""
    with pytest.raises(InvalidRequest, match="out of range") as caught:
        request(**{field: sign * 10**5000})
    assert caught.value.field == field


@pytest.mark.parametrize("value", [bytearray(), bytearray(b"x"), memoryview(b""), {}, set(), ""])
def test_an_empty_something_else_is_not_an_empty_list_of_flags(value: Any) -> None:
    """`[]` clears; nothing else may pass for it."""
    with pytest.raises(MalformedRequest) as caught:
        request(llama_extra_args=value)
    assert caught.value.field == "llama_extra_args"


@pytest.mark.parametrize("field", ["on_busy", "cache_type_kv", "speculative_type"])
def test_an_error_does_not_repeat_a_megabyte(field: str) -> None:
    """It is logged, kept as last_error and sent with every status."""
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: "?" * 10**6})
    assert len(str(caught.value)) < 300


# -------------------------------------------------- inheritance, reasons and plan, step by step


class Wish(NamedTuple):
    """One load of a session, and whether its server becomes healthy."""

    source: Source
    values: dict[str, Any]
    args: tuple[str, ...] | None
    succeeds: bool

    def target(self) -> Target:
        args = None if self.args is None else list(self.args)
        model, variant, kind = self.source
        wanted = request(model_path=model, kind=kind, llama_extra_args=args, **self.values)
        return target(wanted, variant)


WISHES = st.builds(
    Wish,
    st.sampled_from(
        [
            *2 * [("a", "Q4_K_M", "chat")],
            *(("a", "Q8_0", "chat"), ("b", "Q4_K_M", "chat"), ("a", "Q4_K_M", "embedding")),
        ]
    ),
    st.just({}) | FIELDS | st.just({"force_reload": True}),
    st.none() | st.lists(written(), max_size=3).map(flat),
    st.sampled_from([True, True, False]),
)


class Session:
    """The machine, one effect after the other, with every command it gave."""

    def __init__(self) -> None:
        self.state, self.ctx = State.IDLE, Context()
        self.tickets = 0
        self.answers: dict[int, Answer] = {}
        self.accepted: list[Accept] = []
        self.spawned: list[Target] = []

    def do(self, fact: Fact) -> None:
        self.state, self.ctx, commands = step(self.state, self.ctx, fact)
        for command in commands:
            match command:
                case Settle():
                    self.answers[command.ticket] = command.answer
                case Accept():
                    self.accepted.append(command)
                case Spawn():
                    self.spawned.append(command.target)

    def ask(self, wanted: Target) -> Ticket:
        self.tickets += 1
        self.do(LoadRequested(Ticket(self.tickets), wanted, at=0.0))
        return Ticket(self.tickets)

    def next(self, *, succeeds: bool = True) -> bool:
        """Let the effect in flight end; False when there is none."""
        if self.ctx.effect is None:
            return False
        generation = self.ctx.effect.generation
        job = self.ctx.job
        fact: Completion
        match self.ctx.effect.kind:
            case "kill":
                fact = Emptied(generation, 0.0)
            case "download":
                assert job is not None
                fact = Fetched(generation, 0.0, job.target.model, SlotEvidence(is_empty=True))
            case "spawn":
                fact = Spawned(generation, 0.0, Child(generation, 40 + generation))
            case _ if succeeds:
                server = ServerFacts("http://127.0.0.1:1", context_length=2048)
                fact = BecameReady(generation, 0.0, server)
            case _:
                fact = NotReady(generation, 0.0, Problem("server_start_failed", "it failed"))
        self.do(fact)
        return True

    def finish(self, *, succeeds: bool = True) -> None:
        while self.next(succeeds=succeeds):
            pass


def shown_argv(wanted: Target) -> list[str]:
    shown = "<chat template>" if wanted.request.chat_template_override else None
    return list(build_argv(wanted, template_file=shown))


@fewer
@given(st.lists(WISHES, min_size=2, max_size=8))
def test_a_plan_is_what_the_load_then_does_and_inheritance_stays_with_its_source(
    wishes: list[Wish],
) -> None:
    """B37, B40, B41: beside the machine, a dictionary by source that only a success writes to."""
    session = Session()
    committed: dict[Source, tuple[str, ...]] = {}
    running: Target | None = None
    for wish in wishes:
        wanted = wish.target()
        expected = wish.args
        if expected is None:
            kept = committed.get(wish.source, ())
            expected = strip_shadowed(kept, groups_set_by(wanted.request))
        explicit = replace(wanted, request=replace(wanted.request, llama_extra_args=expected))
        is_same = running is not None and not differences(running, explicit)
        plan = plan_load(session.state, session.ctx, wanted)
        assert (plan.action == "none") == (is_same and not wanted.request.force_reload)
        before = len(session.spawned)
        ticket = session.ask(wanted)
        session.finish(succeeds=wish.succeeds)
        answer = session.answers[ticket]

        if plan.action == "none":
            assert running is not None
            assert isinstance(answer, Loaded)
            assert answer.already
            assert len(session.spawned) == before
            assert shown_argv(running) == plan.argv
            assert running.extra_args == expected
            continue
        assert plan.action == ("load" if running is None else "reload")
        assert len(session.spawned) == before + 1
        started = session.spawned[-1]
        assert started.extra_args == expected
        assert shown_argv(started) == plan.argv
        if running is not None:
            forced = ["force_reload"] if wanted.request.force_reload else []
            differing = [reason.field for reason in differences(running, started)]
            assert [reason.field for reason in plan.reload_reasons] == differing + forced
            assert plan.reload_reasons
        running = started if wish.succeeds else None
        if wish.succeeds:
            assert isinstance(answer, Loaded)
            assert list(answer.reload_reasons) == plan.reload_reasons
            committed[wish.source] = expected
        else:
            assert isinstance(answer, Problem)


@fewer
@given(WISHES, WISHES, WISHES, st.integers(1, 4))
def test_a_plan_made_while_a_load_is_in_flight_is_what_another_load_then_does(
    first: Wish, loading: Wish, wish: Wish, effects: int
) -> None:
    """`none` means joined; anything else is a load of its own, whatever was in flight."""
    session = Session()
    session.ask(first.target())
    session.finish()
    session.ask(loading.target())
    for _ in range(effects - 1):
        session.next()
    is_in_flight = session.ctx.job is not None
    plan = plan_load(session.state, session.ctx, wish.target())
    accepted, spawned = len(session.accepted), len(session.spawned)
    ticket = session.ask(wish.target())
    newest = session.accepted[accepted]
    if is_in_flight:
        assert newest.joined == (plan.action == "none")
    session.finish()
    assert isinstance(session.answers[ticket], Loaded)
    if plan.action == "none":
        assert session.ctx.running is not None
        assert shown_argv(session.ctx.running.target) == plan.argv
    else:
        assert len(session.spawned) > spawned
        assert shown_argv(session.spawned[-1]) == plan.argv
        assert newest.generation == session.ctx.generation


SOURCES = st.tuples(
    st.sampled_from(["/m/a.gguf", "/m/b.gguf"]),
    st.sampled_from([None, "Q8_0"]),
    st.sampled_from(["chat", "rerank"]),
)
COMMITTED = st.dictionaries(SOURCES, st.lists(written(), max_size=3).map(flat))


@repeatable
@given(COMMITTED, COMMITTED, WISHES)
def test_what_other_sources_were_loaded_with_means_nothing(
    committed: dict[Source, tuple[str, ...]],
    others: dict[Source, tuple[str, ...]],
    wish: Wish,
) -> None:
    """B40: whatever is on record for another model or quantisation, the answer is the same."""
    wanted = wish.target()
    ours = {source: args for source, args in committed.items() if source == wanted.source}
    elsewhere = {source: args for source, args in others.items() if source != wanted.source}
    assert wanted.inheriting({**elsewhere, **ours}) == wanted.inheriting(ours)
    if not ours and wish.args is None:
        assert wanted.inheriting(elsewhere).extra_args == ()


@pytest.mark.parametrize("asked", [0, 2048, 4096])
@pytest.mark.parametrize("running", [0, 2048, 4096])
def test_the_requested_context_is_compared_and_never_the_effective_one(
    asked: int, running: int
) -> None:
    """B29: the server answers 2048 whatever was asked; 2048 by name is another wish than Auto."""
    session = Session()
    session.ask(target(request(max_seq_length=running)))
    session.finish()
    assert session.ctx.running is not None
    assert session.ctx.running.server.context_length == 2048
    plan = plan_load(session.state, session.ctx, target(request(max_seq_length=asked)))
    assert plan.action == ("none" if asked == running else "reload")
    shown = [(reason.running, reason.requested) for reason in plan.reload_reasons]
    assert shown == ([] if asked == running else [(running, asked)])


def test_a_load_that_waits_its_turn_is_compared_with_what_is_there_then() -> None:
    """Not with what loads now, nor with what runs now."""
    session = Session()
    session.ask(target(request(max_seq_length=512)))
    session.ask(target(request(max_seq_length=1024, on_busy="queue")))
    wanted = target(request(max_seq_length=2048, on_busy="queue"))
    plan = plan_load(session.state, session.ctx, wanted)
    shown = [reason.as_dict() for reason in plan.reload_reasons]
    assert (plan.action, plan.argv) == ("reload", shown_argv(wanted))
    assert shown == [{"field": "max_seq_length", "running": 1024, "requested": 2048}]
    session.ask(wanted)
    joined = plan_load(session.state, session.ctx, wanted)
    assert joined == Plan("none", [], plan.argv)


# ------------------------------------------------------------------------- what a binary can do


LINES = HELP.splitlines()
EDITS_OF_HELP = st.lists(
    st.tuples(
        st.sampled_from(["drop", "double", "cut", "insert", "join"]),
        st.integers(0, len(LINES) - 1),
        st.integers(0, 60),
        ANY_TEXT | st.sampled_from(["-", "--", "-,", "--x,", "--model", "\t-m", "allowed values:"]),
    ),
    max_size=6,
)


@repeatable
@given(EDITS_OF_HELP)
def test_a_damaged_help_is_a_catalogue_of_what_it_lists_or_no_answer(
    edits: list[tuple[str, int, int, str]],
) -> None:
    """B45: half an answer must neither raise nor make up a flag."""
    lines = list(LINES)
    for what, at, column, text in edits:
        line = lines[at % len(lines)]
        match what:
            case "drop" if len(lines) > 1:
                lines.remove(line)
            case "double":
                lines.insert(at, line)
            case "cut":
                lines[at % len(lines)] = line[:column]
            case "join":
                lines[at % len(lines)] = line + lines[(at + 1) % len(lines)]
            case _:
                lines[at % len(lines)] = line[:column] + text + line[column:]
    parsed = parse_help("\n".join(lines))
    if parsed is None:
        return
    assert parsed.has("--model")
    for flag in parsed.flags:
        assert flag.names
        assert all(any(name in line for line in lines) for name in flag.names)


TEXT = " " * 40


def entries() -> list[list[str]]:
    """The help's lines by entry."""
    found: list[list[str]] = []
    for line in LINES:
        if line.startswith("-") and not line.startswith("---"):
            found.append([line])
        elif line.startswith(" "):
            found[-1].append(line)
    return found


def test_every_flag_can_be_dropped_or_marked_as_removed() -> None:
    """B43: one that is gone, or listed only to say so, is never reported as supported."""
    for entry in entries():
        whole = parse_help("\n".join(entry) + "\n-m,    --model FNAME\n")
        assert whole is not None
        names = whole.flags[0].names
        assert KNOWN.has(*names)
        left = parse_help(HELP.replace("\n".join(entry), "", 1))
        if "--model" in names:
            assert left is None
            continue
        assert left is not None
        assert not any(left.has(name) or left.get(name) for name in names)
        head = f"{', '.join(names)} N"
        head = head.ljust(len(TEXT)) if len(head) < len(TEXT) else f"{head}\n{TEXT}"
        gone = f"{head}the argument has \n{TEXT}been removed. use another\n"
        for text in (HELP + gone, gone + HELP, HELP.replace("\n".join(entry) + "\n", gone, 1)):
            marked = parse_help(text)
            assert marked is not None
            assert not any(marked.has(name) for name in names)


def test_line_ends_mean_nothing() -> None:
    """A binary on Windows writes two characters."""
    assert parse_help(HELP.replace("\n", "\r\n")) == KNOWN
    assert parse_help(HELP + "\n\n") == KNOWN


PIECES = ["-", "--", ",", " ", "\n", "a", "allowed values: ", "(", "[x|y]", ".", "\n --b N", "\n-c"]


@pytest.mark.parametrize(
    "piece",
    ["-", "-a", "-a,", "-a, ", "-a\n", "--\n", " ", " \n", "\t", "allowed values: ", "(", "--x|"],
)
def test_what_a_binary_prints_takes_its_share_of_time_and_no_more(piece: str) -> None:
    """It is somebody's binary: it may print anything, and a start waits for it. Eight times as much
    takes eight times as long, where a quadratic pattern takes 64 times.
    """

    def noises(size: int) -> tuple[str, ...]:
        text = piece * (size // len(piece))
        return text, f"-m, --model {text}", f"-m, --model X\n {text}", f"-{text}\n--model"

    def cpu_s(noise: str) -> float:
        took = []
        for _ in range(3):
            started = time.thread_time()
            parse_help(noise)
            took.append(time.thread_time() - started)
        return min(took)

    for long, short in zip(noises(100_000), noises(12_500), strict=True):
        assert cpu_s(long) < 24 * cpu_s(short) + 0.01


@repeatable
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_what_looks_like_help_is_read_without_inventing_flags(text: str) -> None:
    """Only what a line begins with is a flag."""
    parsed = parse_help(f"-m, --model X\n{text}")
    if parsed is not None:
        heads = [line for line in text.splitlines() if line.startswith("-")]
        extra = [flag for flag in parsed.flags if "--model" not in flag.names]
        assert all(any(name in head for head in heads) for flag in extra for name in flag.names)


NEW = [f"--spec-ngram-mod-n-{what}" for what in ("match", "min", "max")]
OLD = ["--spec-ngram-size-n", "--draft-min", "--draft-max"]
TYPES = ["none", "ngram-mod", "ngram-simple", "draft-mtp"]
CATALOGUES = st.builds(
    lambda listed, removed, types: Catalogue(
        tuple(
            FlagHelp((name,), takes_value=True, choices=tuple(types), is_removed=name in removed)
            if name == "--spec-type"
            else FlagHelp((name,), takes_value=True, is_removed=name in removed)
            for name in listed
        )
    ),
    st.sets(st.sampled_from([*NEW, *OLD, "--spec-type", "--spec-default"])).map(sorted)
    | st.just([*NEW, *OLD, "--spec-type", "--spec-default"]),
    st.just(set()) | st.sets(st.sampled_from([*NEW, *OLD, "--spec-type", "--spec-default"])),
    st.just(TYPES) | st.lists(st.sampled_from(TYPES), unique=True),
)


@repeatable
@given(CATALOGUES, st.sampled_from([*SPECULATIVE, "draft-mtp", "bogus"]))
def test_a_mode_is_flags_this_binary_has_or_a_list_of_modes_it_really_takes(
    catalogue: Catalogue, mode: str
) -> None:
    """B43, and the other half: what an error offers must not be refused in the next request."""
    error = refusal(lambda: speculative_flags(mode, (), catalogue))
    if error is None:
        flags = speculative_flags(mode, (), catalogue)
        assert catalogue.has(*(flag for flag in flags if flag.startswith("--")))
        assert mode in " ".join(flags)
        listed = catalogue.get("--spec-type")
        types = listed.choices if listed is not None else ()
        assert mode == "default" or not types or mode in types
        return
    assert error.field == "speculative_type"
    off, *offered = str(error).rpartition("it accepts ")[2].split(", ")
    assert off == "off"
    assert mode not in offered
    for other in offered:
        assert speculative_flags(other, (), catalogue)


# ------------------------------------------------------------------------- the real llama-server


@pytest.fixture(scope="module")
def real_help(llama_server: str) -> str:
    done = subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.external
def test_the_real_server_has_no_other_name_for_a_refused_flag(real_help: str) -> None:
    """One flag is refused under all of its names or none; so are those that bring a model."""
    catalogue = parse_help(real_help)
    assert catalogue is not None
    partly = [
        flag.names
        for flag in catalogue.flags
        if any(name in REFUSED_FLAGS for name in flag.names)
        and not all(name in REFUSED_FLAGS for name in flag.names)
    ]
    assert partly == []
    listed = {name for flag in catalogue.flags for name in flag.names}
    assert len(listed & set(REFUSED_FLAGS)) > 80, "the help was understood"
    for name in sorted(listed - set(REFUSED_FLAGS)):
        check_extra_args((name, "value"))
    presets = [line.split()[0] for line in joined(real_help) if "can download weights" in line]
    assert len(presets) > 5
    assert set(presets) <= set(REFUSED_FLAGS)


@pytest.mark.external
def test_the_real_server_has_no_other_name_for_a_shadowed_flag(real_help: str) -> None:
    """B38: an inherited alias would beat the field; and a boolean is one there too."""
    catalogue = parse_help(real_help)
    assert catalogue is not None
    owned = {flag: (group, takes_value) for group, flag, takes_value in SHADOWS}
    for flag in catalogue.flags:
        owners = {owned.get(name) for name in flag.names}
        assert len(owners) == 1, flag.names
        for owner in owners - {None}:
            assert cast("tuple[str, bool]", owner)[1] == flag.takes_value, flag.names


@pytest.mark.external
def test_the_real_server_reads_no_environment_that_is_passed_on(
    real_help: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable its help names, the twins of allowed flags too: only a flag sets a flag."""
    names = {
        word.rstrip(")")
        for line in real_help.splitlines()
        if "(env: " in line
        for word in line.partition("(env: ")[2].split()[:1]
    }
    assert len(names) > 100
    for name in names:
        monkeypatch.setenv(name, "1")
    assert not names & child_environment({}, ADDRESS).keys()


def joined(text: str) -> list[str]:
    """The help with every entry on one line."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("-"):
            found.append(line)
        elif found:
            found[-1] += " " + line.strip()
    return found
