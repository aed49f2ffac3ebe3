"""A load request: validated field by field, normalised once, and compared by what would run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, MalformedRequest, OrchestratorError
from orchestrator.settings.checks import MAX_SECONDS
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason, ServerBinary, Source, Target, differences
from tests.kit.labels import label

SECRET = "hf_doNotShowThisToken"
FIELDS = {f.name for f in fields(LoadRequest)}
repeatable = settings(derandomize=True, deadline=None, max_examples=100)


def request(**values: Any) -> LoadRequest:
    return LoadRequest.from_dict({"model_path": "/models/a.gguf", **values})


# ------------------------------------------------------------------------------------ refusals

WRONG_TYPE: list[tuple[str, Any]] = [
    *[
        (name, value)
        for name in (
            "model_path",
            "gguf_variant",
            "revision",
            "hf_token",
            "cache_type_kv",
            "speculative_type",
            "chat_template_override",
            "mmproj_path",
            "load_request_id",
            "on_busy",
            "kind",
            "pooling",
        )
        for value in (7, 1.5, True, ["x"], {"x": 1}, b"x")
    ],
    ("model_path", None),
    ("on_busy", None),
    ("kind", None),
    *[
        (name, value)
        for name in ("max_seq_length", "n_parallel", "cache_ram_mib")
        for value in ("8", 8.0, True, [8])
    ],
    ("max_seq_length", None),
    *[
        (name, value)
        for name in ("force_reload", "prefetch", "restore_previous", "pinned")
        for value in ("true", 1, 0, None)
    ],
    *[
        (name, value)
        for name in ("idle_ttl_s", "stall_timeout_s", "deadline_s")
        for value in ("10", True, [10])
    ],
    ("stall_timeout_s", None),
    *[("llama_extra_args", v) for v in ("-c 8", b"-c", 7, {"-c": 8}, {"-c"}, ["-c", 8], [None])],
]

WRONG_VALUE: list[tuple[str, Any]] = [
    ("model_path", ""),
    ("model_path", "  \t "),
    ("model_path", "a\x00b"),
    ("model_path", "a\nb"),
    ("gguf_variant", "Q4\x7f"),
    ("revision", "ma\rin"),
    ("hf_token", "hf_\x00"),
    ("mmproj_path", "a\nb"),
    ("max_seq_length", -1),
    ("max_seq_length", 2**31),
    ("n_parallel", 0),
    ("n_parallel", -4),
    ("n_parallel", 65),
    ("cache_type_kv", "q3_k"),
    ("cache_type_kv", "f16;rm"),
    ("speculative_type", "--spec-default"),
    ("speculative_type", "ngram mod"),
    ("cache_ram_mib", -1),
    ("cache_ram_mib", 2**31),
    ("kind", "chatty"),
    ("kind", "x\ny"),
    ("pooling", "max"),
    ("pooling", "mean"),  # of a chat model
    ("on_busy", ""),
    ("on_busy", "wait"),
    ("on_busy", "Queue"),
    ("load_request_id", "-starts-with-a-dash"),
    ("load_request_id", "has space"),
    ("load_request_id", "ä"),
    ("load_request_id", "x" * 129),
    *[
        (name, value)
        for name in ("idle_ttl_s", "stall_timeout_s", "deadline_s")
        for value in (0, -1, -0.5, float("nan"), float("inf"), 1e9, 10**400)
    ],
    ("llama_extra_args", ["--host", "0.0.0.0"]),
    *[
        (name, "half \ud800 pair")
        for name in ("model_path", "hf_token", "chat_template_override", "mmproj_path")
    ],
    ("llama_extra_args", ["--seed", "\udc80"]),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPE, ids=label)
def test_a_wrong_type_is_malformed_and_names_its_field(field: str, value: object) -> None:
    """422: the caller's program is wrong; nothing is coerced in silence."""
    with pytest.raises(MalformedRequest) as caught:
        request(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(("field", "value"), WRONG_VALUE, ids=label)
def test_a_value_that_cannot_be_honoured_names_its_field(field: str, value: object) -> None:
    """400: typed, with the field to change, and never a bare exception of a library below."""
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: value})
    assert not isinstance(caught.value, MalformedRequest)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_every_field_has_a_case_that_refuses_it() -> None:
    """A field nobody tried to break is a field without a check."""
    assert {name for name, _ in (*WRONG_TYPE, *WRONG_VALUE)} == FIELDS


