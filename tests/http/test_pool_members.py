"""The `model` of a request, found and replaced while the body arrives in pieces of any size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import MalformedRequest
from orchestrator.http.pool.members import Form, Json, Members, members_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["model", "mode", "model ", 'mo"del', "messages", "{", "seed"])
MODELS = st.none() | st.text(max_size=8)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def through(members: Members, data: bytes, size: int = 7) -> bytes:
    return b"".join(map(members.feed, pieces(data, size))) + members.finish()


@given(st.dictionaries(NAMES, VALUES), MODELS, st.integers(1, 40), st.booleans(), st.data())
def test_json_is_as_if_it_had_been_parsed(
    body: dict[str, Any], model: str | None, size: int, is_ascii: bool, data: st.DataObject
) -> None:
    body["model"] = model
    keys = data.draw(st.permutations(list(body)))
    body = {key: body[key] for key in keys}
    indent = data.draw(st.sampled_from([None, 2]))
    text = json.dumps(body, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    found = Json()
    assert through(found, text, size) == text
    assert found.model == ((model or "").strip() or None)
    preset = {"seed": 7, "extra": [1, {"a": "}"}]}
    replaced = through(Json("chat", preset), text, size)
    assert json.loads(replaced.decode("utf-8", "surrogatepass")) == {
        **preset,
        **body,
        "model": "chat",
    }


@pytest.mark.parametrize("body", ["{}", "  { }", '{"messages": []}', '{"a": {"model": "x"}}'])
def test_json_without_a_model_gets_one(body: str) -> None:
    found = Json()
    through(found, body.encode())
    assert found.model is None
    made = json.loads(through(Json("chat", {"seed": 1}), body.encode()))
    assert made == {**json.loads(body), "seed": 1, "model": "chat"}


@pytest.mark.parametrize(
    "body",
    ["", "[]", '[{"model": "x"}]', '"model"', "nonsense", "1,2", '{"model": ', '{"model": x'],
)
def test_what_is_no_whole_object_goes_through(body: str) -> None:
    assert through(Json("chat", {"seed": 1}), body.encode()) == body.encode()


def test_model_is_known_before_the_rest_arrives() -> None:
    found = Json()
    found.feed(b'{"stream": true, "m\\u006fdel" : "gpt-4o-mini"')
    assert found.model is None
    found.feed(b', "messages": [')
    assert found.model == "gpt-4o-mini"


def test_of_two_models_the_first_counts_and_both_are_replaced() -> None:
    """No server sees another name than the one that the request was judged by."""
    body = b'{"model": "a", "model": "b"}'
    found = Json()
    through(found, body)
    assert found.model == "a"
    assert through(Json("chat", {}), body) == b'{"model": "chat", "model": "chat"}'


@pytest.mark.parametrize("value", ["1", "true", '["a"]', '{"a": 1}', f'"{"x" * 5000}"'])
def test_model_that_is_no_name_is_refused(value: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        through(Json(), b'{"model": %b, "a": 1}' % value.encode())
    assert refused.value.field == "model"


def form(*fields: tuple[str, str], boundary: str = "xYz") -> bytes:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields
    ]
    return "".join([*parts, f"--{boundary}--\r\n"]).encode()


@pytest.mark.parametrize("size", [1, 3, 16, 1000])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_field_of_a_form_is_found_and_replaced(size: int, at: int) -> None:
    fields = [("file", "RIFF\r\n--xY model\r\n\r\n"), ("language", "en")]
    fields.insert(at, ("model", "whisper-1"))
    text = form(*fields)
    found = members_of('multipart/form-data; boundary="xYz"')
    assert through(found, text, size) == text
    assert found.model == "whisper-1"
    replaced = through(Form("xYz", "ears", {"language": "de", "temperature": 0.5}), text, size)
    fields[at] = ("model", "ears")
    assert replaced == form(*fields, ("temperature", "0.5"))


def test_form_without_a_model_gets_one() -> None:
    text = form(("language", "en"))
    found = members_of("multipart/form-data; boundary=xYz")
    assert through(found, text) == text
    assert found.model is None
    assert through(Form("xYz", "ears", {}), text) == form(("language", "en"), ("model", "ears"))


def test_form_that_does_not_end_goes_through() -> None:
    text = form(("file", "abc"), ("model", "x"))[:-30]
    assert through(Form("xYz", "ears", {}), text, 5) == text
