"""Estimates of memory, by parts that can be computed by hand, for files that are only sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.models.estimate import Estimate, Files, Weights, beside_mib, estimate, files_of
from orchestrator.models.hyperparameters import Hyperparameters
from orchestrator.models.local import identity_of
from orchestrator.settings.files import ModelFiles
from tests.kit.settings import file, local, not_downloaded, target
from tests.kit.sparse_model import transformer

MIB = 1 << 20
SHAPE = Hyperparameters(
    architecture="llama",
    header_bytes=MIB,
    context_length=8192,
    embedding_length=1024,
    feed_forward_length=2816,
    expert_output=0,
    head_count=16,
    key_length=64,
    value_length=64,
    kv_heads=16 * 4,  # of 4 layers
    window_kv_heads=0,
    window=0,
    state_values=0,
    inner_size=0,
    vocab_size=32768,
    tied_bytes=0,
    is_causal=True,
)
CACHE_MIB = 2 * 64 * 64 * 2 * 8192 // MIB  # of keys and values, heads of 64 numbers of 2 bytes


def of(
    *args: str, shape: dict[str, Any] | None = None, files: Files | None = None, **fields: Any
) -> Estimate:
    model = Weights(101 * MIB, replace(SHAPE, **(shape or {})))
    return estimate(
        target(llama_extra_args=list(args), **fields),
        files or Files(model),
    )


def test_the_parts_of_a_plain_model() -> None:
    found = of("--cache-ram", "100")
    layer, mask, logits = 4 * 512 * (3 * 2816 + 7 * 1024), 2 * 512 * 8192, 4 * 4 * 32768
    compute = -(-(layer + mask + logits) // MIB)
    assert found == Estimate(100, CACHE_MIB, compute, 100)
    assert found.server_mib == 100 + CACHE_MIB + compute
    assert found.total_mib == found.server_mib + 100


@pytest.mark.parametrize(
    ("args", "fields", "tokens"),
    [
        pytest.param("", {}, 8192, id="trained"),
        pytest.param("", {"max_seq_length": 1024}, 1024, id="field"),
        pytest.param("-c 2048", {"max_seq_length": 1024}, 2048, id="flag"),
        pytest.param("-c 0", {}, 8192, id="auto by flag"),
        pytest.param("", {"max_seq_length": 1000}, 1024, id="rounded up"),
        pytest.param("", {"n_parallel": 2}, 2 * 8192, id="each slot has it"),
        pytest.param("-kvu", {"n_parallel": 2}, 8192, id="shared"),
        pytest.param("", {"n_parallel": 2, "max_seq_length": 8192}, 8192, id="divided"),
        pytest.param("", {"n_parallel": 3, "max_seq_length": 100}, 3 * 256, id="divided, rounded"),
    ],
)
def test_the_context_that_is_paid_for(args: str, fields: dict[str, Any], tokens: int) -> None:
    expected = -(-2 * 64 * 64 * 2 * tokens // MIB)
    assert of(*args.split(), **fields).context_mib == expected


@pytest.mark.parametrize(
    ("args", "field", "bytes_of_both"),
    [
        ("", None, 4),
        ("", "f32", 8),
        ("", "bf16", 4),
        ("", "q8_0", 2 * 34 / 32),
        ("", "iq4_nl", 2 * 18 / 32),
        ("", "q5_1", 2 * 24 / 32),
        ("-ctk q4_0", "q8_0", 18 / 32 + 34 / 32),
        ("-ctk Q4_0 -ctv q5_0", None, 18 / 32 + 22 / 32),
        ("-ctk newer", None, 4 + 2),
    ],
)
def test_a_cache_has_the_type_that_is_asked_for(
    args: str, field: str | None, bytes_of_both: float
) -> None:
    """One that we do not know counts as the largest."""
    expected = 64 * 64 * 8192 * bytes_of_both / MIB
    assert of(*args.split(), cache_type_kv=field).context_mib == expected


def test_layers_with_a_window_remember_as_much_as_all_slots_may_ask_for() -> None:
    def tokens(*args: str, **fields: Any) -> int:
        shape = {"kv_heads": 0, "window_kv_heads": 64, "window": 512}
        return of(*args, shape=shape, **fields).context_mib * MIB // (2 * 64 * 64 * 2)

    assert tokens() == 4 * 512 + 512
    assert tokens("-ub", "1024") == 4 * 512 + 1024
    assert tokens(n_parallel=2, max_seq_length=8192) == 2 * (512 + 512)
    assert tokens(max_seq_length=1024) == 1024
    assert tokens("--swa-full") == 8192


def test_a_state_belongs_to_a_slot_whatever_the_context() -> None:
    shape = {"kv_heads": 0, "state_values": MIB}
    assert of(shape=shape).context_mib == 4 * 4
    assert of(shape=shape, n_parallel=1, max_seq_length=100_000).context_mib == 4


def test_a_model_that_is_not_causal_has_no_cache_and_no_logits() -> None:
    """Its tokens see each other, not a context."""
    found = of(kind="embedding", shape={"is_causal": False})
    layer, mask = 4 * 512 * (3 * 2816 + 7 * 1024), 2 * 512 * 512
    assert (found.context_mib, found.compute_mib) == (0, -(-(layer + mask) // MIB))


def test_compute_buffers_grow_with_what_is_computed_at_once() -> None:
    plain = of().compute_mib
    assert of("-ub", "1024").compute_mib > 1.9 * plain
    assert of("-b", "64").compute_mib < plain / 6
    assert of(max_seq_length=64).compute_mib < plain / 4
    scores = 4 * 16 * 512 * 8192 // MIB
    assert of("-fa", "off").compute_mib > plain + scores / 2
    assert of(kind="embedding").compute_mib >= 4 * 512 * 32768 // MIB
    assert of("--spec-default").compute_mib == plain + 4 * 4 * 64 * 32768 // MIB
    assert of(shape={"expert_output": 8 * 1024}).compute_mib > plain
    assert of(shape={"inner_size": 4096}).compute_mib > plain


def test_a_copied_matrix_counts_twice() -> None:
    assert of(shape={"tied_bytes": 7 * MIB}).weights_mib == 107


def test_draft_models_are_added() -> None:
    """A draft model has a cache of its own, of the same length and of its own type."""
    model, small = Weights(101 * MIB, SHAPE), replace(SHAPE, kv_heads=8, context_length=512)
    both = Files(model, Weights(11 * MIB, small))
    alone, found = of("-ctk", "q8_0"), of("-ctk", "q8_0", files=both)
    assert found.weights_mib == 100 + 10
    assert found.context_mib == alone.context_mib + CACHE_MIB // 8
    assert found.compute_mib > 1.9 * alone.compute_mib
    quantised = of("-ctkd", "q8_0", "-ctvd", "q8_0", files=both)
    assert quantised.context_mib == CACHE_MIB + CACHE_MIB // 8 * 34 // 64 + 1  # rounded up


def test_a_model_without_a_header_is_its_files_and_a_tenth() -> None:
    assert of(files=Files(Weights(100 * MIB)), cache_ram_mib=7) == Estimate(111, 0, 0, 7)


@pytest.mark.parametrize(
    ("fields", "projector_mib", "expected"),
    [
        ({}, 0, 0),
        ({"cache_ram_mib": 512}, 0, 512),
        ({"cache_ram_mib": 0}, 100, 150),
        ({"kind": "embedding"}, 0, 0),
        ({"llama_extra_args": ["-cram", "-1"]}, 10, 8192 + 15),
    ],
)
def test_what_the_servers_figures_leave_out(
    fields: dict[str, Any], projector_mib: int, expected: int
) -> None:
    projector = file("/p.gguf", size_bytes=projector_mib * MIB) if projector_mib else None
    made = target(model=local(projector=projector), **fields)
    assert beside_mib(made) == expected
    assert estimate(made, Files(Weights(0, SHAPE))).extra_mib == expected


def test_adapters_are_in_no_figure_of_the_server(tmp_path: Path) -> None:
    adapter = tmp_path / "lora.gguf"
    adapter.write_bytes(bytes(MIB + 1))
    assert beside_mib(target(llama_extra_args=["--lora", f"{adapter},{adapter}"])) == 3


def test_files_are_read_with_all_parts_and_what_extra_args_add(tmp_path: Path) -> None:
    first, draft = transformer(tmp_path / "a.gguf"), transformer(tmp_path / "d.gguf", layers=1)
    other = tmp_path / "b.gguf"
    other.write_bytes(bytes(1000))
    model = ModelFiles((identity_of(first), identity_of(other)))
    args = ["-md", str(draft)]
    found = files_of(target(model=model, llama_extra_args=args))
    assert found.model.size_bytes == first.stat().st_size + 1000
    assert found.model.shape is not None
    assert found.model.shape.kv_heads == 16
    assert found.draft is not None
    assert found.draft.size_bytes == draft.stat().st_size
    assert found.draft.shape is not None
    assert found.draft.shape.kv_heads == 4


def test_files_that_are_missing_or_damaged_are_no_error(tmp_path: Path) -> None:
    """The server refuses them; a model that vanishes meanwhile has no shape."""
    damaged = tmp_path / "a.gguf"
    damaged.write_bytes(b"GGUF and no more")
    args = ["-md", str(tmp_path / "none.gguf"), "--lora", "a,"]
    model = ModelFiles((identity_of(damaged),))
    found = files_of(target(model=model, llama_extra_args=args))
    assert found == Files(Weights(16), Weights(0))


def test_a_model_to_download_has_the_size_that_the_hub_listed() -> None:
    listed = replace(not_downloaded(), listed_bytes=100 * MIB)
    assert files_of(target(model=listed)) == Files(Weights(100 * MIB))
    assert files_of(target(model=not_downloaded())) == Files(Weights(0))
