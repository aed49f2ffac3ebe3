"""The shape of a model by its header, for models that are only a header."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import InvalidModel
from orchestrator.models import gguf_file
from orchestrator.models.hyperparameters import Hyperparameters, hyperparameters
from orchestrator.models.local import identity_of
from tests.kit.sparse_model import Tensors, latent, recurrent, transformer, write_sparse_model

MIB = 1 << 20


def shape(path: Path) -> Hyperparameters:
    return hyperparameters(identity_of(path))


def of(tmp_path: Path, architecture: str = "llama", **numbers: Any) -> Hyperparameters:
    """Return the shape of a model without weights, by keys with `__` for a dot."""
    values = {name.replace("__", "."): value for name, value in numbers.items()}
    return shape(write_sparse_model(tmp_path / "model.gguf", architecture, values, []))


def test_a_plain_model(tmp_path: Path) -> None:
    path = transformer(tmp_path / "m.gguf", layers=3, heads=16, kv_heads=4, key=96, kind="F16")
    found = shape(path)
    assert found == Hyperparameters(
        architecture="llama",
        header_bytes=found.header_bytes,
        context_length=8192,
        embedding_length=1024,
        feed_forward_length=2816,
        expert_output=0,
        head_count=16,
        key_length=96,
        value_length=96,
        kv_heads=3 * 4,
        window_kv_heads=0,
        window=0,
        state_values=0,
        inner_size=0,
        vocab_size=32000,
        tied_bytes=0,
        is_causal=True,
    )
    weights = 1024 * 2 * 32000 + 3 * (16 + 4 + 4 + 16) * 96 * 1024 + 3 * 3 * 1024 * 2816
    norms = 4 * 1024 * (2 * 3 + 1)
    assert path.stat().st_size - found.header_bytes == 2 * weights + norms


def test_what_a_file_leaves_out_has_llama_cpps_defaults(tmp_path: Path) -> None:
    """A head's size is a share of the width, and every head has a cache of its own."""
    found = of(tmp_path, block_count=2, embedding_length=512, attention__head_count=8)
    assert (found.key_length, found.value_length) == (64, 64)
    assert found.kv_heads == 16
    assert found.is_causal


def test_layers_that_differ_are_summed(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        block_count=4,
        embedding_length=512,
        attention__head_count=[8, 8, 4, 8],
        attention__head_count_kv=[2, 0, 4, 0],
        feed_forward_length=[1024, 4096, 1024, 1024],
    )
    assert found.kv_heads == 6
    assert (found.head_count, found.key_length) == (8, 64)
    assert found.feed_forward_length == 4096


def test_experts_count_as_often_as_they_are_used(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        embedding_length=512,
        feed_forward_length=1024,
        expert_feed_forward_length=256,
        expert_used_count=8,
    )
    assert (found.feed_forward_length, found.expert_output) == (2048, 4096)


@pytest.mark.parametrize(
    ("architecture", "pattern", "everywhere"),
    [
        pytest.param("gemma3", None, [6, 12], id="known by its name"),
        pytest.param("qwen2", None, range(1, 13), id="unknown: none has a window"),
        pytest.param("any", 3, [3, 6, 9, 12], id="every third in the file"),
        pytest.param("any", [True] * 11 + [False], [12], id="each layer in the file"),
        pytest.param("any", [True], range(2, 13), id="too short a list"),
        pytest.param("any", 0, range(1, 13), id="nonsense"),
    ],
)
def test_layers_with_a_window_are_told_from_the_others(
    tmp_path: Path, architecture: str, pattern: int | list[bool] | None, everywhere: Sequence[int]
) -> None:
    """`everywhere` are those that attend to everything; the nth layer has n heads."""
    given = {} if pattern is None else {"attention__sliding_window_pattern": pattern}
    found = of(
        tmp_path,
        architecture,
        block_count=12,
        attention__head_count_kv=[*range(1, 13)],
        attention__sliding_window=1024,
        **given,
    )
    assert (found.kv_heads, found.window_kv_heads) == (sum(everywhere), 78 - sum(everywhere))
    assert found.window == (0 if len(everywhere) == 12 else 1024)


def test_recurrent_layers_have_a_state_instead_of_a_cache(tmp_path: Path) -> None:
    found = shape(recurrent(tmp_path / "m.gguf", layers=16, width=1024, state=64))
    assert (found.kv_heads, found.inner_size) == (0, 2048)
    assert found.state_values == 16 * (3 * 2048 + 64 * 2048)


