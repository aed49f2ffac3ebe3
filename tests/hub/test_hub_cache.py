"""Reading the Hugging Face cache, compared with huggingface_hub itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.models.hub import cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HUB_CACHE": "/a/$USER/b"},
        {"HF_HUB_CACHE": "~/cache"},
        {"HUGGINGFACE_HUB_CACHE": "~/legacy"},
        {"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b"},
        {"HF_HOME": "~/$USER/home"},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "/home", "XDG_CACHE_HOME": "/xdg"},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "yes"},
        {"HF_HUB_OFFLINE": "0"},
        {"TRANSFORMERS_OFFLINE": "true"},
        {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "on"},
    ],
    ids=str,
)
def test_environment_variables_mean_the_same_as_to_huggingface_hub(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*NAMES, *OFFLINE):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"USER": "somebody", **given}.items():
        monkeypatch.setenv(name, value)
    program = "from huggingface_hub.constants import *; print(HF_HUB_CACHE, HF_HUB_OFFLINE)"
    command = (sys.executable, "-c", program)
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert theirs.strip() == f"{cache.directory()} {cache.is_offline()}"


def test_repo_is_found_in_any_case_and_its_own_spelling_wins() -> None:
    top = cache.directory()
    assert cache.find("Owner/Name") is None
    (top / "models--owner--name").mkdir(parents=True)
    found = cache.find("Owner/Name")
    assert found is not None
    assert (found.name, found.root) == ("owner/name", top / "models--owner--name")
    (top / "models--Owner--Name").mkdir()
    found = cache.find("Owner/Name")
    assert found is not None
    assert found.name == "Owner/Name"


def test_file_in_place_of_the_folder_is_not_a_repo() -> None:
    top = cache.directory()
    top.mkdir(parents=True)
    (top / "models--owner--name").touch()
    assert cache.find("owner/name") is None


def test_revision_is_a_commit_or_the_content_of_its_ref(tmp_path: Path) -> None:
    repo = cache.CachedRepo("owner/name", tmp_path)
    refs = tmp_path / "refs" / "refs" / "pr"
    refs.mkdir(parents=True)
    (refs / "1").write_text(COMMIT + "\n")
    (tmp_path / "refs" / "broken").write_text("../../../etc")
    (tmp_path / "refs" / "binary").write_bytes(b"\xff\xfe")
    assert repo.commit(COMMIT) == COMMIT
    assert repo.commit("refs/pr/1") == COMMIT
    assert [repo.commit(name) for name in (None, "broken", "binary", "refs")] == [None] * 4


def test_names_of_a_commit_leave_out_broken_links(tmp_path: Path) -> None:
    repo = cache.CachedRepo("owner/name", tmp_path)
    assert repo.names(COMMIT) == []
    folder = repo.path(COMMIT, "a/b")
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"1234")
    (folder / "gone.gguf").symlink_to("nowhere")
    blob = tmp_path / "blobs" / ("e" * 64)
    blob.parent.mkdir()
    (tmp_path / "store").write_bytes(b"12345")
    blob.symlink_to(tmp_path / "store")
    repo.path(COMMIT, "y.gguf").symlink_to(os.path.relpath(blob, folder.parent.parent))
    assert sorted(repo.names(COMMIT)) == ["a/b/x.gguf", "y.gguf"]
    assert repo.size_and_etag(COMMIT, "y.gguf") == (5, "e" * 64)
    assert repo.size_and_etag(COMMIT, "a/b/x.gguf") == (4, "x.gguf")
    assert repo.size_and_etag(COMMIT, "a/b/gone.gguf")[0] == 0


@pytest.mark.parametrize("name", ["a.gguf", "a b/ü+c.gguf", "..a/b..gguf", "-x", "a/.hidden"])
def test_file_name_is_any_that_stays_in_the_folder(name: str) -> None:
    assert cache.is_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/.",
        "a\0",
        "a\nb",
        "\ud800",
        "a" * 5000,
    ],
)
def test_file_name_never_leads_out_of_the_folder(name: str) -> None:
    assert not cache.is_file_name(name)


@pytest.mark.parametrize("text", ["main", "v1.0", "refs/pr/1", "feature/a+b", COMMIT])
def test_revision_is_a_name_that_git_allows(text: str) -> None:
    assert cache.is_revision(text)


@pytest.mark.parametrize(
    "text", ["", "/", "a/", "../a", "a/../b", ".", "a b", "a?b", "a#", "a%2e", "é\n"]
)
def test_revision_never_leads_out_of_the_folder(text: str) -> None:
    assert not cache.is_revision(text)
