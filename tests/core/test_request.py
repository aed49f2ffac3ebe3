"""A load request: checked field by field, and normalised once."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings.checks import MAX_SECONDS, checked_seconds
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.request import LoadRequest
from tests.kit.labels import label
from tests.kit.sentences import assert_sentence
from tests.kit.settings import ANY_TEXT, REQUESTS, SECRET, refusal, repeatable, request, target

FIELDS = sorted(f.name for f in fields(LoadRequest))


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
def test_wrong_type_is_malformed_and_names_its_field(field: str, value: object) -> None:
    with pytest.raises(MalformedRequest) as caught:
        request(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(("field", "value"), WRONG_VALUE, ids=label)
def test_invalid_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: value})
    assert not isinstance(caught.value, MalformedRequest)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_every_field_has_a_refused_value_above() -> None:
    assert sorted({name for name, _ in (*WRONG_TYPE, *WRONG_VALUE)}) == FIELDS


@pytest.mark.parametrize("name", ["max_seq_lenght", "ModelPath", "hf-token", "", "self"])
def test_unknown_field_is_refused_by_name(name: str) -> None:
    """A misspelt setting is never dropped silently."""
    with pytest.raises(MalformedRequest) as caught:
        LoadRequest.from_dict({"model_path": "/m.gguf", name: 1})
    assert caught.value.field == name


def test_model_path_is_required() -> None:
    with pytest.raises(MalformedRequest) as caught:
        LoadRequest.from_dict({})
    assert caught.value.field == "model_path"
    assert_sentence("settings.model_required", str(caught.value))


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("settings.not_an_object", [], {}),
        ("settings.unknown_field", {7: 1}, {"known": ", ".join(FIELDS)}),
        ("settings.unknown_field_near", {"max_seq_lenght": 1}, {}),
        ("settings.not_a_string", {"model_path": 7}, {}),
        ("settings.not_a_boolean", {"pinned": 1}, {}),
        ("settings.not_an_integer", {"max_seq_length": "8"}, {}),
        ("settings.not_seconds", {"deadline_s": "8"}, {}),
        ("settings.not_a_list", {"llama_extra_args": "-c"}, {}),
        ("settings.not_a_list_of_strings", {"llama_extra_args": ["-c", 8]}, {}),
        ("settings.not_a_choice", {"on_busy": "x" * 50}, {"given": "x" * 40}),
        ("settings.not_a_mode", {"speculative_type": "!" * 50}, {"given": "!" * 40}),
        ("settings.not_in_range", {"max_seq_length": 10**18 - 1}, {"given": 10**18 - 1}),
        ("settings.too_many_digits", {"max_seq_length": -(10**18)}, {}),
        ("settings.too_short", {"deadline_s": 0}, {}),
        ("settings.control_character", {"revision": "a\nb"}, {}),
        ("settings.not_unicode", {"llama_extra_args": ["\ud800"]}, {}),
        ("settings.too_many_args", {"llama_extra_args": ["x"] * 257}, {}),
        ("settings.bad_request_id", {"load_request_id": "-"}, {}),
        ("settings.no_model", {"model_path": " "}, {}),
        ("settings.pooling_of_chat", {"pooling": "mean"}, {}),
    ],
    ids=label,
)
def test_refusal_says_what_was_given_and_what_to_give(
    key: str, values: Any, shown: dict[str, Any]
) -> None:
    if isinstance(values, dict) and 7 not in values:
        values = {"model_path": "/m.gguf", **values}
    with pytest.raises(InvalidRequest) as caught:
        LoadRequest.from_dict(values)
    assert_sentence(key, str(caught.value), **shown)


def test_option_that_is_no_number_is_shown_by_its_type() -> None:
    error = refusal(lambda: checked_seconds("kill_grace_s", [1]))
    assert_sentence("settings.option_not_seconds", str(error))


def test_longest_allowed_time_is_accepted() -> None:
    assert request(deadline_s=MAX_SECONDS).deadline_s == MAX_SECONDS


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
def test_case_and_padding_are_normalised_except_in_a_template(
    field: str, given_: object, normal: object
) -> None:
    assert getattr(request(**{field: given_}), field) == normal


@pytest.mark.parametrize(
    "name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
)
def test_every_documented_cache_type_is_accepted(name: str) -> None:
    assert name in CACHE_TYPES
    assert request(cache_type_kv=name.upper()).cache_type_kv == name


@repeatable
@given(REQUESTS)
def test_request_survives_a_round_trip_as_json(values: dict[str, Any]) -> None:
    """What a status reports may be posted back and means the same."""
    made = LoadRequest.from_dict(values)
    posted_back = LoadRequest.from_dict(json.loads(json.dumps(made.as_dict())))
    assert posted_back == replace(made, hf_token=None)
    assert replace(made) == made
    assert pickle.loads(pickle.dumps(made)) == made


# ---------------------------------------------------------------------------------- any input


def as_sent(error: InvalidRequest) -> str:
    """Return the problem document as a web framework sends it."""
    return json.dumps(error.problem.as_dict(), ensure_ascii=False).encode().decode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)


@repeatable
@given(st.sampled_from(FIELDS), JSON | st.binary(max_size=3))
def test_any_value_is_normalised_or_refused_with_its_field(field: str, value: object) -> None:
    error = refusal(lambda: request(**{field: value}))
    if error is None:
        made = request(**{field: value})
        assert replace(made) == made
    else:
        assert error.field == field


@repeatable
@given(JSON | st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, JSON, max_size=4))
def test_any_json_is_a_request_or_an_error_that_can_be_sent(body: Any) -> None:
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
def test_anything_but_an_object_is_malformed(body: Any) -> None:
    """A loop over names would accept a list of names."""
    with pytest.raises(MalformedRequest) as caught:
        LoadRequest.from_dict(body)
    assert type(body).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [7, None, ("model_path",), 10**5000, "\ud800", "x" * 10**6],
    ids=lambda name: type(name).__name__,
)
def test_unusable_name_gives_an_error_that_can_be_sent(name: Any) -> None:
    """JSON cannot carry a lone surrogate, and nobody wants a megabyte back."""
    with pytest.raises(MalformedRequest) as caught:
        LoadRequest.from_dict({"model_path": "m", name: 1})
    assert caught.value.field
    assert len(caught.value.field) <= 64
    assert len(as_sent(caught.value)) < 1000


@pytest.mark.parametrize(
    "field", ["max_seq_length", "n_parallel", "idle_ttl_s", "stall_timeout_s", "deadline_s"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_number_with_too_many_digits_is_refused_without_writing_it_out(
    field: str, sign: int
) -> None:
    """`str(int)` raises above 4300 digits, also inside an error message."""
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: sign * 10**5000})
    assert caught.value.field == field
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [bytearray(), bytearray(b"x"), memoryview(b""), {}, set(), ""])
def test_only_an_empty_list_clears_extra_args(value: Any) -> None:
    with pytest.raises(MalformedRequest) as caught:
        request(llama_extra_args=value)
    assert caught.value.field == "llama_extra_args"


@pytest.mark.parametrize("field", ["on_busy", "cache_type_kv", "speculative_type"])
def test_error_does_not_repeat_a_megabyte(field: str) -> None:
    """It is logged, stored as last_error and sent with every status."""
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: "?" * 10**6})
    assert len(str(caught.value)) < 300


# ------------------------------------------------------------------------------------- the token


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: request(hf_token=[SECRET]),
        lambda: request(hf_token=SECRET + "\x00"),
        lambda: request(hf_token=SECRET, n_parallel=0),
        lambda: request(hf_token=SECRET, unknown=SECRET),
        lambda: request(llama_extra_args=["--hf-token", SECRET]),
        lambda: request(llama_extra_args=[f"--hf-token={SECRET}"]),
        lambda: request(llama_extra_args=[f"--hf-token={SECRET}\n"]),
        lambda: request(llama_extra_args=[f"--api-key={SECRET}\x00"]),
    ],
)
def test_no_error_contains_a_token(attempt: Callable[[], object]) -> None:
    """B67. The likeliest way there is a trailing newline from a file."""
    error = refusal(attempt)
    assert error is not None
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    assert SECRET not in as_sent(error)


def test_request_never_shows_its_token() -> None:
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
