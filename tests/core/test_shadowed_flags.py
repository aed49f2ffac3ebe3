"""Flags of a field, which are removed from inherited extra args where a request sets the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.settings.fields import SHADOWED, strip_shadowed
from orchestrator.settings.flags import flag_of
from orchestrator.settings.target import shadowing_fields
from tests.kit.settings import (
    ANY_TEXT,
    FIELD_OF,
    SHADOWED_FLAGS,
    SHADOWS,
    TOKENS,
    Written,
    flat,
    repeatable,
    request,
    written,
)

SOME_FIELDS = st.sets(st.sampled_from(sorted(SHADOWED)))


@pytest.mark.parametrize(("field", "flag", "takes_value"), SHADOWS)
def test_a_shadowed_flag_is_removed_with_its_value_and_nothing_else(
    field: str, flag: str, takes_value: bool
) -> None:
    """B39: a boolean flag taken for one with a value would swallow the next token."""

    def strip(*args: str) -> tuple[str, ...]:
        return strip_shadowed(args, [field])

    value = () if takes_value else ("value",)
    assert strip("--mlock", flag, "value", "--temp", "1") == ("--mlock", *value, "--temp", "1")
    assert strip(f"{flag}=value", "next") == ("next",)
    assert strip(flag, "--mlock") == ("--mlock",)
    assert strip(flag, "-1") == (() if takes_value else ("-1",))
    assert strip(flag) == ()
    assert strip(f" {flag} ", "value") == value
    if flag.startswith("--"):
        assert strip(f"--{flag[2:].replace('-', '_')}", "value") == value
    others = [other for other in SHADOWED if other != field]
    assert strip_shadowed((flag, "value"), others) == (flag, "value")


def test_shadowed_flags_are_exactly_those_of_the_kit() -> None:
    ours = {field: sorted(flags.split()) for field, flags in SHADOWED.items()}
    assert ours == {field: sorted(flags.split()) for field, flags in SHADOWED_FLAGS.items()}


def test_an_inherited_template_file_survives_a_load_without_a_template() -> None:
    args = ("--chat-template-file", "/t.jinja", "--jinja")
    assert strip_shadowed(args, shadowing_fields(request(max_seq_length=4096))) == args


@pytest.mark.parametrize(
    ("values", "fields"),
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
def test_only_a_field_that_is_set_removes_flags(values: dict[str, Any], fields: set[str]) -> None:
    """Blank and Auto count as not set, `off` as set."""
    assert shadowing_fields(request(**values)) == fields


@repeatable
@given(st.lists(TOKENS, max_size=12), SOME_FIELDS)
def test_stripping_is_idempotent_and_keeps_every_other_flag(
    args: list[str], fields: set[str]
) -> None:
    once = strip_shadowed(tuple(args), fields)
    assert strip_shadowed(once, fields) == once
    owned = {flag for field, flag, _ in SHADOWS if field in fields}
    assert not owned & {flag_of(token) for token in once}
    flags = [t for t in args if flag_of(t) is not None and flag_of(t) not in owned]
    assert [t for t in once if flag_of(t) is not None] == flags
    rest = iter(args)
    assert all(token in rest for token in once)


@repeatable
@given(st.lists(written(), max_size=8), SOME_FIELDS, SOME_FIELDS)
def test_stripping_removes_a_flag_with_its_value_and_no_other_token(
    args: list[Written], fields: set[str], more: set[str]
) -> None:
    """B38, B39. In any spelling, in two steps or in one."""
    left = [
        setting._replace(tokens=()) if FIELD_OF.get(setting.flag) in fields else setting
        for setting in args
    ]
    once = strip_shadowed(flat(args), fields)
    assert once == flat(left)
    assert strip_shadowed(once, fields) == once
    if not any(setting.stray for setting in args):
        assert strip_shadowed(once, more) == strip_shadowed(flat(args), fields | more)


@repeatable
@given(st.lists(ANY_TEXT, max_size=8), SOME_FIELDS)
def test_stripping_keeps_any_other_text(args: list[str], fields: set[str]) -> None:
    assert strip_shadowed(tuple(args), fields) == tuple(args)
