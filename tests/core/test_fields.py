"""The rows of the settings: each stands once, and what must be written twice is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import pytest

from orchestrator import LoadRequest
from orchestrator.settings.fields import (
    SETTINGS,
    SHADOWED,
    Fields,
    LoadFields,
    StrPath,
    type_of,
)

WIDER: dict[str, Any] = {
    "model_path": StrPath,
    "mmproj_path": StrPath | None,
    "llama_extra_args": Sequence[str] | None,
}
"""What may be given, where that is more than what is kept."""


def test_checkers_see_the_types_of_the_rows() -> None:
    assert get_type_hints(LoadFields) == {**get_type_hints(Fields), **WIDER}
    assert list(SETTINGS) == list(get_type_hints(LoadFields))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_says_what_is_needed_to_use_it(name: str) -> None:
    """What is meant by nothing is allowed; a bound is one that is checked; help is a line."""
    row = SETTINGS[name]
    if name != "model_path":
        assert row.check(name, row.default) == row.default
    assert row.help
    assert not row.help.endswith(".")
    assert "\n" not in row.help
    assert f"    {name}: {row.help}." in (LoadRequest.__doc__ or "")
    for choice in row.choices:
        assert row.check(name, choice) == choice
    for bound, beyond in ((row.least, -1), (row.most, 1)):
        if bound is not None:
            assert row.check(name, type_of(name)(bound)) == bound
            with pytest.raises(ValueError, match=name):
                row.check(name, type_of(name)(bound) + beyond)
    assert name not in SHADOWED or row.in_extra_args


def test_the_server_gets_the_words_of_a_value_that_was_asked_for() -> None:
    words = {name: row.words for name, row in SETTINGS.items()}
    assert words["kind"]("chat") == words["max_seq_length"](0) == words["pooling"](None) == []
    assert words["kind"]("rerank") == ["--rerank"]
    assert words["cache_type_kv"]("q8_0") == ["-ctk", "q8_0", "-ctv", "q8_0"]
    assert words["cache_ram_mib"](0) == ["--cache-ram", "0"]
    assert words["hf_token"]("hf_x") == words["revision"]("main") == []
