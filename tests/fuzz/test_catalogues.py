"""A catalogue is read, or it is a mistake with a place: whatever the file holds."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidCatalogue, NameTaken
from orchestrator.pool.catalogue import (
    Catalogue,
    catalogue_of,
    difference,
    merge,
    read_catalogue,
    with_entry,
)
from orchestrator.pool.entries import ELSEWHERE, KEY, MODEL, POOL
from tests.kit.catalogues import CONTRACT
from tests.kit.settings import refusal

repeatable = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LINES = CONTRACT.splitlines(keepends=True)
LEAVES = (
    *("1", "-1", "0", "1.5", "inf", "nan", "true", '"x"', '""', '"1 GiB"', '"chat"', "[]", "{}"),
    *('["chat"]', '["a", "a"]', '{ Host = "1 GiB" }', "1979-05-27", '"http://h"', '"\\u0000"'),
)
KEYS = (*POOL, *MODEL, *ELSEWHERE, *KEY, "pool", "models", "keys", "chat", "x", '"a b"', "on_busy")
HEADERS = (
    *("pool", "models", "keys", "models.chat", "models.b", "models.b.presets.p", "keys.ann"),
    *('models."a:b"', "x", "models.chat.presets"),
)
STATEMENTS = (
    st.sampled_from(LINES)
    | st.tuples(st.sampled_from(KEYS), st.sampled_from(LEAVES)).map(
        lambda one: " = ".join(one) + "\n"
    )
    | st.sampled_from(HEADERS).map(lambda header: f"[{header}]\n")
)
TEXTS = st.lists(STATEMENTS, max_size=20).map("".join).map(str.encode)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The example with some bytes replaced."""
    content = bytearray(CONTRACT.encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=4))
    return bytes(content)


@repeatable
@given(st.binary(max_size=200) | TEXTS | damaged())
@example(b"\xef\xbb\xbf[pool]\n")
@example(b"[models.chat]\rmodel_path = 'a'")
@example(b"models = {}\npool = {}\nkeys = {}")
def test_any_file_is_a_catalogue_or_a_mistake_with_a_place(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(content)
    if (error := refusal(lambda: read_catalogue(path))) is None:
        read = read_catalogue(path)
        usable(read)
        assert difference(read, read_catalogue(path)).unchanged == tuple(read.models)
        return
    assert type(error) is InvalidCatalogue
    assert error.message.startswith(f"{path}:")
    assert error.message.isprintable()
    found = re.match(r"(\d+): ", error.message.removeprefix(f"{path}:"))
    assert found is not None or error.field is None, "a mistake in a table has a line"
    assert found is None or 1 <= int(found[1]) <= content.count(b"\n") + 1


def usable(read: Catalogue) -> None:
    """Assert what the rest of a pool relies on."""
    assert all(name in read.models for name in read.pool.preload)
    assert read.pool.default is None or read.default is not None
    names = []
    for name, entry in read.models.items():
        assert (entry.request is None) is (entry.base_url is not None)
        assert name == entry.name
        names += [name, *entry.aliases]
        for called in (name, *entry.aliases):
            match = read.find(called)
            assert match is not None
            assert (match.entry, match.preset) == (entry, None)
            for preset in entry.presets:
                match = read.find(f"{called}:{preset.name}")
                assert match is not None
                assert (match.entry, match.preset) == (entry, preset)
        json.dumps([preset.members for preset in entry.presets], allow_nan=False)
    assert len(names) == len(set(names))


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary()
ANY = st.recursive(
    LEAF | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers() | st.text(max_size=3), inner)
    ),
    max_leaves=12,
)
ENTRIES = st.dictionaries(st.sampled_from((*MODEL, *ELSEWHERE, "on_busy")), ANY, max_size=4)


@repeatable
@given(
    ANY
    | st.fixed_dictionaries(
        {},
        optional={
            "pool": st.dictionaries(st.sampled_from(tuple(POOL)), ANY, max_size=3),
            "models": st.dictionaries(st.text(max_size=3) | st.just("chat"), ENTRIES | ANY),
            "keys": st.dictionaries(st.text(max_size=3), ANY),
        },
    )
)
@example({"models": {"a": {"model_path": "a", "presets": {"p": {"x": "\ud800"}}}}})
@example({"models": {"a": {"model_path": "a", "aliases": ["\ud800"]}}})
@example({"pool": {"memory": {"\U00018d09": None}}})
@example({"models": {"\ud800": {"model_path": "a"}}, "\ud800": 1})
def test_any_mapping_is_a_catalogue_or_a_mistake(given: Any) -> None:
    if (error := refusal(lambda: catalogue_of(given))) is None:
        usable(catalogue_of(given))
        return
    assert type(error) is InvalidCatalogue
    assert error.message.isprintable()
    error.message.encode()


@repeatable
@given(st.text(max_size=3) | st.just("chat"), ENTRIES, st.booleans())
def test_any_added_entry_is_one_or_an_error_of_a_request(
    name: str, fields: dict[str, Any], is_remote: bool
) -> None:
    base, fields = catalogue_of(tomllib.loads(CONTRACT)), {"model_path": "org/b", **fields}
    with contextlib.suppress(NameTaken):
        error = refusal(lambda: with_entry(base, name, fields, is_remote=is_remote))
        if error is None:
            made = with_entry(base, name, fields, is_remote=is_remote)
            usable(made)
            assert merge(base, {name: made.models[name]}) == made
        else:
            assert error.field
            assert not isinstance(error, InvalidCatalogue)
