"""Models on disk: what is a whole GGUF, and which file a request means.

Every damage here is one that llama-server would find out only after the old server is gone.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import InvalidModel, ModelNotFound, OrchestratorError
from orchestrator.models import gguf_file
from orchestrator.models.gguf_file import BLOCKS, GgufInfo, inspect
from orchestrator.models.local import identity_of, is_local, locate
from orchestrator.server import process_table
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest


def find(path: object, **fields: Any) -> ModelFiles:
    return locate(LoadRequest(model_path=str(path), **fields))


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


# Is it a whole GGUF?


def test_block_sizes_are_those_of_ggml() -> None:
    """A wrong one refuses good models, or lets truncated ones through."""
    sizes = {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    sizes[9] = (32, 36)  # Q8_1 is never in a file; ggml has stored its sum in half precision since
    assert {kind: sizes[kind] for kind in BLOCKS if kind in sizes} == BLOCKS
    assert sizes.keys() <= BLOCKS.keys()


def test_the_tiny_model_is_whole(model: Path) -> None:
    """Its header says what it is."""
    info = inspect(identity_of(model))
    assert info.architecture == "llama"
    assert info.tensors > 10


def test_a_model_cut_anywhere_is_refused(model: Path) -> None:
    """An interrupted download costs no running model, wherever it stopped."""
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
    assert inspect(identity_of(model)).architecture == "llama"


def test_the_amount_that_is_missing_is_told(model: Path) -> None:
    """It tells an almost finished download from a page of HTML."""
    with open(model, "r+b") as file:
        file.truncate(model.stat().st_size - 4096)
    with pytest.raises(InvalidModel, match=r"truncated, \d+ of its bytes are missing; download"):
        inspect(identity_of(model))


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
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"<html>", "is not a GGUF"),
        (b"GGU", "is not a GGUF"),
        (header(magic=b"ggml"), "is not a GGUF"),
        (header(version=0), "version 0"),
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (struct.pack(">4sI", b"GGUF", 3) + bytes(16), "version 50331648"),
        (header(tensors=1 << 60), "makes no sense"),
        (header(tensors=1), "truncated inside its header"),
        (header(pair("k", 99, b"")), "unknown type 99"),
        (header(pair("k", 8, struct.pack("<Q", 1 << 62))), "truncated inside its header"),
        (header(pair("k", 9, struct.pack("<IQ", 4, 1 << 62))), "makes no sense"),
        (header(pair("k", 9, struct.pack("<IQ", 4, 1 << 20))), "truncated inside its header"),
        (header(pair("k", 9, struct.pack("<IQ", 9, 1) * 5000)), "is damaged"),
        (header(tensor((4,) * 9, 0, 0), tensors=1)[:16] + bytes(8) + tensor((4,) * 9, 0, 0),
         "9 dimensions"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_model_is_refused_and_says_why(tmp_path: Path, data: bytes, what: str) -> None:
    """Each is an error with a remedy, never a crash and never a long wait."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=what) as refused:
        find(path)
    assert refused.value.field == "model_path"


def test_every_kind_of_metadata_is_understood(tmp_path: Path) -> None:
    """Version 2 and 3, every scalar, arrays of everything, an alignment of its own."""
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
        assert inspect(identity_of(path)) == GgufInfo("llama", 1)
        path.write_bytes(whole[:-1])
        with pytest.raises(InvalidModel, match="1 of its bytes are missing"):
            inspect(identity_of(path))
        path.write_bytes(head + future + bytes(512))  # newer than our table: the server will know
        assert inspect(identity_of(path)) == GgufInfo("llama", 1)


