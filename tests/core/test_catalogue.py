"""What a binary's own help lists, and which drafting modes follow from it."""

from __future__ import annotations

import re
import subprocess
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.server import embedded_flags
from orchestrator.server.environment import child_environment
from orchestrator.settings import reach
from orchestrator.settings.drafting import SPECULATIVE, accepted_modes, speculative_flags
from orchestrator.settings.fields import REFUSED, check_extra_args
from orchestrator.settings.help_text import Catalogue, FlagHelp, parse_help
from tests.kit.sentences import assert_sentence
from tests.kit.settings import ANY_TEXT, REFUSED_FLAGS, SHADOWS, SLOT, refusal, repeatable
from tests.kit.timing import fastest_s

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


def parsed(text: str) -> Catalogue:
    found = parse_help(text)
    assert found is not None
    return found


def catalogue(*names: str, spec_types: tuple[str, ...] = (), removed: str = "") -> Catalogue:
    flags = [FlagHelp((name,), placeholder="N", is_removed=name in removed) for name in names]
    return Catalogue((*flags, FlagHelp(("--spec-type",), placeholder="N", choices=spec_types)))


def listed(name: str) -> FlagHelp:
    return cast("FlagHelp", parsed(HELP).get(name))


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
            (),
        ),
        ("--rope-scaling", ("--rope-scaling",), True, ("none", "linear", "yarn")),
        ("-ctk", ("-ctk", "--cache-type-k"), True, ("f32", "f16", "q8_0")),
        ("-md", ("--spec-draft-model", "-md", "--model-draft"), True, ()),
    ],
)
def test_entry_of_any_layout_is_parsed(
    name: str, names: tuple[str, ...], takes_value: bool, choices: tuple[str, ...]
) -> None:
    flag = listed(name)
    assert (flag.names, bool(flag.placeholder), flag.choices) == (names, takes_value, choices)
    assert not flag.is_removed


def test_flag_listed_as_removed_is_known_and_not_supported() -> None:
    """B43: its name is in the help all the same."""
    known = parsed(HELP)
    assert listed("--draft-max").is_removed
    assert not known.has("--draft-max")
    assert known.has("--model")
    assert not known.has("--model", "--nonsense")


@given(st.text())
def test_any_text_gives_a_catalogue_or_none(text: str) -> None:
    found = parse_help(text)
    assert found is None or found.get("--model") is not None


@pytest.mark.parametrize("text", ["", "Segmentation fault", "usage: something else\n  --port N\n"])
def test_text_that_is_not_help_gives_none(text: str) -> None:
    """B45: it must not look like a binary without flags."""
    assert parse_help(text) is None


@pytest.mark.parametrize(
    ("placeholder", "choices"),
    [("path", ()), ("a,b", ("a", "b")), ("<a|b>", ("a", "b")), ("dev1,dev2,..", ())],
)
def test_choices_are_at_least_two_words(placeholder: str, choices: tuple[str, ...]) -> None:
    found = parsed(f"--model {placeholder}").get("--model")
    assert found == FlagHelp(("--model",), placeholder, choices)


def test_placeholder_may_end_one_column_before_the_description() -> None:
    """Only the blank between them separates the two."""
    line = "--model " + "{a,b}".rjust(31) + " the file"
    assert line[38:41] == "} t"
    assert parse_help(line) == Catalogue(
        (FlagHelp(("--model",), placeholder="{a,b}", choices=("a", "b")),)
    )


# ------------------------------------------------------------------------------ any help text

EMBEDDED_HELP = embedded_flags.usage()
KNOWN = parsed(EMBEDDED_HELP)
LINES = EMBEDDED_HELP.splitlines()
EDITS_OF_HELP = st.lists(
    st.tuples(
        st.sampled_from(["drop", "double", "cut", "insert", "join"]),
        st.integers(0, len(LINES) - 1),
        st.integers(0, 60),
        ANY_TEXT | st.sampled_from(["-", "--", "-,", "--x,", "--model", "\t-m", "allowed values:"]),
    ),
    max_size=6,
)


