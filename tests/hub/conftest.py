"""A fake hub for each test, a client that reaches no other, and a model as they are published.

The environment and `huggingface_hub`'s constants, which it reads from there once, are set for
every test here: an empty home, no token, no Xet, no telemetry. Child processes inherit it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.models import MODEL, split_gguf

_MODELS = (
    "Qwen3-0.6B-Q4_K_M.gguf",
    "Qwen3-0.6B-Q8_0.gguf",
    "Qwen3-0.6B-UD-Q4_K_XL.gguf",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mtp-Qwen3-0.6B-Q8_0.gguf",
)
_SPLIT = "BF16/Qwen3-0.6B-BF16"
_TEXTS: Mapping[str, bytes] = {
    ".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n",
    "README.md": b"---\nbase_model: Qwen/Qwen3-0.6B\nlibrary_name: gguf\n---\n# Qwen3-0.6B\n",
    "config.json": b'{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}\n',
}


@pytest.fixture(autouse=True)
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of the client of this test's own."""
    home = tmp_path / "hf"
    flags = {"HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"}
    paths = {
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_ASSETS_CACHE": home / "assets",
        "HF_XET_CACHE": home / "xet",
        "HF_TOKEN_PATH": home / "token",
        "HF_STORED_TOKENS_PATH": home / "stored_tokens",
    }
    for name, path in paths.items():
        monkeypatch.setenv(name, str(path))
        monkeypatch.setattr(constants, name, str(path))
    for name in flags:
        monkeypatch.setenv(name, "1")
        monkeypatch.setattr(constants, name, True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield home
    close_session()  # its idle connections would be reported as resources never closed


@pytest.fixture
def hub(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that runs; child processes take it for the Hub."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """The files of a model as they are published.

    Each GGUF is one that llama-server loads, and different from all others, but those called
    mmproj and mtp are no projectors and no drafts.
    """
    directory = tmp_path_factory.mktemp("gguf-repo")
    files: dict[str, Content] = dict(_TEXTS)
    for seed, name in enumerate(_MODELS):
        files[name] = write_tiny_model(directory / name, seed=seed)
    whole = write_tiny_model(directory / "whole.gguf", seed=len(_MODELS))
    for shard in split_gguf(whole, directory / Path(_SPLIT).name):
        files[f"{Path(_SPLIT).parent}/{shard.name}"] = shard
    files["imatrix_unsloth.dat"] = hashlib.sha256(b"imatrix").digest() * 1000
    return files


@pytest.fixture
def gguf_repo(hub: Hub, gguf_files: dict[str, Content]) -> Repo:
    """Such a model on the hub, public."""
    return hub.add(Repo(MODEL, gguf_files))
