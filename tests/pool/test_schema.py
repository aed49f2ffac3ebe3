"""The JSON schema and the page of the catalogue say what the reader does."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest

from orchestrator.errors import InvalidCatalogue
from orchestrator.pool.catalogue import catalogue_of
from orchestrator.pool.entries import ELSEWHERE, KEY, MODEL, POOL, REFUSED
from orchestrator.pool.reading import NOT_IN_PRESETS
from orchestrator.pool.schema import default_of, schema
from orchestrator.settings.fields import SETTINGS, Setting
from tests.kit.catalogues import CONTRACT, ROOT

VALUES: list[Any] = [
    *(0, -1, 1, 0.5, 65, 2592000, 2592001, 2**31, True),
    *("", " ", "a", "1 GiB", "-1 GiB", "1", "auto", "chat", "rank", "q8_0"),
    *("http://h", "https://h:1/v1", "ftp://h", "http://u@h", "http://h?k=v"),
    *([], ["a"], [""], [1], "ab", {}, {"Host": "1 GiB"}, {"Host": 1}, {"p": {}}, {"p": {"x": [1]}}),
    *({"p": {"model": "x"}}, {"p q": {}}, {"p": 1}),
]
TABLES: dict[str, tuple[Mapping[str, Setting], dict[str, Any]]] = {
    "pool": (POOL, {}),
    "model": (MODEL, {"model_path": "m", "kind": "rerank"}),
    "elsewhere": (ELSEWHERE, {"base_url": "http://h"}),
    "key": (KEY, {"key_file": "k"}),
}


def catalogue_with(table: str, members: dict[str, Any]) -> dict[str, Any]:
    """Return a catalogue with this table, and a model for names in it."""
    if table == "pool":
        return {"pool": members, "models": {"a": {"model_path": "m"}}}
    if table == "key":
        return {"keys": {"ann": members}, "models": {"a": {"model_path": "m"}}}
    return {"models": {"m": members}}


def is_beyond_a_schema(row: Setting, value: Any) -> bool:
    """Whether the two may differ: names of models, forms of text, and choices with white space."""
    is_text = isinstance(value, str)
    if row == MODEL["spillover"]:
        return bool(value)  # names of entries that have a base_url
    if row.choices:
        return is_text and not value.strip()
    return is_text and row in (POOL["default"], MODEL["speculative_type"])


def is_read(given: dict[str, Any]) -> bool:
    try:
        catalogue_of(given)
    except InvalidCatalogue:
        return False
    return True


@pytest.mark.parametrize(
    ("table", "key"), [(table, key) for table, (rows, _) in TABLES.items() for key in rows]
)
def test_the_schema_accepts_exactly_what_the_reader_accepts(table: str, key: str) -> None:
    accepts = jsonschema_rs.validator_for(schema()).is_valid
    fitting, (rows, base) = 0, TABLES[table]
    for value in VALUES:
        given = catalogue_with(table, {**base, key: value})
        if not is_beyond_a_schema(rows[key], value):
            assert accepts(given) is is_read(given), value
        fitting += is_read(given)
    assert 0 < fitting < len(VALUES)


@pytest.mark.parametrize(
    "given",
    [
        {"x": 1},
        *({"pool": 1}, {"models": []}, {"models": {"a": 1}}, {"keys": {"ann": []}}),
        *({"models": {"a b": {"model_path": "m"}}}, {"keys": {"": {"key_file": "k"}}}),
        *({"models": {"a": {}}}, {"models": {"a": {"model_path": "m", "base_url": "http://h"}}}),
        {"keys": {"ann": {}}},
        *(catalogue_with(table, {**base, "wieght": 1}) for table, (_, base) in TABLES.items()),
        *(catalogue_with("model", {"model_path": "m", name: "x"}) for name in REFUSED),
        catalogue_with("elsewhere", {"base_url": "http://h", "memory": "1 GiB"}),
        catalogue_with("model", {"model_path": "m", "upstream_model": "x"}),
    ],
    ids=range(21),
)
def test_the_schema_refuses_what_the_reader_refuses(given: dict[str, Any]) -> None:
    assert not is_read(given)
    assert not jsonschema_rs.is_valid(schema(), given)


def test_the_schema_accepts_the_example_of_the_contract() -> None:
    assert jsonschema_rs.is_valid(schema(), tomllib.loads(CONTRACT))


def test_the_committed_schema_is_current() -> None:
    """`make schema` writes it."""
    committed = (ROOT / "docs" / "catalogue.schema.json").read_text()
    assert committed == json.dumps(schema(), indent=2) + "\n"


def test_a_token_is_marked_as_one_that_is_only_written() -> None:
    model = schema()["properties"]["models"]["additionalProperties"]["else"]
    secret = {name for name, one in model["properties"].items() if "writeOnly" in one}
    assert secret == {name for name, row in SETTINGS.items() if row.is_secret}


PAGE = (ROOT / "docs" / "catalogue.md").read_text()


def rows_of(heading: str) -> list[tuple[str, ...]]:
    """Return the rows of the table below a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section, re.MULTILINE)


def expected(rows: Mapping[str, Setting], *names: str) -> list[tuple[str, str, str]]:
    return [(name, rows[name].help, shown(default_of(rows[name]))) for name in names or rows]


def shown(default: Any) -> str:
    if default is None:
        return "none"
    if not isinstance(default, str | int | float | list):
        return "required"
    return f"`{json.dumps(default)}`" if default != [] else "`[]`"


def test_the_page_has_a_row_for_every_key_with_its_default() -> None:
    own = [name for name in MODEL if name not in SETTINGS or name in ("pinned",)]
    assert rows_of("[pool]") == expected(POOL)
    assert rows_of("[models.NAME]: a model of ours") == expected(MODEL, *own)
    theirs = [name for name in ELSEWHERE if name not in MODEL]
    assert rows_of("[models.NAME]: another server") == expected(ELSEWHERE, *theirs)
    assert rows_of("[keys.NAME]") == expected(KEY)


def test_the_page_names_what_is_refused_and_its_example_is_valid() -> None:
    assert all(f"`{name}`" in PAGE for name in (*REFUSED, *NOT_IN_PRESETS))
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    catalogue_of(tomllib.loads(example))
    assert jsonschema_rs.is_valid(schema(), tomllib.loads(example))