@repeatable
@given(EDITS_OF_HELP)
def test_damaged_help_gives_a_catalogue_of_what_it_lists_or_none(
    edits: list[tuple[str, int, int, str]],
) -> None:
    """B45."""
    lines = list(LINES)
    for what, at, column, text in edits:
        line = lines[at % len(lines)]
        match what:
            case "drop" if len(lines) > 1:
                lines.remove(line)
            case "double":
                lines.insert(at, line)
            case "cut":
                lines[at % len(lines)] = line[:column]
            case "join":
                lines[at % len(lines)] = line + lines[(at + 1) % len(lines)]
            case _:
                lines[at % len(lines)] = line[:column] + text + line[column:]
    found = parse_help("\n".join(lines))
    if found is None:
        return
    assert found.has("--model")
    for flag in found.flags:
        assert flag.names
        assert all(any(name in line for line in lines) for name in flag.names)


TEXT = " " * 40


def entries() -> list[list[str]]:
    """Return the lines of the help by entry."""
    found: list[list[str]] = []
    for line in LINES:
        if line.startswith("-") and not line.startswith("---"):
            found.append([line])
        elif line.startswith(" "):
            found[-1].append(line)
    return found


def test_missing_or_removed_flag_is_never_supported() -> None:
    """B43."""
    for entry in entries():
        names = parsed("\n".join(entry) + "\n-m,    --model FNAME\n").flags[0].names
        assert KNOWN.has(*names)
        left = parse_help(EMBEDDED_HELP.replace("\n".join(entry), "", 1))
        if "--model" in names:
            assert left is None
            continue
        assert left is not None
        assert not any(left.has(name) or left.get(name) for name in names)
        head = f"{', '.join(names)} N"
        head = head.ljust(len(TEXT)) if len(head) < len(TEXT) else f"{head}\n{TEXT}"
        gone = f"{head}the argument has \n{TEXT}been removed. use another\n"
        marked = EMBEDDED_HELP.replace("\n".join(entry) + "\n", gone, 1)
        for text in (EMBEDDED_HELP + gone, gone + EMBEDDED_HELP, marked):
            assert not any(parsed(text).has(name) for name in names)


def test_line_endings_make_no_difference() -> None:
    assert parse_help(EMBEDDED_HELP.replace("\n", "\r\n")) == KNOWN
    assert parse_help(EMBEDDED_HELP + "\n\n") == KNOWN


PIECES = ["-", "--", ",", " ", "\n", "a", "allowed values: ", "(", "[x|y]", ".", "\n --b N", "\n-c"]