@pytest.mark.parametrize("name", ["max_seq_lenght", "ModelPath", "hf-token", "", "self"])
def test_an_unknown_field_is_refused_by_name(name: str) -> None:
    """A misspelt setting is never dropped in silence."""
    with pytest.raises(MalformedRequest, match="unknown field") as caught:
        LoadRequest.from_dict({"model_path": "/m.gguf", name: 1})
    assert caught.value.field == name


def test_a_request_without_a_model_says_so() -> None:
    """The one field without a default."""
    with pytest.raises(MalformedRequest, match=r"^model_path is required$") as caught:
        LoadRequest.from_dict({})
    assert caught.value.field == "model_path"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "a load request is an object of named fields, not list"),
        ({7: 1}, "unknown field 'int'; known fields: " + ", ".join(sorted(FIELDS))),
        ({"model_path": 7}, "model_path must be a string, not int"),
        ({"pinned": 1}, "pinned must be true or false, not int"),
        ({"max_seq_length": "8"}, "max_seq_length must be a whole number, not str"),
        ({"deadline_s": "8"}, "deadline_s must be a number of seconds, not str"),
        ({"llama_extra_args": "-c"}, "llama_extra_args must be a list of strings, not str"),
        ({"llama_extra_args": ["-c", 8]}, "llama_extra_args must be a list of strings, not int"),
        ({"on_busy": 7}, "on_busy must be a string, not int"),
        (
            {"on_busy": "x" * 50},
            f"on_busy is {'x' * 40!r}: use one of supersede, queue, reject",
        ),
        (
            {"speculative_type": "!" * 50},
            f"speculative_type is {'!' * 40!r}: use default, off, or a type the server lists",
        ),
        (
            {"max_seq_length": 10**18},
            f"max_seq_length is {10**18}: use 0 to 1073741824",
        ),
        (
            {"max_seq_length": -(10**19)},
            "max_seq_length is out of range: use 0 to 1073741824",
        ),
        (
            {"cache_type_kv": "x" * 50},
            f"cache_type_kv is {'x' * 40!r}: use one of {', '.join(CACHE_TYPES)}",
        ),
        ({"llama_extra_args": ["\ud800"]}, "llama_extra_args is not valid Unicode text"),
        (
            {"llama_extra_args": ["x"] * 257},
            "llama_extra_args is too long: at most 256 tokens and 32768 bytes",
        ),
        ({"n_parallel": 65}, "n_parallel is 65: use 1 to 64"),
        ({"deadline_s": 0}, "deadline_s is 0: use more than 0 to 2592000 seconds"),
    ],
    ids=label,
)
def test_a_refusal_is_one_whole_sentence(values: Any, sentence: str) -> None:
    """It reaches a person as it is: the field, what was given, what to give."""
    if isinstance(values, dict) and 7 not in values:
        values = {"model_path": "/m.gguf", **values}
    with pytest.raises(InvalidRequest) as caught:
        LoadRequest.from_dict(values)
    assert str(caught.value) == sentence


def test_the_longest_time_itself_may_be_asked_for() -> None:
    assert request(deadline_s=MAX_SECONDS).deadline_s == MAX_SECONDS


def test_an_unknown_name_is_shown_up_to_a_bound() -> None:
    """Whoever sends a megabyte as a name does not get it back."""
    with pytest.raises(MalformedRequest) as caught:
        LoadRequest.from_dict({"x" * 1000: 1})
    assert caught.value.field == "x" * 64


# --------------------------------------------------------------------------------- normal form


