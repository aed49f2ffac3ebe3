"""A valid GGUF of random weights, about half a megabyte, that llama.cpp loads in milliseconds.

It has the llama architecture, one token per byte and its own chat template. The same arguments give
the same bytes, and the file appears under its name complete or not at all.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Final

_N_EMBD: Final = 64
_N_HEAD: Final = 2  # heads of 32 values: a whole block of every quantised KV cache type
_N_FF: Final = 128
_N_BYTE_TOKENS: Final = 256
_SPECIAL_TOKENS: Final = (b"<unk>", b"<s>", b"</s>")
_PRINTABLE: Final = range(0x20, 0x7F)
_MAX_EXPERTS: Final = 256  # llama.cpp refuses more than 512
_FF_BLOCK: Final = 32
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tiny_model(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    n_layer: int = 2,
    padding_bytes: int = 0,
    context_length: int = 2048,
) -> Path:
    """Write a llama-architecture GGUF of random weights and return its path.

    Its answers are printable ASCII noise and run until `max_tokens` or the context is full.

    Args:
        path: Where to write; an existing file is replaced atomically.
        seed: Seed of the weights.
        n_layer: Number of transformer blocks, 1 or more.
        padding_bytes: Make the file at least this much larger. llama.cpp refuses unknown tensors,
            so the size comes from a mixture of up to 256 experts with zero weights: all are
            loaded, and one is computed per token.
        context_length: Training context in the file's metadata, in tokens.

    Returns:
        The path written.

    Raises:
        ImportError: The `gguf` package is not installed.
        ValueError: A size is out of range.
        OSError: The file cannot be written.
    """
    if n_layer < 1 or context_length < 1 or padding_bytes < 0:
        raise ValueError(
            "n_layer and context_length must be 1 or more and padding_bytes 0 or more, "
            f"not {n_layer}, {context_length} and {padding_bytes}"
        )
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'making a tiny model needs the `gguf` package: pip install "llama-orchestrator[demo]"'
        ) from error
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        writer = gguf.GGUFWriter(written, "llama")
        n_expert, n_ff = _expert_sizes(padding_bytes, n_layer)
        writer.add_context_length(context_length)
        writer.add_block_count(n_layer)
        writer.add_feed_forward_length(n_ff)
        if n_expert:
            writer.add_expert_count(n_expert)
            writer.add_expert_used_count(1)
        _add_metadata(writer)
        _add_weights(writer, seed, n_layer, n_expert, n_ff)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.replace(target)
    return target


def _expert_sizes(padding_bytes: int, n_layer: int) -> tuple[int, int]:
    """Return the number of experts (0 = a dense model) and the feed-forward width."""
    if padding_bytes == 0:
        return 0, _N_FF
    block_bytes = n_layer * 3 * _FF_BLOCK * _N_EMBD * 4
    n_blocks = _N_FF // _FF_BLOCK - (-padding_bytes // block_bytes)
    n_expert = min(_MAX_EXPERTS, n_blocks)
    return n_expert, _FF_BLOCK * -(-n_blocks // n_expert)


def _add_metadata(writer: Any) -> None:
    """Add what is the same in every model."""
    import gguf

    writer.add_name("tiny random llama")
    writer.add_embedding_length(_N_EMBD)
    writer.add_head_count(_N_HEAD)
    writer.add_head_count_kv(_N_HEAD)
    writer.add_rope_dimension_count(_N_EMBD // _N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    kinds = gguf.TokenType
    tokens = [*_SPECIAL_TOKENS, *(b"<0x%02X>" % byte for byte in range(_N_BYTE_TOKENS))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * _N_BYTE_TOKENS]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _add_weights(writer: Any, seed: int, n_layer: int, n_expert: int, n_ff: int) -> None:
    import numpy

    ones = numpy.ones(_N_EMBD, dtype=numpy.float32)
    rng = numpy.random.default_rng(seed)
    n_vocab = len(_SPECIAL_TOKENS) + _N_BYTE_TOKENS

    def noise(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.3)

    # Zeros for all other tokens keep them below the best printable ones.
    output = numpy.zeros((n_vocab, _N_EMBD), dtype=numpy.float32)
    first, last = (len(_SPECIAL_TOKENS) + byte for byte in (_PRINTABLE.start, _PRINTABLE.stop))
    output[first:last] = noise(last - first, _N_EMBD)

    writer.add_tensor("token_embd.weight", noise(n_vocab, _N_EMBD))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", output)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{name}.weight", noise(_N_EMBD, _N_EMBD))
        if n_expert:
            writer.add_tensor(f"{block}.ffn_gate_inp.weight", noise(n_expert, _N_EMBD))
        for name in ("gate", "up", "down"):
            shape = (_N_EMBD, n_ff) if name == "down" else (n_ff, _N_EMBD)
            if not n_expert:
                writer.add_tensor(f"{block}.ffn_{name}.weight", noise(*shape))
                continue
            zeros = numpy.zeros((n_expert, *shape), dtype=numpy.float32)
            writer.add_tensor(f"{block}.ffn_{name}_exps.weight", zeros)
