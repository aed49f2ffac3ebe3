"""Fifty repositories as they are published: the right model, its projector, nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import ModelNotFound
from orchestrator.models.variants import Chosen, choose, every
from tests.kit.repos import REPOS, Published, expand

each = pytest.mark.parametrize("published", REPOS, ids=lambda published: published.repo)


@each
def test_default_variant_of_a_published_repo(published: Published) -> None:
    chosen = choose(expand(published.files), None, where=published.repo)
    assert chosen.variant == published.default
    assert list(chosen.weights) == expand(published.weights)
    assert chosen.projector == published.projector


@each
def test_companion_files_of_a_published_repo_are_no_variants(published: Published) -> None:
    found, _ = every(expand(published.files), where=published.repo)
    weights = {name for chosen in found for name in chosen.weights}
    aside = {*expand(published.set_aside), *(n for n in expand(published.files) if "mmproj" in n)}
    assert weights.isdisjoint(aside)
    ggufs = {name for name in expand(published.files) if name.lower().endswith(".gguf")}
    assert weights | aside == ggufs


@each
def test_every_file_of_a_published_repo_can_be_named_by_its_path(published: Published) -> None:
    """What is set aside is never picked, and stays reachable: an experiment needs no new repo."""
    for name in expand(published.files):
        if name.lower().endswith(".gguf"):
            assert name in choose(expand(published.files), name, where=published.repo).weights


@each
def test_labels_of_a_published_repo_mean_their_files(published: Published) -> None:
    for asked, first in published.variants.items():
        assert choose(expand(published.files), asked, where=published.repo).weights[0] == first


# Words in names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "draft-m-Q8_0.gguf",
            "m-draft.gguf",
            "m_DRAFTS_Q8_0.gguf",
            "drafter/m.gguf",
            "a/draft/m.gguf",
        ),
        *(
            "m-dflash-Q8_0.gguf",
            "DSpark.gguf",
            "dspark/m.gguf",
            "m_eagle3.gguf",
            "EAGLE3-m-8b.gguf",
        ),
        *("EAGLE-Qwen2-7B-Q8_0.gguf", "m-eagle2-F16.gguf", "eagle.gguf", "eagle2-9-b.gguf"),
        *("mtp-m.gguf", "a/mtp-m.gguf", "MTP/m.gguf", "a/mtp/m.gguf", "._m.gguf", "a/._m.gguf"),
        *("ggml-vocab-m.gguf", "m-be.gguf", "m-be.Q8_0.gguf", "m-be-00001-of-00001.gguf"),
        *("lora.gguf", "m-LoRA-F16.gguf", "loras/m.gguf", "m.adapter.gguf", "adapters/m.gguf"),
        *("m-control-vector.gguf", "control_vectors/m.gguf", "controlvector-m.gguf"),
        *(
            "imatrix.gguf",
            "m.imatrix.gguf",
            "m-Q8_0.imatrix.gguf",
            "imatrix_m.gguf",
            "IMATRIX.GGUF",
        ),
    ],
)
def test_name_of_what_is_no_model(name: str) -> None:
    """Never picked, not by a part of its name either; found by its path, with or without suffix."""
    names = [name, "zzz-Q2_K.gguf"]
    assert choose(names, None, where="o/n").weights == ("zzz-Q2_K.gguf",)
    for asked in (name, name.upper(), name[:-5]):
        found = choose(names, asked, where="o/n")
        assert (found.weights, found.variant, found.projector) == ((name,), name, None)
    for text in ("Q8_0", "F16", "m"):
        with pytest.raises(ModelNotFound):
            choose([name], text, where="o/n")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Draftsman.gguf",
            "m-overdraft.gguf",
            "drafts2.gguf",
            "Eagle-7B.gguf",
            "eagle2-9b-F16.gguf",
        ),
        *("Eagle_1.5B.gguf", "eagle13b.gguf", "seagle3.gguf", "eagle4.gguf", "dflash2.gguf"),
        *("m-mtp-Q8_0.gguf", "amtp/m.gguf", "m._x.gguf", "m-ggml-vocab-x.gguf", "m-be-Q8_0.gguf"),
        *("m-bee.gguf", "lora64.gguf", "explora.gguf", "flora-Q8_0.gguf", "adapted.gguf"),
        *("control-m.gguf", "vectors.gguf", "qlora-m.gguf", "a-be.d/m.gguf"),
        *("imatrix-m-Q8_0.gguf", "m-Q8_0-imatrix.gguf", "m-imat.gguf", "imatrix/m.gguf"),
        *("mimatrix-Q8_0.imat.gguf", "m.imatrix-Q8_0.gguf"),
    ],
)
def test_name_of_a_model_that_only_looks_like_something_else(name: str) -> None:
    assert choose([name], None, where="o/n").weights == (name,)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("m-FP16.gguf m-Q5_1.gguf", "Q5_1"),
        ("m-FP16.gguf m.gguf", "m.gguf"),
        ("m-fp32.gguf m-MXFP4.gguf", "MXFP4"),
        ("m-FP16.gguf m-FP32.gguf", "FP16"),
        ("m-FP16.gguf z-F32.gguf", "F32"),
        ("m-NVFP4.gguf z-IQ1_M.gguf", "IQ1_M"),
        ("m-Q4.gguf m-Q8.gguf", "Q4"),
        ("m-UD-TQ1_0.gguf z-TQ2_0.gguf", "UD-TQ1_0"),
        ("m-P16.gguf z-FP16.gguf", "m-P16.gguf"),
    ],
)
def test_labels_outside_of_the_order_come_after_it(names: str, expected: str) -> None:
    """The first file of them; 16 and 32 bits last."""
    assert choose(names.split(), None, where="o/n").variant == expected


# Roles by header


def test_header_sets_aside_what_the_name_does_not() -> None:
    names = ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "z.gguf"]
    roles: dict[str, str | None] = {names[0]: "head", names[1]: "adapter", names[3]: "model"}
    about: Any = {"where": "o/n", "role": roles.get}
    assert choose(names, None, **about).weights == ("z.gguf",)
    for label in ("Q4_K_M", "Q8_0"):
        with pytest.raises(ModelNotFound) as refused:
            choose(names, label, **about)
        assert refused.value.message.startswith(f"o/n has no variant {label!r}; it has ")
    found = choose(names, names[2], **about)
    assert (found.weights, found.variant) == (tuple(names[1:3]), names[1])
    listed, default = every(names, **about)
    assert [one.weights for one in listed] == [("z.gguf",)]
    assert default is listed[0]
    with pytest.raises(ModelNotFound) as refused:
        every(names[:1], **about)
    assert refused.value.message.endswith("contains no .gguf model, only m-Q4_K_M.gguf")


@pytest.mark.parametrize("name", ["m-lora.gguf", "imatrix.gguf", "adapters/m.gguf"])
@pytest.mark.parametrize("role", ["model", None, "adapter"])
def test_header_of_a_model_wins_over_the_name_of_a_part(name: str, role: str | None) -> None:
    def choice() -> Chosen:
        return choose([name], None, where="o/n", role=lambda _: role)

    if role == "model":
        assert choice().weights == (name,)
    else:
        with pytest.raises(ModelNotFound):
            choice()


@pytest.mark.parametrize("name", ["draft-m.gguf", "mtp-m.gguf", "eagle3.gguf"])
def test_header_of_a_model_does_not_make_a_draft_one(name: str) -> None:
    """Its header is that of a model."""
    with pytest.raises(ModelNotFound):
        choose([name], None, where="o/n", role=lambda _: "model")