@pytest.mark.parametrize(
    ("field", "given_", "normal"),
    [
        ("model_path", "  owner/name ", "owner/name"),
        ("gguf_variant", "", None),
        ("gguf_variant", " Q4_K_M ", "Q4_K_M"),
        ("revision", "   ", None),
        ("hf_token", f" {SECRET}\n", SECRET),
        ("cache_type_kv", " Q8_0 ", "q8_0"),
        ("cache_type_kv", " ", None),
        ("speculative_type", "OFF", "off"),
        ("speculative_type", " ", None),
        ("speculative_type", "", None),
        ("speculative_type", " Default ", "default"),
        ("speculative_type", "NGRAM-MOD", "ngram-mod"),
        ("chat_template_override", " \n ", None),
        ("chat_template_override", " {{ x }}\n", " {{ x }}\n"),
        ("llama_extra_args", [], ()),
        ("llama_extra_args", ["--seed", "-1"], ("--seed", "-1")),
        ("llama_extra_args", None, None),
        ("mmproj_path", "", None),
        ("max_seq_length", 0, 0),
        ("n_parallel", 64, 64),
        ("load_request_id", " tab-1.a:b_c ", "tab-1.a:b_c"),
        ("deadline_s", 5, 5.0),
        ("kind", " Embedding ", "embedding"),
        ("kind", "", "chat"),
        ("pooling", " ", None),
        ("cache_ram_mib", 0, 0),
        ("model_path", Path("/m.gguf"), "/m.gguf"),
        ("mmproj_path", Path("/p.gguf"), "/p.gguf"),
        ("stall_timeout_s", 0.5, 0.5),
    ],
)
def test_a_field_is_normalised_where_spelling_means_nothing(
    field: str, given_: object, normal: object
) -> None:
    """Two spellings of one wish are the same wish; white space in a template is not spelling."""
    assert getattr(request(**{field: given_}), field) == normal


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_every_cache_type_of_the_contract_is_accepted(name: str) -> None:
    """f32 f16 bf16 q8_0 q4_0 q4_1 iq4_nl q5_0 q5_1, and no other."""
    assert request(cache_type_kv=name.upper()).cache_type_kv == name


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
maybe_text = st.none() | text
REQUESTS = st.fixed_dictionaries(
    {"model_path": text.filter(lambda t: bool(t.strip()))},
    optional={
        "gguf_variant": maybe_text,
        "revision": maybe_text,
        "hf_token": maybe_text,
        "max_seq_length": st.integers(0, 1 << 20),
        "cache_type_kv": st.none() | st.sampled_from(["", " F16", "q8_0", "Q4_1 "]),
        "speculative_type": st.none() | st.sampled_from(["", "off", "Default", "ngram-simple"]),
        "chat_template_override": maybe_text,
        "llama_extra_args": st.none()
        | st.lists(st.sampled_from(["--temp", "0.5", "-1", "-c", "4096", "--jinja", "x"])),
        "mmproj_path": maybe_text,
        "n_parallel": st.none() | st.integers(1, 64),
        "force_reload": st.booleans(),
        "on_busy": st.sampled_from(["supersede", "queue", "reject"]),
        "load_request_id": st.none()
        | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,9}", fullmatch=True),
        "prefetch": st.booleans(),
        "restore_previous": st.booleans(),
        "idle_ttl_s": st.none() | st.floats(0.001, 1000),
        "pinned": st.booleans(),
        "stall_timeout_s": st.floats(0.001, 1000) | st.integers(1, 1000),
        "deadline_s": st.none() | st.floats(0.001, 1000),
        "kind": st.sampled_from(["chat", "embedding", "RERANK "]),
        "cache_ram_mib": st.none() | st.integers(0, 1 << 20),
    },
)


@repeatable
@given(REQUESTS)
def test_the_normal_form_is_idempotent_and_survives_a_round_trip(values: dict[str, Any]) -> None:
    """What a status reports may be posted back, as JSON, and means the same."""
    made = LoadRequest.from_dict(values)
    posted_back = LoadRequest.from_dict(json.loads(json.dumps(made.as_dict())))
    assert posted_back == replace(made, hf_token=None)
    assert replace(made) == made
    assert pickle.loads(pickle.dumps(made)) == made


