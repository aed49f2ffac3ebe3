"""`models`, and what the shell completes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.cli.output import byte_text
from tests.kit.command import Cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tiny_model: str) -> Path:
    """A cache with two variants of one repo, half of a split one, and a repo without a model."""
    top = tmp_path / "hub"
    files = top / "models--org--Tiny-GGUF" / "snapshots" / COMMIT
    files.mkdir(parents=True)
    for name in ("Tiny-Q4_K_M.gguf", "Tiny-Q8_0.gguf", "Tiny-F16-00001-of-00002.gguf"):
        shutil.copy(tiny_model, files / name)
        os.utime(files / name, (1.7e9, 1.6e9))
    (top / "models--org--empty" / "snapshots" / COMMIT).mkdir(parents=True)
    (top / "datasets--org--data").mkdir()
    return top


def test_models_lists_the_cache_and_folders(
    cli: Cli, cache: Path, tmp_path: Path, tiny_model: str
) -> None:
    folder = tmp_path / "models" / "deep"
    folder.mkdir(parents=True)
    one = shutil.copy(tiny_model, folder / "one.gguf")
    (folder / "readme.txt").write_text("no model")
    args = ("models", "--models-dir", str(tmp_path / "models"))
    found = json.loads(cli(*args, "--json", HF_HUB_CACHE=str(cache)).stdout)["models"]
    size = os.path.getsize(tiny_model)
    assert [(model["model_path"], model["where"], model["size_bytes"]) for model in found] == [
        ("org/Tiny-GGUF:Q4_K_M", "cache", size),
        ("org/Tiny-GGUF:Q8_0", "cache", size),
        (str(one), "folder", size),
    ]
    assert found[0]["last_used_at"] == 1.7e9
    human = cli(*args, HF_HUB_CACHE=str(cache)).stdout
    assert f"{byte_text(size)}  2023-11-14  org/Tiny-GGUF:Q4_K_M" in human
    empty = cli("models", HF_HUB_CACHE=str(tmp_path / "nowhere"))
    assert (empty.returncode, "pull owner/name" in empty.stdout) == (0, True)
    gone = cli("models", "--models-dir", str(tmp_path / "gone"), "--json")
    assert (gone.returncode, json.loads(gone.stdout)["field"]) == (1, "models_dir")


@pytest.mark.parametrize("command", ["load", "run", "plan", "unload", "pull", "chat"])
def test_shell_completes_cached_repos_and_files(cli: Cli, cache: Path, command: str) -> None:
    env = {
        "_LLAMA_ORCHESTRATOR_COMPLETE": "bash_complete",
        "COMP_WORDS": f"llama-orchestrator {command} org/",
        "COMP_CWORD": "2",
        "HF_HUB_CACHE": str(cache),
    }
    offered = cli(**env).stdout.split()
    assert offered == ["plain,org/Tiny-GGUF", "plain,org/empty", "file,org/"]


def test_misspelt_command_is_told_the_nearest(cli: Cli) -> None:
    done = cli("stauts")
    assert done.returncode == 2
    assert "No such command 'stauts'. Did you mean status?" in done.stderr
    assert "Did you mean" not in cli("xyzzy").stderr


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (86 << 30, "86.0 GiB")],
)
def test_sizes_have_one_unit(size: int, text: str) -> None:
    assert byte_text(size) == text
