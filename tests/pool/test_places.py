"""Lines of keys in a TOML file."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pool.places import KeyPath, Places, dotted, lines_of
from tests.kit.settings import repeatable

TEXT = '''\
# a comment with [a.table] and key = 1
top = 1
a.b = 2

[models . "b.c" ]   # a header
  'quoted key' = "a = 1"
text = """
[not.a.table]
nor = "a key"
quotes ""\\"
""""
literal = \'\'\' \'\'
[not.a.table]
quotes ''\'\'\'
list = [
  "]", # a comment ]
  { inner = 1 },
  [
  ],
]
inline = { x = 1, y.z = "}" }
date = 1979-05-27T07:32:00Z
[models."b.c".presets.p]
temperature = 1.2
[[array]]
one = 1
[[array]]
one = 2
[models]
late = 1
["\\u00e4"]
'''


def test_every_kind_of_key_has_its_line() -> None:
    tomllib.loads(TEXT)
    entry = ("models", "b.c")
    assert lines_of(TEXT) == {
        ("top",): 2,
        ("a",): 3,
        ("a", "b"): 3,
        ("models",): 29,
        entry: 5,
        (*entry, "quoted key"): 6,
        (*entry, "text"): 7,
        (*entry, "literal"): 12,
        (*entry, "list"): 15,
        (*entry, "inline"): 21,
        (*entry, "date"): 22,
        (*entry, "presets"): 23,
        (*entry, "presets", "p"): 23,
        (*entry, "presets", "p", "temperature"): 24,
        ("array",): 25,
        ("array", "one"): 26,
        ("models", "late"): 30,
        ("ä",): 31,
    }


def test_what_is_deeper_than_any_key_is_left_out() -> None:
    """The parents of a key of a thousand parts would be a million."""
    assert len(lines_of(f"[a{'.a' * 1000}]\nb{'.b' * 1000} = 1")) == 8


def test_what_is_inside_of_a_value_has_the_line_of_the_value() -> None:
    places = Places("m.toml", lines_of(TEXT))
    assert places.line(("models", "b.c", "inline", "y", "z")) == 21
    assert places.line(("models", "b.c", "missing")) == 5
    assert places.line(("nowhere",)) is None
    assert places.line(()) is None


KEYS = st.text("abcXYZ019_-", min_size=1, max_size=6) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
TEXTS = st.text(st.sampled_from("ab[]{}=#.,\"'\\\n \t") | st.characters(exclude_categories=["Cs"]))


def quoted(text: str) -> str:
    """Return a basic string; JSON's are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


@st.composite
def written(draw: st.DrawFn, depth: int = 2) -> str:
    """A value as it may be written, on one line or several."""
    text = draw(TEXTS)
    plain = "".join(c for c in text if c == "\n" or c.isprintable())
    several = plain.replace("\\", "\\\\").replace('"""', '""\\"')
    choices = [
        "1",
        "1979-05-27",
        quoted(text),
        "'" + plain.replace("'", "").replace("\n", "") + "'",
        '"""' + several + '\\""""',
        '"""x' + '""' + '"""',
        "'''" + plain.replace("'", "") + "''" + "'''",
    ]
    value = draw(st.sampled_from(choices))
    if depth == 0 or draw(st.booleans()):
        return value
    inner = draw(st.lists(written(depth - 1), max_size=3))
    if draw(st.booleans()):
        return "[ # ]\n" + "".join(f"{one}, # [\n" for one in inner) + "]"
    return "{" + ", ".join(f"k{n} = {one}" for n, one in enumerate(inner)) + "}"


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, int]]:
    """A TOML text, and the line of each of its headers and keys."""
    text, expected = "", dict[KeyPath, int]()

    def spelled(path: list[str]) -> str:
        parts = [
            key if dotted((key,)) == key and draw(st.booleans()) else quoted(key) for key in path
        ]
        return draw(st.sampled_from((".", " . ", "\t. "))).join(parts)

    def end() -> str:
        return draw(st.sampled_from(("\n", " # c = 1\n", "\n\n", "\r\n", "\n  # [x]\n\t\n")))

    tables = draw(st.lists(st.lists(KEYS, min_size=1, max_size=3), max_size=4))
    for table in [[], *tables]:
        if table:
            expected.setdefault(tuple(table), text.count("\n") + 1)
            text += f"{draw(st.sampled_from(('[', ' [ ')))}{spelled(table)}]{end()}"
        for keys in draw(st.lists(st.lists(KEYS, min_size=1, max_size=2), max_size=4)):
            expected.setdefault((*table, *keys), text.count("\n") + 1)
            text += f"{spelled(keys)} = {draw(written())}{end()}"
    return text, expected


@repeatable
@given(documents())
def test_every_key_of_a_valid_text_has_the_line_it_is_on(
    document: tuple[str, dict[KeyPath, int]],
) -> None:
    text, expected = document
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # such as two keys of one name
        return
    lines = lines_of(text)
    assert {path: lines[path] for path in expected} == expected
    assert lines.keys() == {path[:n] for path in expected for n in range(1, len(path) + 1)}
    for path in lines:
        assert _is_in(path, tables)


def _is_in(path: KeyPath, tables: Any) -> bool:
    for key in path:
        tables = tables[key]
    return True


def test_generated_texts_are_mostly_valid() -> None:
    """Or the test above tests nothing."""
    valid = 0

    @repeatable
    @given(documents())
    def count(document: tuple[str, dict[KeyPath, int]]) -> None:
        nonlocal valid
        try:
            tomllib.loads(document[0])
        except tomllib.TOMLDecodeError:
            return
        valid += len(document[1]) > 1

    count()
    assert valid > 50


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("models", "chat", "weight"), "models.chat.weight"),
        (("models", "qwen2.5", "weight"), 'models."qwen2.5".weight'),
        (("a\nb",), '"a\\nb"'),
        (("\x1b[1m",), '"\\u001b[1m"'),
        (("",), '""'),
        (("x" * 5000,), '"' + "x" * 64 + '"'),
    ],
)
def test_a_path_is_shown_as_toml_writes_it_on_one_bounded_line(path: KeyPath, text: str) -> None:
    assert dotted(path) == text