@repeatable
@given(
    st.sampled_from(sorted(FIELDS)),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=3)
    | st.lists(st.text(st.characters(), max_size=5) | st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
def test_any_value_is_accepted_or_refused_with_its_field(field: str, value: object) -> None:
    """Whatever JSON can hold: a normal form, or a typed error. Nothing else ever escapes."""
    made, refusal = attempt(field, value)
    if made is not None:
        assert replace(made) == made
    else:
        assert isinstance(refusal, InvalidRequest)
        assert refusal.field == field


def attempt(field: str, value: object) -> tuple[LoadRequest | None, OrchestratorError | None]:
    try:
        return request(**{field: value}), None
    except OrchestratorError as refusal:
        return None, refusal


# ------------------------------------------------------------------------------------- the token


def _errors_near_a_token() -> list[Callable[[], object]]:
    return [
        lambda: request(hf_token=[SECRET]),
        lambda: request(hf_token=SECRET + "\x00"),
        lambda: request(hf_token=SECRET, n_parallel=0),
        lambda: request(hf_token=SECRET, unknown=SECRET),
        lambda: request(llama_extra_args=["--hf-token", SECRET]),
        lambda: request(llama_extra_args=[f"--hf-token={SECRET}"]),
        lambda: request(llama_extra_args=[f"--hf-token={SECRET}\n"]),
        lambda: request(llama_extra_args=[f"--api-key={SECRET}\x00"]),
    ]


@pytest.mark.parametrize("attempt", _errors_near_a_token())
def test_no_error_shows_a_token(attempt: Callable[[], object]) -> None:
    """B67: secrets in error texts. A trailing newline from a file is the likeliest way there."""
    with pytest.raises(InvalidRequest) as caught:
        attempt()
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET not in json.dumps(caught.value.problem.as_dict())


def test_a_token_is_never_shown() -> None:
    """Not by repr (also inside what holds it), not in what may be posted back."""
    made = request(hf_token=SECRET, max_seq_length=4096, llama_extra_args=["--temp", "1"])
    assert made.hf_token == SECRET
    assert SECRET not in repr(made)
    assert SECRET not in repr(target(made))
    assert SECRET not in json.dumps(made.as_dict())
    assert "hf_token" not in made.as_dict()
    assert repr(made) == (
        "LoadRequest(model_path='/models/a.gguf', max_seq_length=4096, "
        "llama_extra_args=('--temp', '1'))"
    )


# ------------------------------------------------------------------------------------- identity


def file(path: str, **changes: int) -> FileIdentity:
    values = {"device": 1, "inode": 2, "size_bytes": 3, "mtime_ns": 4, **changes}
    return FileIdentity(path, **values)


def target(made: LoadRequest | None = None, /, **values: Any) -> Target:
    model = values.pop("model", ModelFiles((file("/models/a.gguf"),), None, "Q4_K_M"))
    binary = file("/bin/llama-server")
    server = values.pop("server", ServerBinary("external", (binary.path,), binary))
    return Target(made or request(**values), model, server)


def weights(*changes: dict[str, int], projector: FileIdentity | None = None) -> ModelFiles:
    shards = tuple(file(f"/models/a-{i}.gguf", **change) for i, change in enumerate(changes))
    return ModelFiles(shards, projector, "Q4_K_M")


PROJECTOR = file("/models/mmproj.gguf")


def on_hub(repo: str = "org/a", variant: str = "Q8_0", commit: str = "a" * 40) -> ModelFiles:
    """A Hub model in the cache; what it is counts, not where its files lie."""
    files = (file(f"/cache/{repo}/{commit}/{variant}.gguf"),)
    return ModelFiles(files, None, variant, HubModel(repo, None, commit))


def wanted_of_hub(variant: str | None = None, revision: str | None = None) -> ModelFiles:
    """One that is not in the cache."""
    return ModelFiles((), None, variant, HubModel("ORG/A", revision))


IDENTITY: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model_path", {}, {"model": ModelFiles((file("/models/b.gguf"),), None, "Q4_K_M")}),
    *[
        ("model_path", {"model": weights({}, {})}, {"model": weights({}, {change: 99})})
        for change in ("device", "inode", "size_bytes", "mtime_ns")
    ],
    ("model_path", {"model": weights({}, {})}, {"model": weights({})}),
    ("gguf_variant", {}, {"model": ModelFiles((file("/models/a.gguf"),), None, "Q8_0")}),
    ("model_path", {"model": on_hub()}, {"model": on_hub(repo="org/b")}),
    ("gguf_variant", {"model": on_hub()}, {"model": on_hub(variant="F16")}),
    ("revision", {"model": on_hub()}, {"model": on_hub(commit="b" * 40)}),
    (
        "mmproj_path",
        {"model": weights({}, projector=PROJECTOR)},
        {"model": weights({}, projector=replace(PROJECTOR, mtime_ns=99))},
    ),
    ("max_seq_length", {"max_seq_length": 4096}, {"max_seq_length": 0}),
    ("cache_type_kv", {}, {"cache_type_kv": "q8_0"}),
    ("speculative_type", {}, {"speculative_type": "default"}),
    ("chat_template_override", {}, {"chat_template_override": "{{ x }}"}),
    ("n_parallel", {"n_parallel": 1}, {"n_parallel": 2}),
    ("kind", {"cache_ram_mib": 0}, {"kind": "embedding"}),
    ("kind", {"kind": "rerank"}, {"kind": "embedding"}),
    ("pooling", {"kind": "embedding"}, {"kind": "embedding", "pooling": "mean"}),
    ("cache_ram_mib", {}, {"cache_ram_mib": 0}),
    ("cache_ram_mib", {"kind": "rerank"}, {"kind": "rerank", "cache_ram_mib": 512}),
    ("llama_extra_args", {"llama_extra_args": ["-t", "4"]}, {"llama_extra_args": ["-t", "8"]}),
    (
        "llama_extra_args",
        {"llama_extra_args": ["--a", "--b"]},
        {"llama_extra_args": ["--b", "--a"]},
    ),
    (
        "llama_server",
        {},
        {"server": ServerBinary("embedded", ("/bin/python",), file("/bin/llama-server"))},
    ),
    (
        "llama_server",
        {},
        {"server": ServerBinary("external", ("/bin/s",), file("/bin/s", mtime_ns=9))},
    ),
]


