"""A home of `huggingface_hub` for each test, and models as they are published."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator
from orchestrator.base import launch
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.downloads import BIG, BIG_FILE, Download, fetchers
from tests.kit.fake_hub import Content, Hub, Repo
from tests.kit.models import MODEL, TINY, split_gguf

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
def _own_hf_home(hf_home: Path) -> None:
    """No test here uses the home, token or cache of this machine."""


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """The files of a model as they are published.

    llama-server loads each GGUF, and no two are equal; but the files called mmproj and mtp are
    neither projectors nor drafts.
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


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """Two variants that llama-server loads at once, and one whose download takes longer."""
    top = tmp_path_factory.mktemp("tiny-repo")
    return {
        "tiny-Q4_K_M.gguf": write_tiny_model(top / "a.gguf", seed=1),
        "tiny-Q8_0.gguf": write_tiny_model(top / "b.gguf", seed=2),
        "tiny-F16.gguf": write_tiny_model(top / "c.gguf", seed=3, padding_bytes=8 << 20),
        "README.md": b"# tiny\n",
    }


@pytest.fixture
def tiny_repo(hub: Hub, tiny_files: dict[str, Content]) -> Repo:
    return hub.add(Repo(TINY, tiny_files))


@pytest.fixture
def orch(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


@pytest.fixture(scope="session")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 MiB, whose download takes long enough to be observed."""
    path = tmp_path_factory.mktemp("big") / BIG_FILE
    return write_tiny_model(path, padding_bytes=8 << 20)


@pytest.fixture
def big(hub: Hub, big_file: Path) -> Repo:
    return hub.add(Repo(BIG, {BIG_FILE: big_file}))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def download(records: Path) -> Iterator[Callable[..., Download]]:
    """Start downloads; none of them, and no fetcher, outlives the test."""
    started: list[Download] = []

    def start(**fields: Any) -> Download:
        started.append(Download(records, **fields))
        return started[-1]

    yield start
    for one in started:
        one.end()
    assert not fetchers()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The command of every child process that was started."""
    commands: list[tuple[str, ...]] = []
    popen = launch.popen

    def counted(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return popen(command, **settings)

    monkeypatch.setattr(launch, "popen", counted)
    return commands
