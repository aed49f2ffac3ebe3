"""Local models: which files a request means, and whether each is a whole GGUF.

llama-server would find each damage here only after the old server is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import InvalidModel, ModelNotFound, OrchestratorError
from orchestrator.models import gguf_file
from orchestrator.models.gguf_file import BLOCKS, inspect
from orchestrator.models.local import identity_of, locate, resolve
from orchestrator.models.source import ModelSource
from orchestrator.server import process_table
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.sentences import assert_sentence


def find(path: object, **fields: Any) -> ModelFiles:
    request = LoadRequest(model_path=str(path), **fields)
    return locate(resolve(request.model_path, "model_path"), request)


def refusal(error: type[OrchestratorError], path: object, **fields: Any) -> OrchestratorError:
    """Return the error of a request that must fail."""
    with pytest.raises(error) as refused:
        find(path, **fields)
    return refused.value


def names(found: ModelFiles) -> list[str]:
    return [Path(file.path).name for file in found.weights]


@pytest.fixture
def model(tiny_model: str, tmp_path: Path) -> Path:
    """A model of this test's own."""
    return Path(shutil.copy(tiny_model, tmp_path / "model.gguf"))


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with these files, all of them the tiny model."""

    def make(*paths: str) -> Path:
        root = tmp_path / "folder"
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(tiny_model, root / path)
        return root

    return make


# GGUF headers


def test_block_sizes_are_those_of_ggml() -> None:
    """A wrong size refuses good models, or accepts truncated ones."""
    sizes = {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    sizes[9] = (32, 36)  # Q8_1 is never in a file; ggml has stored its sum in half precision since
    assert {kind: sizes[kind] for kind in BLOCKS if kind in sizes} == BLOCKS
    assert sizes.keys() <= BLOCKS.keys()


def test_model_cut_anywhere_is_refused(model: Path) -> None:
    """Of an interrupted download, wherever it stopped."""
    data = model.read_bytes()
    header = 20_000
    cuts = [
        *range(1, 64),
        *range(64, header, 997),
        *range(header, len(data), 40_009),
        len(data) - 1,
    ]
    for size in cuts:
        model.write_bytes(data[:size])
        with pytest.raises(InvalidModel) as refused:
            inspect(identity_of(model))
        assert refused.value.field == "model_path"
        assert str(model) in refused.value.message
    model.write_bytes(data + b"more")
    assert inspect(identity_of(model)) == "llama"


def test_error_has_the_number_of_missing_bytes(model: Path) -> None:
    """It tells an almost finished download from a page of HTML."""
    whole = model.stat().st_size
    for missing in (1, 4096):
        os.truncate(model, whole - missing)
        message = refusal(InvalidModel, model).message
        assert_sentence("gguf.cut", message, path=model, missing=missing)


def header(*parts: bytes, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, len(parts)) + b"".join(parts)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def tensor(shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return (
        struct.pack("<Q", 1)
        + b"t"
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("gguf.empty", b""),
        ("gguf.no_magic", b"<html>"),
        ("gguf.no_magic", b"GGU"),
        ("gguf.no_magic", header(magic=b"ggml")),
        ("gguf.version", header(version=0)),
        ("gguf.version", header(version=1)),
        ("gguf.version", header(version=4)),
        ("gguf.version", struct.pack(">4sI", b"GGUF", 3) + bytes(16)),
        ("gguf.count", header(tensors=1 << 60)),
        ("gguf.count", header(tensors=1 << 17)),
        ("gguf.count", header()[:16] + struct.pack("<Q", 1 << 17)),
        ("gguf.count", header(pair("k", 9, struct.pack("<IQ", 8, 1) + bytes(8)),
                              pair("l", 9, struct.pack("<IQ", 8, 1 << 22)))),
        ("gguf.cut_header", header(tensors=1)),
        ("gguf.metadata_type", header(pair("k", 99, b""))),
        ("gguf.cut_header", header(pair("k", 8, struct.pack("<Q", 1 << 62)))),
        ("gguf.count", header(pair("k", 9, struct.pack("<IQ", 4, 1 << 62)))),
        ("gguf.cut_header", header(pair("k", 9, struct.pack("<IQ", 4, 1 << 20)))),
        ("gguf.array_type", header(pair("k", 9, struct.pack("<IQ", 9, 1) * 5000))),
        ("gguf.count", header(tensor((4,) * 9, 0, 0), tensors=1)[:16] + bytes(8)
         + tensor((4,) * 9, 0, 0)),
    ],
)  # fmt: skip
def test_file_that_is_not_a_whole_gguf_is_refused(tmp_path: Path, key: str, data: bytes) -> None:
    """A file that is empty but for its counts could otherwise take minutes."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    error = refusal(InvalidModel, path)
    assert error.field == "model_path"
    message = error.message.replace(str(path), "{path}")
    assert_sentence(key, re.sub(r"\d{2,}|(?<=version )\d|(?<=count of )\d", "{number}", message))