@pytest.mark.parametrize(("field", "running", "requested"), IDENTITY)
def test_each_setting_that_matters_gives_exactly_its_reason(
    field: str, running: dict[str, Any], requested: dict[str, Any]
) -> None:
    """B28: a changed setting never answers 'already loaded'; and the reload says why."""
    ours, theirs = target(**running), target(**requested)
    assert [reason.field for reason in differences(ours, theirs)] == [field]
    assert [reason.field for reason in differences(theirs, ours)] == [field]
    reason = differences(ours, theirs)[0].as_dict()
    assert set(reason) == {"field", "running", "requested"}
    assert reason["running"] != reason["requested"], "a reason shows what differs"
    json.dumps(reason)
    assert differences(ours, ours) == ()
    assert differences(theirs, theirs) == ()


def test_a_hub_model_is_the_same_wherever_its_files_lie_and_however_its_name_is_cased() -> None:
    """Contract: repo id without case, resolved variant, resolved commit."""
    ours = on_hub()
    hub = HubModel("Org/A", "main", "a" * 40)
    moved = replace(ours, weights=(file("/elsewhere/x.gguf"),), hub=hub)
    assert differences(target(model=ours), target(model=moved)) == ()


def test_a_hub_model_that_nobody_looked_up_yet_is_compared_by_what_was_asked_for() -> None:
    """Two loads in a row, before the first has its listing, are one; and so is one that finds it
    running while the cache is away.
    """
    nothing = target(model=wanted_of_hub())
    assert differences(nothing, target(model=wanted_of_hub())) == ()
    assert differences(target(model=on_hub()), nothing) == ()
    q8 = target(model=wanted_of_hub("q8_0"), gguf_variant="q8_0")
    running = target(model=on_hub(), gguf_variant="Q8_0")
    assert differences(running, q8) == ()
    assert [r.field for r in differences(nothing, q8)] == ["gguf_variant"]
    branch = target(model=wanted_of_hub(revision="dev"))
    assert [r.field for r in differences(nothing, branch)] == ["revision"]
    f16 = target(model=wanted_of_hub("f16"), gguf_variant="f16")
    shown = ReloadReason("gguf_variant", running="Q8_0", requested="F16")
    assert differences(running, f16) == (shown,)
    pictures = target(model=wanted_of_hub(), mmproj_path="p.gguf")
    shown = ReloadReason("mmproj_path", running=None, requested="p.gguf")
    assert differences(target(model=on_hub()), pictures) == (shown,)