def test_a_model_that_shrinks_while_it_is_read_is_an_error_not_a_crash(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that is cut short kills the whole backend with SIGBUS."""
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
    assert inspect(identity_of(model)).architecture == "llama"


def test_a_replaced_file_is_looked_at_again(model: Path) -> None:
    """Answers are remembered by what the file is, not by its name."""
    good = model.read_bytes()
    before = find(model).weights[0]
    model.write_bytes(b"GGUF and no more")
    with pytest.raises(InvalidModel):
        find(model)
    model.write_bytes(good)
    after = find(model).weights[0]
    assert (before.path, before.size_bytes) == (after.path, after.size_bytes)
    assert before.mtime_ns != after.mtime_ns


def test_a_large_model_is_inspected_without_being_read(tmp_path: Path) -> None:
    """Only the header counts; a file of many GiB takes no longer."""
    path = write_tiny_model(tmp_path / "large.gguf", padding_bytes=64 << 20)
    before = process_table.bytes_read(os.getpid())
    assert inspect(identity_of(path)).architecture == "llama"
    assert 0 < process_table.bytes_read(os.getpid()) - before < 4 << 20


# Which file does a request mean?


def test_a_file_is_meant_by_its_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, through a link, through the home directory: the same file."""
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
def test_a_path_without_a_model_is_an_error_with_the_field(
    model: Path, monkeypatch: pytest.MonkeyPatch, path: str, error: type[OrchestratorError]
) -> None:
    """Whatever is there or is not: typed, at once, and it names what to change."""
    monkeypatch.chdir(model.parent)
    Path("loop.gguf").symlink_to("loop.gguf")
    Path("dangling.gguf").symlink_to("nowhere.gguf")
    Path("empty folder").mkdir()
    os.mkfifo("fifo.gguf")
    with pytest.raises(error) as refused:
        find(path)
    assert refused.value.field == "model_path"


def test_what_is_not_there_says_what_could_be(tmp_path: Path) -> None:
    """A path that was misspelt, or meant for the Hub."""
    with pytest.raises(ModelNotFound, match=r"does not exist.*folder.*owner/name"):
        find(str(tmp_path / "nothing"))


def test_a_folder_holds_its_preferred_variant(folder: Callable[..., Path]) -> None:
    """The order of preference decides, then the root before sub-folders; extras are set aside."""
    root = folder(
        "a-Q8_0.gguf", "b-Q4_K_M.gguf", "sub/c-UD-Q4_K_XL.gguf", "mmproj-f16.gguf",
        "mtp-Q4_K_M.gguf", "x-imatrix.gguf", "._b-Q4_K_M.gguf",
    )  # fmt: skip
    found = find(root)
    assert (names(found), found.variant) == (["c-UD-Q4_K_XL.gguf"], "UD-Q4_K_XL")
    found = find(root, gguf_variant="q4_k_m")
    assert (names(found), found.variant) == (["b-Q4_K_M.gguf"], "Q4_K_M")
    assert names(find(root, gguf_variant="sub/c-UD-Q4_K_XL.gguf")) == ["c-UD-Q4_K_XL.gguf"]
    with pytest.raises(ModelNotFound, match=r"it has UD-Q4_K_XL, Q4_K_M, Q8_0$") as refused:
        find(root, gguf_variant="Q5_K_M")
    assert refused.value.field == "gguf_variant"


@pytest.mark.parametrize("variant", ["../model.gguf", "/etc/passwd", "sub/../../model.gguf"])
def test_a_variant_never_leaves_its_folder(
    folder: Callable[..., Path], model: Path, variant: str
) -> None:
    """It is compared with what the folder holds, not joined to it."""
    root = folder("a-Q8_0.gguf")
    with pytest.raises(ModelNotFound) as refused:
        find(root, gguf_variant=variant)
    assert refused.value.field == "gguf_variant"


def test_a_folder_may_be_the_whole_disk(model: Path) -> None:
    """A mistyped path is answered at once, and nothing is searched for minutes."""
    with pytest.raises(ModelNotFound, match=r"give the .gguf file|no variant|no .gguf") as refused:
        find("/", gguf_variant="no-such-variant")
    assert refused.value.field in ("model_path", "gguf_variant")


def test_a_variant_that_is_reported_may_be_asked_for(folder: Callable[..., Path]) -> None:
    """Sending back what a status shows reloads nothing, whatever the folder is like."""
    root = folder(
        "a-Q8_0.gguf", "b-Q8_0.gguf", "sub/a-Q8_0.gguf", "F16/a.gguf", "plain.gguf",
        "sub/plain.gguf", "a_q4_k_m.gguf",
    )  # fmt: skip
    for path in sorted(root.rglob("*.gguf")):
        found = find(root, gguf_variant=str(path.relative_to(root)))
        assert [file.path for file in found.weights] == [str(path)]
        assert find(root, gguf_variant=found.variant) == found


@pytest.mark.parametrize("variant", ["ud-q4_k_xl", "UD-Q4_K_XL", "m", "m.gguf", "UD-Q4_K_XL/m"])
def test_a_file_may_be_asked_for_with_its_own_variant(
    folder: Callable[..., Path], variant: str
) -> None:
    """Its folder may be the only one to say which it is."""
    path = folder("UD-Q4_K_XL/m.gguf") / "UD-Q4_K_XL" / "m.gguf"
    assert find(path, gguf_variant=variant) == find(path)
    for other in ("Q4_K_XL", "Q8_0", "n.gguf"):
        with pytest.raises(ModelNotFound) as refused:
            find(path, gguf_variant=other)
        assert refused.value.field == "gguf_variant"


def test_what_is_set_aside_is_said_and_may_be_given_by_its_path(
    folder: Callable[..., Path],
) -> None:
    """A folder of companions only is no model, but whoever names the file means it."""
    root = folder("mtp-a-Q4_0.gguf", "MTP/b-Q8_0.gguf", "mmproj-F16.gguf")
    with pytest.raises(ModelNotFound, match=r"holds no .gguf model, only mmproj-F16") as refused:
        find(root)
    assert refused.value.field == "model_path"
    assert names(find(root / "MTP" / "b-Q8_0.gguf")) == ["b-Q8_0.gguf"]


def test_a_projector_in_the_folder_is_not_taken_by_itself(folder: Callable[..., Path]) -> None:
    """Locally it is given; a model that has run as text goes on as text."""
    root = folder("a-Q8_0.gguf", "mmproj-F16.gguf")
    assert find(root).projector is None
    projector = find(root, mmproj_path=str(root / "mmproj-F16.gguf")).projector
    assert projector is not None
    assert projector.path == str(root / "mmproj-F16.gguf")


def test_looking_through_a_folder_takes_no_time(folder: Callable[..., Path]) -> None:
    """`plan` and a load that finds its model running look each time."""
    root = folder(*(f"m{number}-Q{number % 9}_0.gguf" for number in range(50)))
    find(root)
    took = []
    for _ in range(100):
        started = time.thread_time()
        find(root)
        took.append(time.thread_time() - started)
    assert min(took) < 0.001


def test_what_is_here_is_told_from_what_may_be_on_the_hub(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called like a repo is that folder; a broken link is nothing."""
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    Path("owner/name").mkdir(parents=True)
    Path("dangling.gguf").symlink_to("nowhere.gguf")
    local = [str(model), "model.gguf", "./model.gguf", "~/model.gguf", "owner/name", "/dev/null"]
    assert [is_local(path) for path in local] == [True] * len(local)
    other = ["owner/other", "owner/name:Q4_K_M", "missing.gguf", "dangling.gguf"]
    assert [is_local(path) for path in other] == [False] * len(other)
    with pytest.raises(ModelNotFound, match="cannot be looked up") as refused:
        is_local("x" * 300)
    assert refused.value.field == "model_path"


# Split models


SPLIT = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")


def test_all_parts_of_a_split_model_belong_to_it(folder: Callable[..., Path]) -> None:
    """From the first part or from the folder; a missing or damaged part is named."""
    root = folder(*SPLIT)
    assert names(find(root)) == names(find(root / SPLIT[0])) == list(SPLIT)
    (root / SPLIT[2]).unlink()
    (root / SPLIT[2]).write_bytes(b"GGUF cut")
    with pytest.raises(InvalidModel, match=SPLIT[2]):
        find(root)
    (root / SPLIT[2]).unlink()
    with pytest.raises(ModelNotFound, match=f"{SPLIT[2]} is missing"):
        find(root)


def test_parts_behind_links_keep_their_names(folder: Callable[..., Path], tmp_path: Path) -> None:
    """A Hub cache holds blobs without names, and llama.cpp finds the other parts by name."""
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


def test_a_projector_is_checked_like_a_model(model: Path, tmp_path: Path) -> None:
    """With its own field to blame."""
    projector = tmp_path / "mmproj.gguf"
    for data, error in ((None, ModelNotFound), (b"", InvalidModel), (b"GGUF", InvalidModel)):
        if data is not None:
            projector.write_bytes(data)
        with pytest.raises(error) as refused:
            find(model, mmproj_path=str(projector))
        assert refused.value.field == "mmproj_path"
    shutil.copy(model, projector)
    found = find(model, mmproj_path=str(projector)).projector
    assert found is not None
    assert found.path == str(projector)


def test_a_projector_is_not_a_model(tmp_path: Path) -> None:
    """llama-server fails on it after the old server is gone."""
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(header(pair("general.architecture", 8, struct.pack("<Q", 4) + b"clip")))
    with pytest.raises(InvalidModel, match="give it as mmproj_path") as refused:
        find(path)
    assert refused.value.field == "model_path"