@pytest.mark.parametrize(
    "piece",
    ["-", "-a", "-a,", "-a, ", "-a\n", "--\n", " ", " \n", "\t", "allowed values: ", "(", "--x|"],
)
def test_help_is_parsed_in_linear_time(piece: str) -> None:
    """A binary may print anything. Eight times as much text takes eight times as long, where a
    quadratic pattern would take 64 times as long.
    """

    def noises(size: int) -> tuple[str, ...]:
        text = piece * (size // len(piece))
        return text, f"-m, --model {text}", f"-m, --model X\n {text}", f"-{text}\n--model"

    def cpu_s(noise: str) -> float:
        return fastest_s(lambda: parse_help(noise), times=7)

    for long, short in zip(noises(40_000), noises(5_000), strict=True):
        assert cpu_s(long) < 24 * cpu_s(short) + 0.01


@repeatable
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_only_the_beginning_of_a_line_is_a_flag(text: str) -> None:
    found = parse_help(f"-m, --model X\n{text}")
    if found is not None:
        heads = [line for line in text.splitlines() if line.startswith("-")]
        extra = [flag for flag in found.flags if "--model" not in flag.names]
        assert all(any(name in head for head in heads) for flag in extra for name in flag.names)


# ------------------------------------------------------------------------------- drafting modes

NEW = ("--spec-ngram-mod-n-match", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max")
OLD = ("--spec-ngram-size-n", "--draft-min", "--draft-max")
TYPES = ("none", "ngram-simple", "ngram-mod", "draft-mtp")
BINARIES = {
    "11434": catalogue("--spec-default", *NEW, *OLD, spec_types=TYPES, removed=" ".join(OLD)),
    "both": catalogue("--spec-default", *NEW, *OLD, spec_types=TYPES),
    "old": catalogue(*OLD, spec_types=TYPES),
    "half": catalogue("--spec-default", *OLD, spec_types=TYPES, removed="--draft-max"),
    "lists no types": catalogue(*OLD),
    "one type": catalogue(spec_types=("ngram-simple",)),
    "no drafting": Catalogue((FlagHelp(("-m", "--model"), placeholder="N"),)),
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
        ("ngram-simple", "one type", "--spec-type ngram-simple"),
        ("draft-mtp", "11434", "--spec-type draft-mtp"),
        ("ngram-simple,draft-mtp", "11434", "--spec-type ngram-simple,draft-mtp"),
        ("draft-mtp", "lists no types", "--spec-type draft-mtp"),
    ],
)
def test_a_mode_becomes_the_first_flags_that_the_binary_supports(
    mode: str | None, binary: str, flags: str
) -> None:
    """B43: names differ between builds, and a removed one aborts the start."""
    assert speculative_flags(mode, (), BINARIES[binary]) == tuple(flags.split())
    assert speculative_flags(mode, ("--temp", "1"), BINARIES[binary]) == tuple(flags.split())
    for explicit in ("--spec-default", "--spec-type", "--spec_type=x", " --spec-default "):
        assert speculative_flags(mode, (explicit,), BINARIES[binary]) == ()


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
def test_a_mode_that_the_binary_lacks_is_refused_with_those_it_has(
    mode: str, binary: str, accepted: str
) -> None:
    error = refusal(lambda: speculative_flags(mode, (), BINARIES[binary]))
    assert error is not None
    assert error.field == "speculative_type"
    assert str(error).endswith(f" {accepted}")
    assert_sentence("settings.mode_not_supported", str(error), accepted=accepted, mode=mode)


def test_a_flag_listed_twice_and_once_as_removed_is_not_supported() -> None:
    """Leaving out a flag never aborts a start."""
    both = Catalogue(
        (
            FlagHelp(("--model",), placeholder="N"),
            FlagHelp(("--draft",), placeholder="N"),
            FlagHelp(("--draft",), placeholder="N", is_removed=True),
        )
    )
    assert both.has("--model")
    assert not both.has("--model", "--draft")


def test_without_a_catalogue_no_mode_is_refused() -> None:
    """A help that could not be read disables nothing."""
    assert speculative_flags("default", (), None) == ("--spec-default",)
    assert speculative_flags("draft-mtp", (), None) == ("--spec-type", "draft-mtp")
    assert speculative_flags("ngram-mod", (), None) == tuple(NEW_MOD.split())
    assert accepted_modes(None) == ["off", "default", "ngram-mod", "ngram-simple"]


CATALOGUES = st.builds(
    lambda listed, removed, types: Catalogue(
        tuple(
            FlagHelp((name,), placeholder="N", choices=tuple(types), is_removed=name in removed)
            if name == "--spec-type"
            else FlagHelp((name,), placeholder="N", is_removed=name in removed)
            for name in listed
        )
    ),
    st.sets(st.sampled_from([*NEW, *OLD, "--spec-type", "--spec-default"])).map(sorted)
    | st.just([*NEW, *OLD, "--spec-type", "--spec-default"]),
    st.just(set()) | st.sets(st.sampled_from([*NEW, *OLD, "--spec-type", "--spec-default"])),
    st.just(TYPES) | st.lists(st.sampled_from(TYPES), unique=True),
)


@repeatable
@given(CATALOGUES, st.sampled_from([*SPECULATIVE, "draft-mtp", "bogus"]))
def test_a_mode_becomes_flags_of_this_binary_or_an_error_that_lists_its_modes(
    catalogue: Catalogue, mode: str
) -> None:
    """B43. A mode that an error offers must not be refused in the next request."""
    error = refusal(lambda: speculative_flags(mode, (), catalogue))
    if error is None:
        flags = speculative_flags(mode, (), catalogue)
        assert catalogue.has(*(flag for flag in flags if flag.startswith("--")))
        assert mode in " ".join(flags)
        listed = catalogue.get("--spec-type")
        types = listed.choices if listed is not None else ()
        assert mode == "default" or not types or mode in types
        return
    assert error.field == "speculative_type"
    off, *offered = str(error).rpartition("use one of ")[2].split(", ")
    assert off == "off"
    assert mode not in offered
    for other in offered:
        assert speculative_flags(other, (), catalogue)


# ------------------------------------------------------------------------- the real llama-server


@pytest.fixture(scope="module")
def real_help(llama_server: str) -> str:
    done = subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


REACHES = {
    "refused": " ".join(REFUSED.values()),
    "files": reach.FILES,
    "machines": reach.MACHINES,
    "harmless": reach.HARMLESS,
}


def _reach_of(catalogue: Catalogue) -> dict[str, list[str]]:
    return {
        name: [where for where, listed in REACHES.items() if name in listed.split()]
        for flag in catalogue.flags
        for name in flag.names
        if not flag.is_removed
    }


@pytest.mark.external
def test_every_flag_of_the_real_server_has_one_reach(real_help: str) -> None:
    """It fails when a new release brings a flag: then decide what it can reach."""
    found = _reach_of(parsed(real_help))
    assert len(found) > 350
    assert {name: listed for name, listed in found.items() if len(listed) != 1} == {}


def test_every_flag_of_the_embedded_server_has_one_reach() -> None:
    found = _reach_of(parsed(embedded_flags.usage()))
    assert len(found) > 80
    assert {name: listed for name, listed in found.items() if len(listed) != 1} == {}


_LOOKS = re.compile(r"FNAME|FILE|PATH|\bDIR\b|SERVERS|URL|<user>|_FILE|\bHOST\b", re.IGNORECASE)


@pytest.mark.external
def test_flag_whose_value_is_a_file_or_an_address_is_not_harmless(real_help: str) -> None:
    found = parsed(real_help)
    looking = [name for f in found.flags if _LOOKS.search(f.placeholder) for name in f.names]
    assert len(looking) > 40
    assert not set(looking) & set(reach.HARMLESS.split())


@pytest.mark.external
def test_the_real_server_has_no_other_name_for_a_refused_flag(real_help: str) -> None:
    catalogue = parsed(real_help)
    partly = [
        flag.names
        for flag in catalogue.flags
        if any(name in REFUSED_FLAGS for name in flag.names)
        and not all(name in REFUSED_FLAGS for name in flag.names)
    ]
    assert partly == []
    listed = {name for flag in catalogue.flags for name in flag.names}
    assert len(listed & set(REFUSED_FLAGS)) > 80
    for name in sorted(listed - set(REFUSED_FLAGS)):
        check_extra_args((name, "value"))
    presets = [line.split()[0] for line in joined(real_help) if "can download weights" in line]
    assert len(presets) > 5
    assert set(presets) <= set(REFUSED_FLAGS)


@pytest.mark.external
def test_the_real_server_has_no_other_name_for_a_shadowed_flag(real_help: str) -> None:
    """B38: an inherited alias would win over the field."""
    catalogue = parsed(real_help)
    owned = {flag: (group, takes_value) for group, flag, takes_value in SHADOWS}
    for flag in catalogue.flags:
        owners = {owned.get(name) for name in flag.names}
        assert len(owners) == 1, flag.names
        for owner in owners - {None}:
            assert cast("tuple[str, bool]", owner)[1] == bool(flag.placeholder), flag.names


@pytest.mark.external
def test_no_variable_that_the_real_server_reads_is_passed_on(
    real_help: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those of allowed flags."""
    names = {
        word.rstrip(")")
        for line in real_help.splitlines()
        if "(env: " in line
        for word in line.partition("(env: ")[2].split()[:1]
    }
    assert len(names) > 100
    for name in names:
        monkeypatch.setenv(name, "of the host")
    assert "of the host" not in child_environment({}, SLOT).values()


def joined(text: str) -> list[str]:
    """Return every entry of the help on one line."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("-"):
            found.append(line)
        elif found:
            found[-1] += " " + line.strip()
    return found