def test_a_reason_shows_a_file_as_a_sentence_and_parts_as_a_list() -> None:
    """It is read by a person, and travels as JSON."""
    one = "/models/b.gguf (3 bytes, mtime 4, inode 2 of device 1)"
    whole = target(model=ModelFiles((file("/models/b.gguf"),), None, "Q4_K_M"))
    parts = target(model=weights({}, {}))
    (reason,) = differences(whole, parts)
    assert reason.running == one
    assert isinstance(reason.requested, list)
    assert reason.requested == [one.replace("b.gguf", f"a-{i}.gguf") for i in (0, 1)]
    (reason,) = differences(target(), target(llama_extra_args=["-t", "4"]))
    assert (reason.running, reason.requested) == ([], ["-t", "4"])


def test_what_a_hub_model_inherits_waits_for_the_variant_that_is_found() -> None:
    """B40: keyed by the resolved variant."""
    committed: dict[Source, tuple[str, ...]] = {("org/a", "Q8_0", "chat"): ("--seed", "7")}
    before = target(model=wanted_of_hub(), llama_extra_args=None).inheriting(committed)
    assert before.request.llama_extra_args is None
    found = replace(before, model=on_hub()).inheriting(committed)
    assert found.extra_args == ("--seed", "7")
    assert replace(before, model=on_hub(variant="F16")).inheriting(committed).extra_args == ()
    vectors = target(model=on_hub(), kind="embedding", llama_extra_args=None)
    assert vectors.inheriting(committed).extra_args == (), "nothing crosses to another kind"


def test_every_part_of_the_identity_has_such_a_case() -> None:
    """The list above is compared with the identity itself."""
    assert {field for field, _, _ in IDENTITY} == set(target().identity())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hf_token", SECRET),
        ("revision", "main"),
        ("force_reload", True),
        ("on_busy", "queue"),
        ("load_request_id", "x"),
        ("prefetch", True),
        ("restore_previous", True),
        ("idle_ttl_s", 5.0),
        ("pinned", True),
        ("stall_timeout_s", 5.0),
        ("deadline_s", 5.0),
        ("speculative_type", "off"),
        ("llama_extra_args", []),
        ("gguf_variant", "q4_k_m"),
        ("model_path", "/models/../models/a.gguf"),
        ("mmproj_path", "/elsewhere.gguf"),
    ],
)
def test_what_does_not_change_what_runs_is_no_difference(field: str, value: object) -> None:
    """B32, B34: a difference that no reload can remove would reload on every Apply."""
    assert differences(target(), target(**{field: value})) == ()


def test_drafting_is_always_off_for_a_vision_model() -> None:
    """B32: comparing a value that never applies reloads a vision model on every Apply."""
    vision = weights({}, projector=PROJECTOR)
    wanted = target(model=vision, speculative_type="default")
    assert wanted.is_vision
    assert wanted.speculative_type is None
    assert differences(target(model=vision), wanted) == ()


