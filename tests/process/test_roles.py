"""Files that are no model, told by their headers: never picked, and reached by their path."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import InvalidModel, ModelNotFound
from orchestrator.models import gguf_file, local
from orchestrator.models.gguf_file import role
from orchestrator.models.local import identity_of, locate, variants_of
from orchestrator.models.roots import ModelRoots
from orchestrator.models.variants import choose
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.sentences import assert_sentence

Writer = gguf.GGUFWriter


def write(path: Path, architecture: str, tensors: int = 1, /, **texts: str) -> Path:
    """Write a small file with these metadata; `_` in a key stands for `.`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, architecture)
    for key, value in texts.items():
        writer.add_string(key.replace("_", "."), value)
    for number in range(tensors):
        writer.add_tensor(f"t{number}", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROLES: dict[str, tuple[str, dict[str, str]]] = {
    # the role, and the file that has it: architecture, metadata
    "projector": ("clip", {}),
    "projector of today": ("clip", {"general_type": "mmproj"}),
    "adapter": ("llama", {"general_type": "adapter", "adapter_type": "lora"}),
    "adapter of old": ("llama", {"adapter_type": "lora"}),
    "control vector": ("controlvector", {}),
    "imatrix": ("", {"general_type": "imatrix"}),
    "head": ("eagle3", {"general_type": "model"}),
    "head of Gemma": ("gemma4-assistant", {"general_type": "model"}),
    "head dflash": ("dflash", {}),
    "model": ("llama", {"general_type": "model"}),
}


@pytest.mark.parametrize("case", ROLES)
def test_role_of_a_file_is_read_from_its_header(tmp_path: Path, case: str) -> None:
    architecture, texts = ROLES[case]
    path = write(tmp_path / "x.gguf", architecture, 1, **texts)
    assert case.startswith(role(identity_of(path)) or "no role")


def test_file_without_tensors_is_a_vocabulary_unless_it_is_the_first_of_several(
    tmp_path: Path,
) -> None:
    for texts, expected in (
        ({"general_type": "model"}, "vocabulary"),
        ({}, "vocabulary"),
        ({"tokenizer_ggml_model": "llama", "split_count": "2"}, None),
    ):
        path = write(tmp_path / f"{len(texts)}.gguf", "llama", 0, **texts)
        assert role(identity_of(path)) == expected


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\x09\0\0\0", b"<html>", b"GGUF\x03\0\0\0\1"])
def test_file_that_is_damaged_has_no_role(tmp_path: Path, data: bytes) -> None:
    """`inspect` says what is wrong with it."""
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert role(identity_of(path)) is None
    path.unlink()
    assert local.role_of(path) is None


def test_role_is_read_without_the_vocabulary(tmp_path: Path) -> None:
    """A folder may have many models, and a vocabulary is most of a header."""
    path = write(tmp_path / "x.gguf", "llama", tokenizer_ggml_model="x", general_type="adapter")
    assert role(identity_of(path)) is None, "it has read on"


def find(path: Path, roots: ModelRoots | None = None, variant: str | None = None) -> ModelFiles:
    return locate(path, LoadRequest(model_path=str(path), gguf_variant=variant), roots)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in one variant, and files with better labels whose names do not show their role."""
    root = tmp_path / "folder"
    root.mkdir()
    write_tiny_model(root / "story-F32.gguf")
    write(root / "story-style-Q4_K_M.gguf", "llama", general_type="adapter")
    write(root / "story-vision-Q8_0.gguf", "clip")
    write(root / "story-fast-UD-Q4_K_XL.gguf", "eagle3", general_type="model")
    return root


def test_file_that_is_no_model_by_its_header_is_never_picked(folder: Path) -> None:
    found = find(folder)
    assert Path(found.weights[0].path).name == "story-F32.gguf"
    for label in ("Q4_K_M", "Q8_0", "UD-Q4_K_XL", "style"):
        with pytest.raises(ModelNotFound) as refused:
            find(folder, variant=label)
        assert refused.value.field == "gguf_variant"
    (one,) = variants_of(folder, LoadRequest(model_path=str(folder)))
    assert (one.gguf_variant, one.is_default) == ("F32", True)


def test_head_is_reached_by_its_path(folder: Path) -> None:
    for name in ("story-fast-UD-Q4_K_XL.gguf", "STORY-fast-ud-q4_k_xl"):
        found = find(folder, variant=name)
        assert found.variant == "story-fast-UD-Q4_K_XL.gguf"
        assert find(folder, variant=found.variant) == found


@pytest.mark.parametrize(
    ("key", "name", "case"),
    [
        ("model.is_adapter", "a.gguf", "adapter"),
        ("model.is_vector", "a.gguf", "control vector"),
        ("model.is_imatrix", "a.gguf", "imatrix"),
    ],
)
def test_file_that_no_server_loads_is_refused_with_its_use(
    tmp_path: Path, key: str, name: str, case: str
) -> None:
    architecture, texts = ROLES[case]
    path = write(tmp_path / name, architecture, 1, **texts)
    with pytest.raises(InvalidModel) as refused:
        find(path)
    assert refused.value.field == "model_path"
    assert_sentence(key, refused.value.message, path=path)


@pytest.mark.parametrize("name", ["my-lora-Q4_K_M.gguf", "tuned-imatrix.gguf", "adapter/m.gguf"])
def test_model_with_the_name_of_a_part_is_a_model_by_its_header(tmp_path: Path, name: str) -> None:
    """A merged adapter keeps the word in its name; without a header the name decides."""
    path = write(tmp_path / name, "llama", general_type="model")
    assert find(tmp_path).weights[0].path == str(path)
    with pytest.raises(ModelNotFound):
        choose([name], None, where="owner/name")


def test_draft_is_a_draft_whatever_its_header_says(tmp_path: Path) -> None:
    """Its header is that of any model."""
    write(tmp_path / "draft-m-Q8_0.gguf", "llama", general_type="model")
    with pytest.raises(ModelNotFound):
        find(tmp_path)


def test_header_of_a_file_outside_of_the_roots_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = write(tmp_path / "outside-lora.gguf", "llama", general_type="model")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "x-lora.gguf").symlink_to(outside)
    read: list[object] = []
    monkeypatch.setattr(gguf_file, "role", read.append)
    with pytest.raises(ModelNotFound):
        find(inside, ModelRoots([inside]))
    assert not read