def test_a_hybrid_model_has_a_cache_in_every_nth_layer(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        block_count=8,
        attention__head_count_kv=[*range(1, 9)],
        full_attention_interval=4,
        ssm__conv_kernel=4,
        ssm__inner_size=256,
        ssm__state_size=16,
        ssm__group_count=2,
    )
    assert found.kv_heads == 4 + 8
    assert found.state_values == 6 * (3 * (256 + 2 * 2 * 16) + 16 * 256)


def test_a_latent_cache_has_no_values(tmp_path: Path) -> None:
    found = shape(latent(tmp_path / "m.gguf"))
    assert (found.kv_heads, found.key_length, found.value_length) == (4, 576, 0)


def test_a_model_that_is_not_causal_has_no_output_matrix(tmp_path: Path) -> None:
    more = {"attention.causal": False}
    found = shape(transformer(tmp_path / "m.gguf", is_tied=True, more=more))
    assert not found.is_causal
    assert found.tied_bytes == 0


@pytest.mark.parametrize(
    ("is_tied", "kind", "expected"),
    [(True, "Q4_0", 32000 * 1024 // 32 * 18), (True, "Q6_K", 0), (False, "Q4_0", 0)],
)
def test_a_matrix_with_two_uses_is_copied_where_it_is_repacked(
    tmp_path: Path, is_tied: bool, kind: str, expected: int
) -> None:
    found = shape(transformer(tmp_path / "m.gguf", is_tied=is_tied, kind=kind))
    assert found.tied_bytes == expected


def test_a_part_of_a_model_may_have_its_output_matrix_elsewhere(tmp_path: Path) -> None:
    tensors: Tensors = [("token_embd.weight", (1024, 300), "Q4_0")]
    path = tmp_path / "m.gguf"
    assert shape(write_sparse_model(path, "llama", {}, tensors)).tied_bytes > 0
    assert shape(write_sparse_model(path, "llama", {}, tensors, parts=2)).tied_bytes == 0


def test_numbers_that_make_no_sense_are_no_danger(tmp_path: Path) -> None:
    """A header is whatever somebody wrote: lists of any length, counts of any size."""
    found = of(
        tmp_path,
        block_count=0xFFFFFFFF,
        embedding_length=[],
        attention__head_count=[-5, -1],
        attention__head_count_kv=[3] * 5000,
        attention__sliding_window=0xFFFFFFFF,
        attention__sliding_window_pattern=[False] * 5000,
        context_length=1.5,
    )
    assert found.kv_heads == 4096 * 3
    assert (found.embedding_length, found.head_count, found.context_length) == (0, 0, 0)
    assert of(tmp_path, attention__head_count_kv=[1] * 70_000, block_count=2).kv_heads == 0


def test_a_header_of_long_names_takes_little_memory(tmp_path: Path) -> None:
    """What is not used is not kept, or a file of gigabytes would be."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    count, long = 500, b"x" * 60_000
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, count, count))
        for number in range(count):
            name = b"%d" % number
            if number % 2:  # a long key, or a long value
                file.write(text(name + long + b".block_count") + struct.pack("<II", 4, 1))
            else:
                file.write(text(name + b".block_count") + struct.pack("<I", 8) + text(long))
        for number in range(count):
            file.write(text(b"%d" % number + long) + struct.pack("<IQIQ", 1, 1, 0, 0))
        file.write(bytes(100))
    tracemalloc.start()
    try:
        shape(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_keys_of_another_architecture_are_not_read(tmp_path: Path) -> None:
    path = transformer(tmp_path / "m.gguf")
    data = path.read_bytes().replace(b"llama.block_count", b"other.block_count")
    path.write_bytes(data)
    assert shape(path).kv_heads == 0


def test_a_damaged_header_is_refused_as_by_every_reader(tmp_path: Path) -> None:
    path = transformer(tmp_path / "m.gguf")
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InvalidModel, match="truncated"):
        shape(path)


def test_a_large_model_is_read_hardly_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is known in 0.1 s, by less than 5 % of a file of 4 GiB."""
    taken: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            taken.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(gguf_file, "FileIO", Counted)
    path = transformer(tmp_path / "m.gguf", layers=40, width=4096, inner=14336, n_vocab=50_000)
    assert path.stat().st_size > 4 << 30
    begun = time.process_time()
    found = shape(path)
    assert time.process_time() - begun < 0.1
    assert 0 < found.header_bytes <= sum(taken) < 4 * MIB
    assert shape(path) is not None
    assert sum(taken) < 4 * MIB, "a header is read once"
