"""Choosing the files of a model: properties over listings as they are on the Hub.

Listings are generated together with what they hold, so every choice can be compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import ModelNotFound
from orchestrator.models.variants import PREFERENCE, Chosen, choose, label_of, matches, parts_of
from orchestrator.settings import flags
from orchestrator.settings.reference import split_reference
from tests.kit.sentences import assert_sentence
from tests.kit.timing import fastest_s

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


def chosen(names: Sequence[str], variant: str | None = None) -> Chosen:
    return choose(names, variant, where="owner/name")


def answer(names: Sequence[str], variant: str | None = None) -> Chosen | ModelNotFound:
    """Return the choice, or the error."""
    try:
        return chosen(names, variant)
    except ModelNotFound as error:
        return error


def refused(names: Sequence[str], variant: str | None, field: str) -> str:
    """Return the message of the error."""
    error = answer(names, variant)
    assert isinstance(error, ModelNotFound)
    assert error.field == field
    return error.message


# Generated listings


class Variant(NamedTuple):
    """One variant of a generated listing."""

    label: str
    folder: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    variants: tuple[Variant, ...]
    projectors: tuple[str, ...]
    others: tuple[str, ...]
    models: int

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.others, *self.projectors, *(n for v in self.variants for n in v.weights))


RARE = ("Q4_0", "Q5_0", "IQ1_S", "UD-TQ1_0", "TQ2_0", "MXFP4", "MXFP4_MOE", "Q4_K_M_L", "Q4_0_4_4")
LABELS = st.sampled_from([*PREFERENCE, *RARE])
BASES = ("Qwen3-0.6B", "gemma-3-4b-it", "DeepSeek-R1-0528", "Q-and-A.v2", "llama_3.2", "model")
COMPANIONS = (
    *("imatrix_unsloth.gguf", "Model.imatrix.gguf", "mtp-Model-Q4_K_M.gguf", "MTP/Model-F16.gguf"),
    *("dspark/Model-Q8_0.gguf", "dflash-Model-Q4_K_M.gguf", "._Model-Q4_K_M.gguf", "._mmproj.gguf"),
    *("Model-Q4_K_M-be.gguf", "model-be.Q4_K_M.gguf", "Q8_0/mtp-Model-Q8_0.gguf"),
    *("sub/MTP/Model-UD-Q4_K_XL-00001-of-00002.gguf", "Q8-be-00001-of-00002.gguf"),
    *("README.md", "config.json", "imatrix.dat", ".gitattributes", "UD-Q4_K_XL.safetensors"),
)
PROJECTORS = ("mmproj-F16.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf", "mmproj-model-f16.gguf")


@st.composite
def variants(draw: st.DrawFn, base: str, label: str, *, room: str = "") -> Variant:
    """A variant, flat, in a folder of its own, or with its label only in the name of that."""
    shape = draw(st.sampled_from(("flat", "folder", "bare")))
    folder = room if shape == "flat" else f"{room}{label}/"
    stem = base if shape == "bare" else f"{base}{draw(st.sampled_from('-._'))}{label}"
    if draw(st.booleans()):
        stem = stem if shape == "bare" else stem.lower()
    count = draw(st.sampled_from((1, 1, 2, 3, 7)))
    names = [f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    if count == 1 and draw(st.booleans()):
        names = [f"{stem}.gguf"]
    return Variant(label, folder, tuple(folder + name for name in names))


@st.composite
def listings(draw: st.DrawFn, models: int = 1) -> Listing:
    """One or two models in up to 25 variants, with projectors and companion files."""
    found: list[Variant] = []
    bases = draw(st.lists(st.sampled_from(BASES), min_size=models, max_size=models, unique=True))
    for base in bases:
        room = draw(st.sampled_from(("", f"{base}/", "gguf/"))) if models > 1 else ""
        labels = draw(st.lists(LABELS, min_size=1, max_size=25 // models, unique=True))
        found += [draw(variants(base, label, room=room)) for label in labels]
    projectors = draw(st.lists(st.sampled_from(PROJECTORS), max_size=3, unique=True))
    others = draw(st.lists(st.sampled_from(COMPANIONS), max_size=6, unique=True))
    return Listing(tuple(found), tuple(projectors), tuple(others), models)


ANY_LISTING = st.one_of(listings(), listings(2))


@repeatable
@given(listings())
def test_variant_is_found_by_its_label_and_by_its_path(listing: Listing) -> None:
    """With the same result, or another spelling would reload the model."""
    for variant in listing.variants:
        expected = chosen(listing.names, variant.label)
        assert expected.weights == variant.weights
        assert expected.variant == variant.label
        for path in variant.weights:
            assert chosen(listing.names, path) == expected
            assert chosen(listing.names, path.removesuffix(".gguf")) == expected
            assert chosen(listing.names, path.upper()) == expected
        for name in (variant.label.lower(), f" {variant.label} ", variant.folder + variant.label):
            assert chosen(listing.names, name) == expected


@repeatable
@given(listings(2))
def test_reported_names_of_two_models_differ(listing: Listing) -> None:
    """Identity and inherited args go by the reported name."""
    reported: dict[str, tuple[str, ...]] = {}
    for variant in listing.variants:
        (found,) = {chosen(listing.names, path) for path in variant.weights}
        assert found.weights == variant.weights
        assert chosen(listing.names, found.variant) == found
        assert reported.setdefault(found.variant, found.weights) == found.weights
        by_label = chosen(listing.names, variant.label)
        assert variant.label == label_of(by_label.weights[0])
    assert len(reported) == len(listing.variants)


@repeatable
@given(ANY_LISTING, st.randoms(use_true_random=False), st.none() | LABELS)
def test_order_and_duplicates_of_a_listing_do_not_matter(
    listing: Listing, random: Random, label: str | None
) -> None:
    shuffled = [*listing.names, *listing.names[:3]]
    random.shuffle(shuffled)
    first, second = answer(listing.names, label), answer(shuffled, label)
    if isinstance(first, ModelNotFound):
        assert isinstance(second, ModelNotFound)
        assert second.problem == first.problem
    else:
        assert second == first


@repeatable
@given(ANY_LISTING, st.none() | LABELS | st.sampled_from(COMPANIONS + PROJECTORS))
def test_weights_are_all_parts_of_one_variant_and_nothing_else(
    listing: Listing, asked: str | None
) -> None:
    """A companion, or parts of two models, would fail only after the old server is gone."""
    found = answer(listing.names, asked)
    if isinstance(found, ModelNotFound):
        return
    if asked in (*COMPANIONS, *PROJECTORS):
        assert asked in found.weights, "it is reached by its path"
        assert found.projector is None
        return
    assert found.weights in [variant.weights for variant in listing.variants]
    assert found.projector is None or found.projector in listing.projectors
    if listing.models == 1:
        assert (found.projector is None) == (not listing.projectors)


@repeatable
@given(ANY_LISTING)
def test_preferred_variant_is_chosen_without_a_name(listing: Listing) -> None:
    """Of two models with the same label, the one nearer to the root."""
    found = chosen(listing.names)
    assert chosen(listing.names, " ") == found
    present = [label for label in PREFERENCE if label in {v.label for v in listing.variants}]
    same = [v for v in listing.variants if v.label in present[:1]] or list(listing.variants)
    assert found.weights in [variant.weights for variant in same]
    depths = [variant.folder.count("/") for variant in same]
    assert found.weights[0].count("/") == min(depths)


@repeatable
@given(ANY_LISTING, LABELS)
def test_error_for_an_unknown_variant_lists_all(listing: Listing, label: str) -> None:
    """Each once, preferred ones first, by a name that can be requested."""
    assume(label not in {variant.label for variant in listing.variants})
    message = refused(listing.names, label, "gguf_variant")
    before, _, known = message.partition("; it has ")
    assert before == f"owner/name has no variant {label!r}"
    listed = known.split(", ")
    found = [chosen(listing.names, name) for name in listed]
    assert [one.variant for one in found] == listed
    assert sorted(one.weights for one in found) == sorted(v.weights for v in listing.variants)
    ranks = [PREFERENCE.index(label) for label in map(label_of, listed) if label in PREFERENCE]
    assert ranks == sorted(ranks)


@repeatable
@given(ANY_LISTING, st.data())
def test_missing_part_is_listed_and_never_replaced(listing: Listing, data: st.DataObject) -> None:
    """Neither by a part of another variant nor by another model."""
    split = [variant for variant in listing.variants if len(variant.weights) > 1]
    assume(split)
    variant = data.draw(st.sampled_from(split))
    gone = data.draw(st.sets(st.sampled_from(variant.weights), min_size=1))
    assume(len(gone) < len(variant.weights))
    names = [name for name in listing.names if name not in gone]
    left = next(name for name in variant.weights if name not in gone)
    message = refused(names, left, "model_path")
    assert all(name in message for name in gone)
    if listing.models == 1:
        assert refused(names, variant.label, "model_path") == message
        if chosen(listing.names).weights == variant.weights:
            assert refused(names, None, "model_path") == message


# Examples


def test_preferred_labels_are_never_confused() -> None:
    assert len(set(PREFERENCE)) == len(PREFERENCE) == 36
    for label in (*PREFERENCE, *RARE):
        assert label_of(f"m-{label.lower()}.gguf") == label
        assert label_of(f"sub/{label}/m-00001-of-00002.gguf") == label
    for first, second in combinations(PREFERENCE, 2):
        names = [f"a-{second}.gguf", f"b-{first}.gguf"]
        assert chosen(names).variant == first
        assert [chosen(names, label).variant for label in (first, second)] == [first, second]
        assert not matches(names[0], first)
        assert not matches(names[1], second)


@pytest.mark.parametrize(
    ("name", "label", "is_match"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M", True),
        ("m-q4_k_m.gguf", "Q4_K_M", True),
        ("m.Q4_K_M.gguf", "Q4_K_M", True),
        ("m_Q4_K_M.gguf", "Q4_K_M", True),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", True),
        ("m-UD-Q4_K_XL.gguf", "Q4_K_XL", False),
        ("m-UD-Q4_K_M_L.gguf", "Q4_K_M", False),
        ("m-UD-Q4_K_M.gguf", "Q4_K_M", False),
        ("m-IQ4_K_M.gguf", "Q4_K_M", False),
        ("m-Q4_K_M_L.gguf", "Q4_K_M", False),
        ("m-Q4_K_M.gguf", "Q4_K", False),
        ("m-BF16.gguf", "F16", False),
        ("m-BF16-Q4_K_M.gguf", "BF16", False),
        ("Q4_K_M/m-Q8_0.gguf", "Q4_K_M", False),
        ("UD-Q4_K_XL/m-00001-of-00003.gguf", "ud-q4_k_xl", True),
        ("m-Q4_0-00001-of-00002.gguf", "Q4_0", True),
        ("m-Q4_0-00001-of-00002.gguf", "00001", False),
        ("m-Q4_0.gguf", "gguf", False),
        ("m.i1-Q4_K_M.gguf", "i1-Q4_K_M", True),
        ("m-UD-Q4_K_M-imat.gguf", "Q4_K_M-imat", False),
        ("m-.*.gguf", ".*", True),
        ("m-Q4_0.gguf", ".*", False),
        ("m-TQ\u0661_\u0661.gguf", "TQ1_1", False),
        ("m-Q4_\u212a_M.gguf", "Q4_K_M", False),
    ],
)
def test_label_matches_only_at_word_boundaries(name: str, label: str, is_match: bool) -> None:
    """A similar label is another model."""
    assert matches(name, label) is is_match
    names = [*parts_of(name), "other-Q2_K.gguf"]
    if is_match:
        assert chosen(names, label).weights == tuple(names[:-1])
    else:
        refused(names, label, "gguf_variant")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M"),
        ("q8-m-ud-q4_k_xl.gguf", "UD-Q4_K_XL"),
        ("BF16/m-Q8_0.gguf", "Q8_0"),
        ("F16/BF16/m.gguf", "BF16"),
        ("m.gguf", "m.gguf"),
        ("sub/m.gguf", "m.gguf"),
        ("sub/sub/m.gguf", "m.gguf"),
        ("SQ4_0.gguf", "SQ4_0.gguf"),
        ("", ""),
    ],
)
def test_label_is_read_from_the_file_name_and_then_the_folder(name: str, label: str) -> None:
    assert label_of(name) == label


@pytest.mark.parametrize(
    ("names", "asked", "weights", "variant"),
    [
        (["b-Q8_0.gguf", "a-Q8_0.gguf"], "Q8_0", "a-Q8_0.gguf", "Q8_0"),
        (["b-Q8_0.gguf", "a-Q8_0.gguf"], "b-Q8_0", "b-Q8_0.gguf", "b-Q8_0.gguf"),
        (["a/m-Q8_0.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf", "Q8_0"),
        (["a/m-Q8_0.gguf", "m-Q8_0.gguf"], "a/q8_0", "a/m-Q8_0.gguf", "a/Q8_0"),
        (["a/m-Q4_K_M.gguf", "m-Q8_0.gguf"], None, "a/m-Q4_K_M.gguf", "Q4_K_M"),
        (["base/model.gguf", "chat/model.gguf"], "chat", "chat/model.gguf", "chat/model.gguf"),
        (["base/model.gguf", "chat/model.gguf"], "Model.gguf", "base/model.gguf", "model.gguf"),
        (["Q8_0.gguf", "A-Q8_0.gguf"], "Q8_0", "Q8_0.gguf", "Q8_0"),
        (["Q8_0.gguf", "A-Q8_0.gguf"], "a-q8_0", "A-Q8_0.gguf", "A-Q8_0.gguf"),
        (["M.gguf", "m.gguf"], "m.gguf", "m.gguf", "m.gguf"),
        (["M.gguf", "m.gguf"], "M", "M.gguf", "M.gguf"),
        (["m-b.gguf", "m-a.gguf"], None, "m-a.gguf", "m-a.gguf"),
        (["m-Q4_K.gguf", "m-Q4_K_M.gguf"], "Q4_K", "m-Q4_K.gguf", "Q4_K"),
        (["X.i1-Q4_0.gguf", "X.i1-Q8_0.gguf"], "i1-Q8_0", "X.i1-Q8_0.gguf", "Q8_0"),
        (["dir/M.GGUF"], None, "dir/M.GGUF", "M.GGUF"),
        (["a-mmproj-b.gguf", "mmproj/c.gguf", "m.gguf"], None, "m.gguf", "m.gguf"),
        (["mmprojection-Q8_0.txt", "commproj-Q8_0.gguf"], None, "commproj-Q8_0.gguf", "Q8_0"),
        (["to-be-or-not-Q8_0.gguf", "m-be.gguf"], None, "to-be-or-not-Q8_0.gguf", "Q8_0"),
        (["m-Q8_0-00001-of-00002.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf", "Q8_0"),
        ([" m.gguf", "a/ m.gguf"], None, "a/ m.gguf", "a/ m.gguf"),
        (["m-Q4_K_M-00003-of-00002.gguf", "m-F32.gguf"], None, "m-F32.gguf", "F32"),
        (["m-00000-of-00000.gguf"], None, "m-00000-of-00000.gguf", "m-00000-of-00000.gguf"),
        (["../m-F16.gguf", "/m-F16.gguf", "a//m-F16.gguf", "a/./m-F16.gguf", "m\n-F16.gguf",
          "m-F16.gguf/", "\ud800-F16.gguf", "m.gguf"], None, "m.gguf", "m.gguf"),
        (["m-0000\u0661-of-00002.gguf"], None, "m-0000\u0661-of-00002.gguf",
         "m-0000\u0661-of-00002.gguf"),
    ],
)  # fmt: skip
def test_name_chooses_one_variant(
    names: list[str], asked: str | None, weights: str, variant: str
) -> None:
    """By a path, then `folder/label`, then a label, then text that only one name has."""
    found = chosen(names, asked)
    assert (found.weights, found.variant) == ((weights,), variant)
    assert chosen(names, found.variant) == found


def test_text_in_several_names_is_ambiguous() -> None:
    names = ["a-Q8_0.gguf", "a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]
    assert chosen(names, "b").weights == ("b-Q4_K_M.gguf",)
    assert_sentence("variant.ambiguous", refused(names, "a", "gguf_variant"))


@pytest.mark.parametrize("asked", ["../m", "/etc/passwd", "m/../m", ".", "*", "m-Q8_0.ggu", "\0"])
def test_variant_is_never_used_as_a_path(asked: str) -> None:
    refused(["m-Q8_0.gguf", "n-Q8_0.gguf"], asked, "gguf_variant")


def test_parts_are_of_one_folder_and_one_count() -> None:
    names = [
        *("Q4_0/m-00001-of-00002.gguf", "Q4_0/m-00002-of-00003.gguf"),
        *("Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"),
    ]
    assert chosen(names, "Q8_0").weights == tuple(names[2:])
    assert_sentence("variant.part_missing", refused(names, "Q4_0", "model_path"))


def test_error_without_a_model_lists_companions() -> None:
    """They are the usual reason."""
    assert_sentence("model.none", refused([], None, "model_path"))
    message = refused(["mmproj-F16.gguf", "mtp-m.gguf", "README.md"], "Q4_0", "model_path")
    assert_sentence("model.companions", message)


def test_length_of_errors_is_bounded() -> None:
    """Anyone can write a listing, and errors go into logs and answers."""
    many = [f"m{number:04d}-{'x' * 500}.gguf" for number in range(1000)]
    known = refused(many, "Q4_0", "gguf_variant").partition("; it has ")[2]
    assert known.count(", ") == 29
    assert known.endswith(" and 970 more")
    assert len(refused(many, "y" * 5000, "gguf_variant")) < 30 * 130 + 300
    message = refused([f"mmproj-{name}" for name in many], None, "model_path")
    assert message.endswith(" and 970 more")
    assert len(message) < 30 * 130 + 300
    message = refused(["m-00007-of-99999.gguf"], None, "model_path")
    assert "m-00031-of-99999.gguf and 99968 more are missing" in message
    assert refused(["mmproj\ud800\n.gguf"], None, "model_path").endswith(r"mmproj\ud800\n.gguf")


# Projectors


@pytest.mark.parametrize(
    ("projectors", "weights", "expected"),
    [
        ([], "m.gguf", None),
        (["mmproj-BF16.gguf", "mmproj-F16.gguf"], "m.gguf", "mmproj-F16.gguf"),
        (["mmproj-BF16.gguf", "mmproj-model-f16.gguf"], "m.gguf", "mmproj-model-f16.gguf"),
        (["mmproj-F32.gguf", "mmproj-BF16.gguf"], "m.gguf", "mmproj-BF16.gguf"),
        (["mmproj-F16.gguf", "Q8_0/mmproj-F32.gguf"], "Q8_0/m.gguf", "Q8_0/mmproj-F32.gguf"),
        (["mmproj-F32.gguf", "z/mmproj-F16.gguf"], "Q8_0/m.gguf", "mmproj-F32.gguf"),
        (["a/mmproj-F32.gguf", "mmproj-F16.gguf"], "a/b/m.gguf", "a/mmproj-F32.gguf"),
        (["mmproj/F32.gguf", "mmproj/m-f16.gguf"], "m.gguf", "mmproj/m-f16.gguf"),
        (["vision/m-mmproj-f16.gguf"], "Q8_0/m.gguf", "vision/m-mmproj-f16.gguf"),
        (["x/y/mmproj.gguf", "x/mmproj-F16.gguf"], "x/y/m.gguf", "x/y/mmproj.gguf"),
        (["._mmproj-F16.gguf", "MTP/mmproj-F16.gguf", "mmproj.txt"], "m.gguf", None),
    ],
)
def test_nearest_projector_is_chosen(
    projectors: list[str], weights: str, expected: str | None
) -> None:
    """Of those in one place, one in 16 bits."""
    found = chosen([weights, *projectors])
    assert (found.weights, found.projector) == ((weights,), expected)


def test_projector_of_another_model_is_never_chosen() -> None:
    """The server does not start with it; within a folder only the name shows it."""
    names = [
        *("Qwen-VL-4B-Q8_0.gguf", "Qwen-VL-4B-Thinking-Q8_0.gguf", "Phi-Q8_0.gguf"),
        *("mmproj-Qwen-VL-4B-F16.gguf", "mmproj-Qwen-VL-4B-Thinking-F16.gguf"),
    ]
    assert chosen(names, names[0]).projector == names[3]
    assert chosen(names, names[1]).projector == names[4]
    assert chosen(names, names[2]).projector is None
    names = ["m-Q8_0.gguf", "m-imat-Q4_0.gguf", "mmproj-m-BF16.gguf"]
    assert [chosen(names, name).projector for name in names[:2]] == [names[2]] * 2
    rooms = ["text/a-Q8_0.gguf", "sight/b-Q4_0.gguf", "sight/mmproj-F16.gguf"]
    assert chosen(rooms, "Q8_0").projector is None
    assert chosen(rooms, "Q4_0").projector == "sight/mmproj-F16.gguf"


# Arbitrary names

WORDS = st.sampled_from(
    [
        *(
            *"/.-_ :\n",
            "..",
            "m",
            "M",
            "mmproj",
            "mtp-",
            "MTP/",
            "-be",
            "imatrix",
            ".gguf",
            ".GGUF",
        ),
        *("-00001-of-00002", "-00002-of-00002", "-00000-of-00000", "-00009-of-99999", "UD-"),
        *("\ud800", "\u0661", "\u212a", "\u0130", "\u017f", *PREFERENCE[::5], *RARE),
    ]
)
ANY_NAME = st.lists(WORDS, max_size=6).map("".join) | st.text(st.characters(), max_size=12)
ANY_FILE = ANY_NAME | ANY_NAME.map(lambda name: name + ".gguf")


@settings(repeatable, max_examples=600)
@given(st.lists(ANY_FILE, max_size=12), st.none() | ANY_FILE)
@example(["\u0130.gguf", "i\u0307.gguf"], "\u0130")
def test_any_listing_gives_a_consistent_choice_or_an_error(
    names: list[str], asked: str | None
) -> None:
    found = answer(names, asked)
    assert repr(answer(names[::-1], asked)) == repr(found)
    if isinstance(found, ModelNotFound):
        assert found.field in ("model_path", "gguf_variant")
        assert found.message.isprintable()
        return
    assert set(found.weights) <= set(names)
    assert list(found.weights) == list(parts_of(found.weights[0]))
    assert chosen(names, found.variant) == found
    assert chosen(names, found.weights[-1]) == found
    for name in filter(None, (*found.weights, found.projector, found.variant)):
        assert not flags.has_control_character(name)
        assert flags.is_encodable(name)
        assert {"", ".", ".."}.isdisjoint(name.split("/"))


@repeatable
@given(ANY_FILE, ANY_NAME)
def test_file_matches_its_own_label(name: str, other: str) -> None:
    """Or a model would be refused for the name it was reported with."""
    assert matches(name, label_of(name))
    assert matches(name, name.rpartition("/")[2])
    assert isinstance(matches(name, other), bool)


@pytest.mark.parametrize("asked", [None, "nope", "Q4_K_M"])
def test_large_listing_takes_linear_time(asked: str | None) -> None:
    """Eight times the files take eight times as long; a quadratic search would take 64 times."""
    long = fastest_s(lambda: answer(listing(8), asked), times=20)
    assert long < 24 * fastest_s(lambda: answer(listing(1), asked), times=20)
    assert isinstance(answer(listing(8), asked), ModelNotFound) is (asked == "nope")


@cache
def listing(scale: int) -> tuple[str, ...]:
    labels = (*PREFERENCE, *RARE)
    names = [f"m{number}-{labels[number % len(labels)]}.gguf" for number in range(250 * scale)]
    names += [f"s{n}-00{p:03d}-of-00010.gguf" for n in range(25 * scale) for p in range(1, 11)]
    names += [f"mmproj-m{number}-a-b-c.gguf" for number in range(125 * scale)]
    return tuple(names)


# References to Hub repos


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unsloth/Qwen3-0.6B-GGUF", ("unsloth/Qwen3-0.6B-GGUF", None)),
        ("unsloth/Qwen3-0.6B-GGUF:UD-Q4_K_XL", ("unsloth/Qwen3-0.6B-GGUF", "UD-Q4_K_XL")),
        ("o/n:BF16/m-00001-of-00002.gguf", ("o/n", "BF16/m-00001-of-00002.gguf")),
        ("o/n: Q4_0 ", ("o/n", "Q4_0")),
        ("0x/a_b.c", ("0x/a_b.c", None)),
        ("o/" + "n" * 94, ("o/" + "n" * 94, None)),
    ],
)
def test_reference_is_split_into_repo_and_variant(
    text: str, expected: tuple[str, str | None]
) -> None:
    assert split_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "name", "a/b/c", "/a/b", "./a", "../a", "~/a", "~a/b", "a/", "/a", "a//b"),
        *("models/m.gguf", "o/n.git", "o/n:", "o/n: ", ":Q4_0", "C:/m", "C:\\a/b", "hf.co/o/n"),
        *("o/a--b", "o/a..b", "o/-a", "o/a-", "o/.a", "o/a.", "-o/a", "o-/a", "o./a", ".o/a"),
        *("o/a b", "o/\u00e9", "o/a\n", "o\n/a", " o/a", "o/a\0", "o/a?b", "https://h/o", "o\\n/a"),
        "o/" + "n" * 95,
    ],
)
def test_path_is_not_a_reference(text: str) -> None:
    """No request is sent to the Hub for it."""
    assert split_reference(text) is None


@settings(repeatable, max_examples=400)
@given(st.text(st.sampled_from("aZ0_-./:~ \n\u00e9"), max_size=10) | st.text(max_size=120))
def test_every_accepted_repo_is_valid_for_huggingface_hub(text: str) -> None:
    from huggingface_hub.utils._validators import validate_repo_id

    if (found := split_reference(text)) is not None:
        validate_repo_id(found[0])


def test_only_unprintable_names_are_escaped_in_errors() -> None:
    """Callers may send them back."""
    assert "it's\\one.gguf" in refused(["it's\\one.gguf", "two.gguf"], "zzz", "gguf_variant")
    assert "o\\u202ene.gguf" in refused(["o\u202ene.gguf", "two.gguf"], "zzz", "gguf_variant")


def test_part_with_an_impossible_number_is_set_aside() -> None:
    """It comes first in the listing, and must not end it."""
    aside = ["a-00009-of-00003.gguf", "imatrix.gguf"]
    assert refused(aside, None, "model_path").endswith(f", only {', '.join(aside)}")
    assert chosen([*aside, "b-Q8_0.gguf"], None).weights == ("b-Q8_0.gguf",)