def test_every_kind_of_metadata_is_read(tmp_path: Path) -> None:
    """Versions 2 and 3, every scalar, arrays of each, and an alignment of its own."""
    path = tmp_path / "good.gguf"
    scalars = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    pairs = [pair(f"s{kind}", kind, bytes(size)) for kind, size in scalars.items()]
    pairs += [
        pair(f"a{kind}", 9, struct.pack("<IQ", kind, 3) + bytes(3 * size))
        for kind, size in scalars.items()
    ]
    texts = b"".join(struct.pack("<Q", 2) + b"ab" for _ in range(3))
    pairs += [pair("texts", 9, struct.pack("<IQ", 8, 3) + texts)]
    pairs += [pair("general.alignment", 4, struct.pack("<I", 256))]
    pairs += [pair("general.architecture", 8, struct.pack("<Q", 5) + b"llama")]
    for version in (2, 3):
        head = header(*pairs, version=version, tensors=1)
        known, future = tensor((256, 2), 12, 256), tensor((256, 2), 4242, 0)
        starts = -(-(len(head) + len(known)) // 256) * 256
        whole = (head + known).ljust(starts, b"\0") + bytes(256 + 2 * 144)
        path.write_bytes(whole)
        assert inspect(identity_of(path)) == "llama"
        path.write_bytes(whole[:-1])
        with pytest.raises(InvalidModel, match="1 bytes are missing"):
            inspect(identity_of(path))
        path.write_bytes(head + future + bytes(512))  # newer than our table
        assert inspect(identity_of(path)) == "llama"


def test_model_that_shrinks_while_it_is_read_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that is cut short would kill the whole host with SIGBUS."""
    data = model.read_bytes()
    text = gguf_file._Reader._text

    def cut(reader: gguf_file._Reader) -> bytes:
        with open(model, "r+b") as file:
            file.truncate(24)
        return text(reader)

    monkeypatch.setattr(gguf_file._Reader, "_text", cut)
    monkeypatch.setattr(gguf_file, "_CHUNK", 32)
    with pytest.raises(InvalidModel, match="truncated"):
        inspect(identity_of(model))
    monkeypatch.undo()
    model.write_bytes(data)
    assert inspect(identity_of(model)) == "llama"


def test_replaced_file_is_inspected_again(model: Path) -> None:
    """Headers are cached by the identity of the file, not by its name."""
    good = model.read_bytes()
    before = find(model).weights[0]
    model.write_bytes(b"GGUF and no more")
    with pytest.raises(InvalidModel):
        find(model)
    model.write_bytes(good)
    after = find(model).weights[0]
    assert (before.path, before.size_bytes) == (after.path, after.size_bytes)
    assert before.mtime_ns != after.mtime_ns


def test_only_the_header_of_a_large_model_is_read(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "large.gguf", padding_bytes=64 << 20)
    before = process_table.usage(os.getpid())
    assert inspect(identity_of(path)) == "llama"
    after = process_table.usage(os.getpid())
    assert before is not None
    assert after is not None
    assert 0 < after.read_bytes - before.read_bytes < 4 << 20


# Paths


def test_every_spelling_of_a_path_finds_the_same_file(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absolute, relative, through a link, below the home directory."""
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    found = [find(path) for path in (model, "model.gguf", "./model.gguf", "~/model.gguf", link)]
    assert [each.weights for each in found] == [found[0].weights] * 5
    assert found[0].weights[0].path == str(model)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing.gguf", ModelNotFound),
        ("missing/model.gguf", ModelNotFound),
        ("model.gguf/model.gguf", ModelNotFound),
        ("owner/name", ModelNotFound),
        ("owner/name:Q4_K_M", ModelNotFound),
        ("~nobody-of-that-name/model.gguf", ModelNotFound),
        ("x" * 300 + ".gguf", ModelNotFound),
        ("x/" * 3000, ModelNotFound),
        ("loop.gguf", ModelNotFound),
        ("dangling.gguf", ModelNotFound),
        ("empty folder", ModelNotFound),
        ("fifo.gguf", InvalidModel),
        ("/dev/null", InvalidModel),
        ("/dev/zero", InvalidModel),
        ("/proc/self/mem", InvalidModel),
    ],
)
def test_path_without_a_model_is_refused_with_its_field(
    model: Path, monkeypatch: pytest.MonkeyPatch, path: str, error: type[OrchestratorError]
) -> None:
    monkeypatch.chdir(model.parent)
    Path("loop.gguf").symlink_to("loop.gguf")
    Path("dangling.gguf").symlink_to("nowhere.gguf")
    Path("empty folder").mkdir()
    os.mkfifo("fifo.gguf")
    assert refusal(error, path).field == "model_path"


