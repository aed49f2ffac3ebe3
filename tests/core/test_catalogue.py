"""What a binary's own help says it can do, and what follows for drafting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.settings.flags import accepted_modes, speculative_flags
from orchestrator.settings.help_text import Catalogue, FlagHelp, parse_help

HELP = """----- common params -----

-h,    --help, --usage                  print usage and exit
-m,    --model FNAME                    model path to load
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--perf, --no-perf                       whether to enable internal timings
--fim-qwen-1.5b-default                 use default Qwen 2.5 Coder 1.5B
--spec-draft-override-tensor, -otd, --override-tensor-draft <name>=<type>,...
                                        override tensor buffer type for draft model
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
        ("--fim-qwen-1.5b-default", ("--fim-qwen-1.5b-default",), False, ()),
        (
            "-otd",
            ("--spec-draft-override-tensor", "-otd", "--override-tensor-draft"),
            True,
            ("name>=<type>", "..."),
        ),
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


NEW = ("--spec-ngram-mod-n-match", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max")
OLD = ("--spec-ngram-size-n", "--draft-min", "--draft-max")
TYPES = ("none", "ngram-simple", "ngram-mod", "draft-mtp")
BINARIES = {
    "11434": catalogue("--spec-default", *NEW, *OLD, spec_types=TYPES, removed=" ".join(OLD)),
    "both": catalogue("--spec-default", *NEW, *OLD, spec_types=TYPES),
    "old": catalogue(*OLD, spec_types=TYPES),
    "half": catalogue("--spec-default", *OLD, spec_types=TYPES, removed="--draft-max"),
    "lists no types": catalogue(*OLD),
    "no drafting": Catalogue((FlagHelp(("-m", "--model"), takes_value=True),)),
}
NEW_MOD = (
    "--spec-type ngram-mod --spec-ngram-mod-n-match 24 --spec-ngram-mod-n-min 48 "
    "--spec-ngram-mod-n-max 64"
)
OLD_MOD = "--spec-type ngram-mod --spec-ngram-size-n 24 --draft-min 48 --draft-max 64"


@pytest.mark.parametrize(
    ("mode", "binary", "flags"),
    [
        *[(None, binary, "") for binary in BINARIES],
        ("default", "11434", "--spec-default"),
        ("ngram-mod", "11434", NEW_MOD),
        ("ngram-mod", "both", NEW_MOD),
        ("ngram-mod", "old", OLD_MOD),
        ("ngram-mod", "lists no types", OLD_MOD),
        ("ngram-simple", "11434", "--spec-type ngram-simple"),
        ("ngram-simple", "old", "--spec-type ngram-simple"),
        ("draft-mtp", "11434", "--spec-type draft-mtp"),
        ("ngram-simple,draft-mtp", "11434", "--spec-type ngram-simple,draft-mtp"),
        ("draft-mtp", "lists no types", "--spec-type draft-mtp"),
    ],
)
def test_a_mode_is_the_first_flags_that_the_binary_supports(
    mode: str | None, binary: str, flags: str
) -> None:
    """B43: names differ between builds, and a removed one aborts the start."""
    assert speculative_flags(mode, (), BINARIES[binary]) == tuple(flags.split())
    assert speculative_flags(mode, ("--spec-type", "x"), BINARIES[binary]) == ()


@pytest.mark.parametrize(
    ("mode", "binary", "accepted"),
    [
        ("default", "old", "off, ngram-mod, ngram-simple, draft-mtp"),
        ("ngram-mod", "half", "off, default, ngram-simple, draft-mtp"),
        ("bogus", "11434", "off, default, ngram-mod, ngram-simple, draft-mtp"),
        ("ngram-simple,bogus", "11434", "off, default, ngram-mod, ngram-simple, draft-mtp"),
        *[(mode, "no drafting", "off") for mode in ("default", "ngram-mod", "ngram-simple", "x")],
    ],
)
def test_a_mode_the_binary_lacks_is_refused_with_those_it_has(
    mode: str, binary: str, accepted: str
) -> None:
    """What is offered is what the next request may ask for, and no more."""
    with pytest.raises(InvalidRequest, match=f"it accepts {accepted}$") as refused:
        speculative_flags(mode, (), BINARIES[binary])
    assert refused.value.field == "speculative_type"


def test_a_flag_listed_twice_and_once_as_removed_is_not_supported() -> None:
    """Of two answers the careful one: not using a flag never aborts a start."""
    both = Catalogue(
        (
            FlagHelp(("--model",), takes_value=True),
            FlagHelp(("--draft",), takes_value=True),
            FlagHelp(("--draft",), takes_value=True, is_removed=True),
        )
    )
    assert both.has("--model")
    assert not both.has("--model", "--draft")


def test_binary_that_could_not_be_asked_is_not_held_back() -> None:
    """An inconclusive answer switches nothing off."""
    assert speculative_flags("default", (), None) == ("--spec-default",)
    assert speculative_flags("draft-mtp", (), None) == ("--spec-type", "draft-mtp")
    assert accepted_modes(None) == ["off", "default", "ngram-mod", "ngram-simple"]


def test_a_hint_may_fill_the_room_before_the_text_to_the_last_place() -> None:
    """The text begins in its column; a blank before it is all that tells the two apart."""
    line = "--model " + "{a,b}".rjust(31) + " the file"
    assert line[38:41] == "} t"
    read = parse_help(line)
    assert read == Catalogue((FlagHelp(("--model",), takes_value=True, choices=("a", "b")),))
