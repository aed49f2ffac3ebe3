"""The rows of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import pytest

from orchestrator import LoadRequest
from orchestrator.settings.fields import SETTINGS, Fields, LoadFields, StrPath, type_of

WIDER_INPUT: dict[str, Any] = {
    "model_path": StrPath,
    "mmproj_path": StrPath | None,
    "llama_extra_args": Sequence[str] | None,
}
"""Fields that accept more types than their normal form has."""


def test_load_fields_repeats_names_and_types_of_the_rows() -> None:
    assert get_type_hints(LoadFields) == {**get_type_hints(Fields), **WIDER_INPUT}
    assert list(SETTINGS) == list(get_type_hints(LoadFields))


@pytest.mark.parametrize("name", SETTINGS)
def test_row_agrees_with_itself(name: str) -> None:
    """The default is in normal form, and no choice and no bound is refused by the row itself."""
    row = SETTINGS[name]
    if name != "model_path":
        assert row.normal(name, row.default) == row.default
    for choice in row.choices:
        assert row.normal(name, choice) == choice
    for bound, beyond in zip(row.bounds or (), (-1, 1), strict=False):
        assert row.normal(name, bound) == bound
        with pytest.raises(ValueError, match=name):
            row.normal(name, bound + beyond)
    assert not (row.refused and row.shadowed)


@pytest.mark.parametrize("name", SETTINGS)
def test_help_is_one_line_and_documents_the_request(name: str) -> None:
    help_ = SETTINGS[name].help
    assert help_
    assert not help_.endswith(".")
    assert "\n" not in help_
    assert f"        {name}: {help_}." in (LoadRequest.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("prefetch", bool), ("n_parallel", int), ("deadline_s", float), ("revision", str)],
)
def test_type_of_a_setting_is_that_of_its_values(name: str, kind: type) -> None:
    assert type_of(name) is kind


def test_a_value_becomes_flags_unless_it_is_the_default() -> None:
    to_argv = {name: row.to_argv for name, row in SETTINGS.items()}
    assert to_argv["kind"]("chat") == to_argv["max_seq_length"](0) == to_argv["pooling"](None) == []
    assert to_argv["kind"]("rerank") == ["--rerank"]
    assert to_argv["cache_type_kv"]("q8_0") == ["-ctk", "q8_0", "-ctv", "q8_0"]
    assert to_argv["cache_ram_mib"](0) == ["--cache-ram", "0"]
    assert to_argv["hf_token"]("hf_x") == to_argv["revision"]("main") == []
