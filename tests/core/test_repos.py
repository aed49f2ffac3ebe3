"""Fifty repositories as they are published: the right model, its projector, nothing else."""

from __future__ import annotations

import pytest

from orchestrator.models.variants import choose, every
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
