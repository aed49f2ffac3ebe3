"""Addresses on the Hub as model_path: the repo, the revision and the file that they mean."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.settings.reference import of_address, split_reference
from orchestrator.settings.request import LoadRequest
from tests.kit.sentences import assert_sentence
from tests.kit.settings import on_hub, target

PREFIXES = (
    *("hf.co/", "https://huggingface.co/", "hf://", "huggingface.co/", "https://hf.co/"),
    *("http://huggingface.co/", "https://www.huggingface.co/", "HTTPS://HuggingFace.co/", "HF.co/"),
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("repo", ["Owner/Name-GGUF", "o/n:Q4_K_M", "o/n:BF16/m-00001-of-2.gguf"])
def test_address_of_a_repo_is_the_repo(prefix: str, repo: str) -> None:
    """In its normal form, so in identity, inherited args and answers, too."""
    for address in (prefix + repo, f" {prefix}{repo} "):
        request = LoadRequest(model_path=address)
        assert (request.model_path, request.revision) == (repo, None)
        assert request == LoadRequest(model_path=repo)


@pytest.mark.parametrize(
    ("rest", "path", "revision"),
    [
        ("o/n/", "o/n", None),
        ("o/n?not-for-all-audiences=true", "o/n", None),
        ("o/n#files", "o/n", None),
        ("o/n/tree/main", "o/n", None),
        ("o/n/tree/v1.0/", "o/n", "v1.0"),
        ("o/n/blob/main/m-Q8_0.gguf", "o/n:m-Q8_0.gguf", None),
        ("o/n/blob/v2/BF16/m-Q8_0.gguf", "o/n:BF16/m-Q8_0.gguf", "v2"),
        ("o/n/resolve/main/m-Q8_0.gguf?download=true", "o/n:m-Q8_0.gguf", None),
    ],
)
def test_address_of_a_revision_or_a_file_sets_both(
    rest: str, path: str, revision: str | None
) -> None:
    request = LoadRequest(model_path="https://huggingface.co/" + rest)
    assert (request.model_path, request.revision) == (path, revision)
    again = LoadRequest.from_dict(request.as_dict())
    assert again == request


@pytest.mark.parametrize(
    "rest",
    [
        *("", "o", "o/n:", "o/n/tree/main/BF16", "o/n/blob/main/config.json", "datasets/o/n"),
        *("o/n/discussions/1", "o/n/tree/refs%2Fpr%2F1", "o/n@main", "o/n/resolve", "spaces/o/n"),
        *("o/n/blob/main/m%20x.gguf", "//o/n", "-o/n"),
    ],
)
def test_address_of_anything_else_is_refused(rest: str) -> None:
    """It can be no file of this machine either."""
    for prefix in ("https://huggingface.co/", "hf://"):
        with pytest.raises(InvalidRequest) as refused:
            LoadRequest(model_path=prefix + rest)
        assert refused.value.field == "model_path"
    assert_sentence("settings.address", refused.value.message.replace(repr("hf://" + rest), "{it}"))


def test_revision_of_an_address_and_another_one_are_contradictory() -> None:
    address = "hf.co/o/n/tree/v1"
    assert LoadRequest(model_path=address, revision="v1").revision == "v1"
    with pytest.raises(InvalidRequest) as refused:
        LoadRequest(model_path=address, revision="v2")
    assert refused.value.field == "revision"
    assert_sentence("settings.two_revisions", refused.value.message)


@pytest.mark.parametrize("text", ["/models/hf.co/o/n", "hf.company/o/n", "https://example.org/o/n"])
def test_other_text_is_no_address(text: str) -> None:
    assert of_address(text) == (text, None)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(st.sampled_from("oO0n/:?#%.@-"), max_size=14) | st.text(max_size=30))
def test_any_address_is_a_repo_or_refused(rest: str) -> None:
    for prefix in PREFIXES[:3]:
        found = of_address(prefix + rest)
        assert found is None or split_reference(found[0]) is not None


@pytest.mark.parametrize("name", ["hf.co/Org/A", "https://huggingface.co/org/a:q8_0"])
def test_model_is_called_by_its_address_too(name: str) -> None:
    """For `unload`, which takes any name of a model."""
    loaded = target(model=on_hub())
    assert loaded.is_called(name)
    assert not loaded.is_called("https://huggingface.co/org/other")
    assert not loaded.is_called("https://huggingface.co/org/a/discussions")


@pytest.mark.parametrize(
    ("path", "given", "variant"),
    [
        ("o/n", None, None),
        ("o/n", "Q8_0", "Q8_0"),
        ("o/n:Q8_0", None, "Q8_0"),
        ("hf.co/o/n:Q8_0", None, "Q8_0"),
        ("/models/a:b.gguf", None, None),
    ],
)
def test_requested_variant_is_in_the_path_or_a_field(
    path: str, given: str | None, variant: str | None
) -> None:
    assert LoadRequest(model_path=path, gguf_variant=given).variant == variant