def test_missing_model_error_says_what_model_path_may_be(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    assert_sentence("model.missing", refusal(ModelNotFound, path).message, path=path)
    name = "x" * 300
    error = refusal(ModelNotFound, name)
    assert_sentence("model.cannot_look_up", error.message, path=name[:200])
    assert error.field == "model_path"


def test_variant_of_a_folder_is_chosen_by_preference_or_name(folder: Callable[..., Path]) -> None:
    root = folder(
        "a-Q8_0.gguf", "b-Q4_K_M.gguf", "sub/c-UD-Q4_K_XL.gguf", "mmproj-f16.gguf",
        "mtp-Q4_K_M.gguf", "x-imatrix.gguf", "._b-Q4_K_M.gguf",
    )  # fmt: skip
    found = find(root)
    assert (names(found), found.variant) == (["c-UD-Q4_K_XL.gguf"], "UD-Q4_K_XL")
    found = find(root, gguf_variant="q4_k_m")
    assert (names(found), found.variant) == (["b-Q4_K_M.gguf"], "Q4_K_M")
    assert names(find(root, gguf_variant="sub/c-UD-Q4_K_XL.gguf")) == ["c-UD-Q4_K_XL.gguf"]
    error = refusal(ModelNotFound, root, gguf_variant="Q5_K_M")
    assert error.field == "gguf_variant"
    assert_sentence("variant.unknown", error.message, where=root, variant="Q5_K_M")


@pytest.mark.parametrize("variant", ["../model.gguf", "/etc/passwd", "sub/../../model.gguf"])
def test_variant_never_leads_out_of_its_folder(
    folder: Callable[..., Path], model: Path, variant: str
) -> None:
    root = folder("a-Q8_0.gguf")
    assert refusal(ModelNotFound, root, gguf_variant=variant).field == "gguf_variant"


def test_search_of_the_whole_disk_ends_at_once(model: Path) -> None:
    """For a mistyped path; how it is refused depends on the disk."""
    error = refusal(ModelNotFound, "/", gguf_variant="no-such-variant")
    assert error.field in ("model_path", "gguf_variant")


def test_reported_variant_finds_the_same_file(folder: Callable[..., Path]) -> None:
    """Sending back what a status reports must reload nothing."""
    root = folder(
        "a-Q8_0.gguf", "b-Q8_0.gguf", "sub/a-Q8_0.gguf", "F16/a.gguf", "plain.gguf",
        "sub/plain.gguf", "a_q4_k_m.gguf",
    )  # fmt: skip
    for path in sorted(root.rglob("*.gguf")):
        found = find(root, gguf_variant=str(path.relative_to(root)))
        assert [file.path for file in found.weights] == [str(path)]
        assert find(root, gguf_variant=found.variant) == found


@pytest.mark.parametrize("variant", ["ud-q4_k_xl", "UD-Q4_K_XL", "m", "m.gguf", "UD-Q4_K_XL/m"])
def test_file_accepts_its_own_variant_and_no_other(
    folder: Callable[..., Path], variant: str
) -> None:
    """Its label may be in the name of the folder only."""
    path = folder("UD-Q4_K_XL/m.gguf") / "UD-Q4_K_XL" / "m.gguf"
    assert find(path, gguf_variant=variant) == find(path)
    for other in ("Q4_K_XL", "Q8_0", "n.gguf"):
        error = refusal(ModelNotFound, path, gguf_variant=other)
        assert error.field == "gguf_variant"
        assert_sentence("variant.of_other_file", error.message, path=path, variant=other)


def test_companion_file_is_loaded_only_by_its_path(folder: Callable[..., Path]) -> None:
    root = folder("mtp-a-Q4_0.gguf", "MTP/b-Q8_0.gguf", "mmproj-F16.gguf")
    error = refusal(ModelNotFound, root)
    assert error.field == "model_path"
    assert_sentence("model.only_companions", error.message, where=root)
    assert names(find(root / "MTP" / "b-Q8_0.gguf")) == ["b-Q8_0.gguf"]


def test_projector_in_the_folder_is_used_only_if_requested(folder: Callable[..., Path]) -> None:
    root = folder("a-Q8_0.gguf", "mmproj-F16.gguf")
    assert find(root).projector is None
    projector = find(root, mmproj_path=str(root / "mmproj-F16.gguf")).projector
    assert projector is not None
    assert projector.path == str(root / "mmproj-F16.gguf")


def test_another_look_up_in_a_folder_opens_no_file(folder: Callable[..., Path]) -> None:
    """`plan` and an `already_loaded` answer look it up each time: it takes some 60 calls of
    functions for each file, about 10 microseconds.
    """
    root = folder(*(f"m{number}-Q{number % 9}_0.gguf" for number in range(50)))
    find(root)
    calls: Counter[str] = Counter()

    def count(_: object, event: str, function: Any) -> None:
        if event in {"call", "c_call"}:
            calls[function.__qualname__ if event == "c_call" else "of Python"] += 1

    sys.setprofile(count)
    find(root)
    sys.setprofile(None)
    assert calls["open"] == 0
    assert calls["stat"] + calls["lstat"] < 50, "not of each file"
    assert calls.total() < 70 * 50


def test_model_path_is_a_repo_only_if_no_such_path_exists(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    shutil.copy(model, "owner/name/model.gguf")
    Path("owner/dangling").symlink_to("nowhere")
    source = ModelSource(tmp_path / "records", None)
    assert source.look_up(LoadRequest(model_path="owner/name")).hub is None
    for repo in ("owner/other", "owner/name:Q4_K_M", "owner/dangling"):
        assert source.look_up(LoadRequest(model_path=repo)).hub is not None


# Split models


SPLIT = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")


def test_split_model_needs_every_part_whole(folder: Callable[..., Path]) -> None:
    root = folder(*SPLIT)
    assert names(find(root)) == names(find(root / SPLIT[0])) == list(SPLIT)
    (root / SPLIT[2]).unlink()
    (root / SPLIT[2]).write_bytes(b"GGUF cut")
    assert SPLIT[2] in refusal(InvalidModel, root).message
    (root / SPLIT[2]).unlink()
    for path in (root, root / SPLIT[0]):
        error = refusal(ModelNotFound, path)
        assert error.field == "model_path"
        assert f"{SPLIT[2]} is missing" in error.message


def test_parts_that_are_links_keep_their_names(folder: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp finds the other parts by name, and the blobs of a Hub cache have other names."""
    blobs = folder(*SPLIT)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, name in enumerate(SPLIT):
        (blobs / name).rename(blobs / f"blob{number}")
        (snapshot / name).symlink_to(blobs / f"blob{number}")
    found = find(snapshot)
    assert [file.path for file in found.weights] == [str(snapshot / name) for name in SPLIT]
    inodes = [(blobs / f"blob{number}").stat().st_ino for number in range(3)]
    assert [file.inode for file in found.weights] == inodes


# Projectors


def test_projector_is_checked_like_a_model(model: Path, tmp_path: Path) -> None:
    projector = tmp_path / "mmproj.gguf"
    for data, error in ((None, ModelNotFound), (b"", InvalidModel), (b"GGUF", InvalidModel)):
        if data is not None:
            projector.write_bytes(data)
        assert refusal(error, model, mmproj_path=str(projector)).field == "mmproj_path"
    shutil.copy(model, projector)
    found = find(model, mmproj_path=str(projector)).projector
    assert found is not None
    assert found.path == str(projector)


def test_projector_is_refused_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(header(pair("general.architecture", 8, struct.pack("<Q", 4) + b"clip")))
    error = refusal(InvalidModel, path)
    assert error.field == "model_path"
    assert_sentence("model.is_projector", error.message, path=path)
