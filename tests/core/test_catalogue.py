"""What a binary's own help says it can do, and what follows for drafting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.catalogue import Catalogue, FlagHelp, parse_help
from orchestrator.errors import InvalidRequest
from orchestrator.server_args import speculative_flags

HELP = """----- common params -----

-h,    --help, --usage                  print usage and exit
-m,    --model FNAME                    model path to load
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--perf, --no-perf                       whether to enable internal timings
--rope-scaling {none,linear,yarn}       RoPE frequency scaling method
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, q8_0
                                        (default: f16)
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-type none,draft-mtp,ngram-simple,ngram-mod
                                        comma-separated list of types
"""


def catalogue(*names: str, spec_types: tuple[str, ...] = (), removed: str = "") -> Catalogue:
    flags = [FlagHelp((name,), takes_value=True, is_removed=name in removed) for name in names]
    return Catalogue((*flags, FlagHelp(("--spec-type",), takes_value=True, choices=spec_types)))


def found(name: str) -> FlagHelp:
    parsed = parse_help(HELP)
    assert parsed is not None
    flag = parsed.get(name)
    assert flag is not None
    return flag


@pytest.mark.parametrize(
    ("name", "names", "takes_value", "choices"),
    [
        ("--usage", ("-h", "--help", "--usage"), False, ()),
        ("-m", ("-m", "--model"), True, ()),
        ("-fa", ("-fa", "--flash-attn"), True, ("on", "off", "auto")),
        ("--no-perf", ("--perf", "--no-perf"), False, ()),
        ("--rope-scaling", ("--rope-scaling",), True, ("none", "linear", "yarn")),
        ("-ctk", ("-ctk", "--cache-type-k"), True, ("f32", "f16", "q8_0")),
        ("-md", ("--spec-draft-model", "-md", "--model-draft"), True, ()),
    ],
)
def test_entry_is_read_as_it_is_listed(
    name: str, names: tuple[str, ...], takes_value: bool, choices: tuple[str, ...]
) -> None:
    """Layouts differ: short heads, long heads, choices in the head or in the text."""
    flag = found(name)
    assert (flag.names, flag.takes_value, flag.choices) == (names, takes_value, choices)
    assert not flag.is_removed


def test_flag_listed_as_removed_is_known_and_not_supported() -> None:
    """B43: finding its name in the help is exactly the mistake."""
    parsed = parse_help(HELP)
    assert parsed is not None
    assert found("--draft-max").is_removed
    assert not parsed.has("--draft-max")
    assert parsed.has("--model")
    assert not parsed.has("--model", "--nonsense")


@given(st.text())
def test_any_text_is_a_catalogue_or_no_answer(text: str) -> None:
    parsed = parse_help(text)
    assert parsed is None or parsed.get("--model") is not None


@pytest.mark.parametrize("text", ["", "Segmentation fault", "usage: something else\n  --port N\n"])
def test_what_is_not_help_is_no_answer(text: str) -> None:
    """B45: an inconclusive probe must not look like a binary without flags."""
    assert parse_help(text) is None


def test_new_names_are_used_where_the_binary_has_them() -> None:
    new = ("--spec-ngram-mod-n-match", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max")
    old = ("--spec-ngram-size-n", "--draft-min", "--draft-max")
    types = ("none", "ngram-mod")
    both = catalogue(*new, *old, spec_types=types, removed=" ".join(old))
    only_old = catalogue(*old, spec_types=types)
    assert new[0] in speculative_flags("ngram-mod", (), both)
    assert old[0] in speculative_flags("ngram-mod", (), only_old)
    with pytest.raises(InvalidRequest) as raised:
        speculative_flags("ngram-mod", (), catalogue(spec_types=types))
    assert raised.value.field == "speculative_type"


def test_unknown_mode_lists_what_this_binary_accepts() -> None:
    knows = catalogue("--spec-default", spec_types=("none", "ngram-simple", "draft-mtp"))
    assert speculative_flags("draft-mtp", (), knows) == ("--spec-type", "draft-mtp")
    with pytest.raises(InvalidRequest, match="off, default, ngram-simple, draft-mtp"):
        speculative_flags("bogus", (), knows)


def test_binary_that_could_not_be_asked_is_not_held_back() -> None:
    """An inconclusive answer switches nothing off."""
    assert speculative_flags("default", (), None) == ("--spec-default",)
    assert speculative_flags("draft-mtp", (), None) == ("--spec-type", "draft-mtp")
