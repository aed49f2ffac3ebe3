"""Models of any shape that are a header, and a hole where the weights would be.

llama-server reports the memory that such a model needs as it does for a real one: it reads no
weight for that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import gguf
import numpy

Numbers = Mapping[str, int | float | list[int] | list[bool]]
Tensors = list[tuple[str, tuple[int, ...], str]]
"""Name, shape as llama.cpp prints it, and type."""

_BYTE_TOKENS: Final = (b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)))
_NORM: Final = "attention.layer_norm_rms_epsilon"


def write_sparse_model(
    path: Path,
    architecture: str,
    numbers: Numbers,
    tensors: Tensors,
    n_vocab: int = 300,
    parts: int = 0,
) -> Path:
    """Write a model, or the first of its parts; keys are without the name of the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    if parts:
        writer.add_uint16("split.count", parts)
    for name, value in numbers.items():
        key = f"{architecture}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    kinds = gguf.TokenType
    tokens = [*_BYTE_TOKENS, *(b"t%d" % n for n in range(n_vocab - len(_BYTE_TOKENS)))]
    special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    normal = [kinds.NORMAL] * (n_vocab - len(_BYTE_TOKENS))
    writer.add_token_types([*special, *[kinds.BYTE] * 256, *normal])
    size = 0
    for name, shape, kind in tensors:
        type_ = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        stored = gguf.quant_shape_to_byte_shape(shape[::-1], type_)
        size_bytes = int(numpy.prod(shape, dtype=numpy.int64)) // block * block_bytes
        is_plain = kind == "F32"
        writer.add_tensor_info(
            name,
            shape[::-1] if is_plain else stored,
            numpy.dtype("float32" if is_plain else "uint8"),
            size_bytes,
            raw_dtype=type_,
        )
        size += -(-size_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + size)
    return path


def transformer(
    path: Path,
    architecture: str = "llama",
    *,
    layers: int = 4,
    width: int = 1024,
    inner: int = 2816,
    heads: int = 16,
    kv_heads: int = 4,
    key: int = 64,
    experts: int = 0,
    used: int = 0,
    n_vocab: int = 32000,
    trained: int = 8192,
    kind: str = "Q4_0",
    is_tied: bool = False,
    more: Numbers | None = None,
) -> Path:
    """Write a model of the architecture llama, gemma3 or one with the same tensors."""
    numbers = {
        "context_length": trained,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": key,
        "attention.value_length": key,
        "rope.dimension_count": key,
        _NORM: 1e-5,
        **({"expert_count": experts, "expert_used_count": used} if experts else {}),
        **(more or {}),
    }
    tensors: Tensors = [("token_embd.weight", (width, n_vocab), kind)]
    tensors += [("output_norm.weight", (width,), "F32")]
    tensors += [] if is_tied else [("output.weight", (width, n_vocab), kind)]
    matrices: dict[str, tuple[int, ...]] = {
        "attn_q": (width, key * heads),
        "attn_k": (width, key * kv_heads),
        "attn_v": (width, key * kv_heads),
        "attn_output": (key * heads, width),
    }
    if experts:
        matrices |= {f"ffn_{name}_exps": (width, inner, experts) for name in ("gate", "up")}
        matrices |= {"ffn_down_exps": (inner, width, experts)}
    else:
        matrices |= {"ffn_gate": (width, inner), "ffn_up": (width, inner)}
        matrices |= {"ffn_down": (inner, width)}
    norms = {"attn_norm": width, "ffn_norm": width}
    if architecture == "gemma3":
        norms |= {"attn_q_norm": key, "attn_k_norm": key}
        norms |= {"post_attention_norm": width, "post_ffw_norm": width}
    for layer in range(layers):
        block = f"blk.{layer}"
        tensors += [(f"{block}.{name}.weight", (n,), "F32") for name, n in norms.items()]
        tensors += [(f"{block}.{name}.weight", shape, kind) for name, shape in matrices.items()]
        if experts:
            tensors += [(f"{block}.ffn_gate_inp.weight", (width, experts), "F32")]
    return write_sparse_model(path, architecture, numbers, tensors, n_vocab)


def recurrent(path: Path, *, layers: int = 16, width: int = 1024, state: int = 64) -> Path:
    """Write a mamba model: no cache, a state for each slot."""
    inner, n_vocab, rank, kernel = 2 * width, 32000, 64, 4
    numbers = {
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        _NORM: 1e-5,
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    tensors: Tensors = [
        ("token_embd.weight", (width, n_vocab), "Q4_0"),
        ("output_norm.weight", (width,), "F32"),
        ("output.weight", (width, n_vocab), "Q4_0"),
    ]
    for layer in range(layers):
        tensors += [
            (f"blk.{layer}.{name}", shape, kind)
            for name, shape, kind in (
                ("attn_norm.weight", (width,), "F32"),
                ("ssm_in.weight", (width, 2 * inner), "Q4_0"),
                ("ssm_conv1d.weight", (kernel, inner), "F32"),
                ("ssm_conv1d.bias", (inner,), "F32"),
                ("ssm_x.weight", (inner, rank + 2 * state), "Q4_0"),
                ("ssm_dt.weight", (rank, inner), "Q4_0"),
                ("ssm_dt.bias", (inner,), "F32"),
                ("ssm_a", (state, inner), "F32"),
                ("ssm_d", (inner,), "F32"),
                ("ssm_out.weight", (inner, width), "Q4_0"),
            )
        ]
    return write_sparse_model(path, "mamba", numbers, tensors, n_vocab)


def latent(path: Path, *, layers: int = 4) -> Path:
    """Write a deepseek2 model: its cache has keys only, of all heads together."""
    width, inner, heads, n_vocab, kind = 1024, 2816, 16, 32000, "Q4_0"
    q_rank, kv_rank, rope, key, value = 512, 512, 64, 128, 128
    numbers = {
        "context_length": 8192,
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        _NORM: 1e-5,
        "attention.head_count_kv": 1,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": key + rope,
        "attention.value_length_mla": value,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "rope.dimension_count": rope,
        "leading_dense_block_count": layers,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 512,
        "expert_shared_count": 1,
        "vocab_size": n_vocab,
        "expert_weights_scale": 1.0,
    }
    tensors: Tensors = [
        ("token_embd.weight", (width, n_vocab), kind),
        ("output_norm.weight", (width,), "F32"),
        ("output.weight", (width, n_vocab), kind),
    ]
    norms = {"attn_norm": width, "ffn_norm": width, "attn_q_a_norm": q_rank}
    norms |= {"attn_kv_a_norm": kv_rank}
    matrices = {
        "attn_q_a": (width, q_rank),
        "attn_q_b": (q_rank, heads * (key + rope)),
        "attn_kv_a_mqa": (width, kv_rank + rope),
        "attn_k_b": (key, kv_rank, heads),
        "attn_v_b": (kv_rank, value, heads),
        "attn_output": (heads * value, width),
        "ffn_gate": (width, inner),
        "ffn_up": (width, inner),
        "ffn_down": (inner, width),
    }
    for layer in range(layers):
        block = f"blk.{layer}"
        tensors += [(f"{block}.{name}.weight", (n,), "F32") for name, n in norms.items()]
        tensors += [(f"{block}.{name}.weight", shape, kind) for name, shape in matrices.items()]
    return write_sparse_model(path, "deepseek2", numbers, tensors, n_vocab)