@repeatable
@given(REQUESTS, REQUESTS)
def test_differences_are_symmetric_and_empty_for_the_same(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """'The same' is an equivalence: whoever came first does not matter."""
    ours, theirs = target(LoadRequest.from_dict(one)), target(LoadRequest.from_dict(other))
    assert differences(ours, ours) == ()
    forth, back = differences(ours, theirs), differences(theirs, ours)
    assert [r.field for r in forth] == [r.field for r in back]
    assert (forth == ()) == (ours.identity() == theirs.identity())


# ------------------------------------------------------------------------------------ inheritance


def test_omitted_args_are_inherited_given_ones_are_not() -> None:
    """B35, B37: omitted = as they are, empty = none, a list = exactly these."""
    committed = {target().source: ("--temp", "0.5")}
    assert target().inheriting(committed).extra_args == ("--temp", "0.5")
    assert target(llama_extra_args=[]).inheriting(committed).extra_args == ()
    assert target(llama_extra_args=["-t", "4"]).inheriting(committed).extra_args == ("-t", "4")
    assert target().inheriting({}).extra_args == ()


@pytest.mark.parametrize(
    "other",
    [
        ModelFiles((file("/models/b.gguf"),), None, "Q4_K_M"),
        ModelFiles((file("/models/a.gguf"),), None, "Q8_0"),
        ModelFiles((file("/models/a.gguf"),), None, None),
    ],
)
def test_inheritance_never_crosses_to_another_source(other: ModelFiles) -> None:
    """B40: flags of one model reach another, or those of another quantisation."""
    committed = {target().source: ("--temp", "0.5")}
    assert target(model=other).inheriting(committed).extra_args == ()


def test_the_source_is_the_resolved_variant_not_the_requested_one() -> None:
    """B40: an auto-picked variant inherits what was set for it by name."""
    named, picked = target(gguf_variant="Q4_K_M"), target()
    assert named.source == picked.source


@pytest.mark.parametrize(
    ("field", "value", "left"),
    [
        ("max_seq_length", 8192, ("--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default")),
        ("cache_type_kv", "q8_0", ("-c", "4096", "--jinja", "--temp", "-1", "--spec-default")),
        (
            "speculative_type",
            "ngram-mod",
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16"),
        ),
        (
            "chat_template_override",
            "x",
            ("-c", "4096", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
        (
            "cache_ram_mib",
            0,
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
        (
            "n_parallel",
            2,
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
    ],
)
def test_a_field_set_in_this_request_takes_over_from_inherited_flags(
    field: str, value: object, left: tuple[str, ...]
) -> None:
    """B38: an inherited `-c 4096` beats the new context. Explicit args are never touched."""
    args = ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default")
    committed = {target().source: args}
    assert target(**{field: value}).inheriting(committed).extra_args == left
    explicit = target(**{field: value, "llama_extra_args": list(args)})
    assert explicit.inheriting(committed).extra_args == args


@repeatable
@given(REQUESTS, st.lists(st.sampled_from(["-c", "1", "--jinja", "--temp", "-1"]), max_size=6))
def test_inheriting_twice_is_inheriting_once(values: dict[str, Any], args: list[str]) -> None:
    """What was inherited is then explicit: a second look-up must not change it."""
    wanted = target(LoadRequest.from_dict(values))
    once = wanted.inheriting({wanted.source: tuple(args)})
    assert once.inheriting({wanted.source: ("--other",)}) == once
    assert once.request.llama_extra_args is not None


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("org/a", True),
        ("ORG/A", True),
        ("org/a:q8_0", True),
        ("org/a:F16", False),
        ("org/b", False),
        ("a", False),
    ],
)
def test_a_hub_model_is_called_by_its_repo_in_any_case(name: str, is_it: bool) -> None:
    """An unload that names what runs must not answer that nothing of that name is there."""
    assert target(model=on_hub()).is_called(name) == is_it
