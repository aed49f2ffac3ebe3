"""What the header of a model says about the memory it needs beside its weights.

Sums over the layers, because layers differ: in some models only every n-th one attends to the whole
context, and in some most have a state of fixed size instead of a cache.

Source: the keys of the GGUF specification in ggml's docs; which layers have a window, by the
hyperparameters that llama.cpp loads for each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.models.gguf_file import Header, header
from orchestrator.settings.files import FileIdentity

_MAX_LAYERS: Final = 4096
_PERIODS: Final = {  # of n layers, the last one attends to everything; not in the file
    **dict.fromkeys(("cohere2", "llama4", "exaone4", "smallthinker", "afmoe"), 4),
    **dict.fromkeys(("gemma2", "gpt-oss"), 2),
    "gemma3n": 5,
    "gemma3": 6,
}
_REPACKED: Final = frozenset({2, 10, 12, 20, 39})  # Q4_0, Q2_K, Q4_K, IQ4_NL, MXFP4


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The shape of a model.

    Attributes:
        architecture: Empty if the file does not say.
        header_bytes: Of the file, before its weights.
        context_length: Tokens it was trained for.
        embedding_length: Values of a token between layers.
        feed_forward_length: Values of a token inside of the widest layer, of all experts it uses.
        expert_output: Values of a token behind all experts it uses; 0 without experts.
        head_count: Heads that ask, in the layer that has most.
        key_length: Values of a head's key.
        value_length: Values of a head's value in the cache; 0 where it is computed from the key.
        kv_heads: Heads with a cache, of all layers that attend to the whole context.
        window_kv_heads: Those of the layers that attend to the last `window` tokens.
        window: Tokens; 0 if no layer has one.
        state_values: Values that the recurrent layers remember of one sequence.
        inner_size: Values of a token inside of a recurrent layer.
        vocab_size: Tokens it knows.
        tied_bytes: Of the token embedding, where it is the output matrix too and is copied for
            that: into an order that this processor likes.
        is_causal: Whether it generates: others have neither a cache nor an output matrix.
    """

    architecture: str
    header_bytes: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    expert_output: int
    head_count: int
    key_length: int
    value_length: int
    kv_heads: int
    window_kv_heads: int
    window: int
    state_values: int
    inner_size: int
    vocab_size: int
    tied_bytes: int
    is_causal: bool


def hyperparameters(file: FileIdentity, field: str = "model_path") -> Hyperparameters:
    """Return the shape of a model; of a split one it is in the first part.

    Raises:
        InvalidModel: as `gguf_file.header`.
    """
    found = header(file, field)
    get = _Numbers(found.numbers)
    layers = min(get.one("block_count"), _MAX_LAYERS)
    embedding, heads = get.one("embedding_length"), get.one("attention.head_count")
    kv_heads = get.by_layer("attention.head_count_kv", layers, default=heads)
    interval = get.one("full_attention_interval")
    if interval:
        kv_heads = [n if (at + 1) % interval == 0 else 0 for at, n in enumerate(kv_heads)]
    key = get.one("attention.key_length") or embedding // max(1, heads)
    is_latent = get.one("attention.key_length_mla") > 0  # the value is a part of the key
    window = get.one("attention.sliding_window")
    has_window = _windows(get, found, layers) if window else [False] * layers
    used, width = get.one("expert_used_count"), get.one("feed_forward_length")
    is_causal = get.one("attention.causal", 1) > 0
    return Hyperparameters(
        architecture=found.architecture or "",
        header_bytes=found.size_bytes,
        context_length=get.one("context_length"),
        embedding_length=embedding,
        feed_forward_length=max(width, used * (get.one("expert_feed_forward_length") or width)),
        expert_output=used * embedding,
        head_count=heads,
        key_length=key,
        value_length=0 if is_latent else get.one("attention.value_length") or key,
        kv_heads=sum(n for n, has in zip(kv_heads, has_window, strict=True) if not has),
        window_kv_heads=sum(n for n, has in zip(kv_heads, has_window, strict=True) if has),
        window=window if any(has_window) else 0,
        state_values=(kv_heads.count(0) or layers) * _state_of_layer(get, embedding),
        inner_size=get.one("ssm.inner_size"),
        vocab_size=found.vocab_size,
        tied_bytes=_tied_bytes(found) if is_causal else 0,
        is_causal=is_causal,
    )


class _Numbers:
    """Numbers of a header; a negative one is nonsense, and counts as missing."""

    def __init__(self, numbers: Mapping[str, int | tuple[int, ...]]) -> None:
        self._numbers = numbers

    def one(self, name: str, default: int = 0) -> int:
        """Return a number, of several the largest."""
        found = self._numbers.get(name, default)
        return max(0, max(found, default=0) if isinstance(found, tuple) else found)

    def by_layer(self, name: str, layers: int, *, default: int) -> list[int]:
        """Return a number for each layer; what an array lacks is `default`."""
        found = self._numbers.get(name, default)
        many = found if isinstance(found, tuple) else (found,) * layers
        return [max(0, n) for n in (*many[:layers], *(default,) * (layers - len(many)))]


def _windows(get: _Numbers, found: Header, layers: int) -> list[bool]:
    """Return for each layer whether it has a window; where that is unknown, none has."""
    pattern = found.numbers.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return [n > 0 for n in get.by_layer("attention.sliding_window_pattern", layers, default=0)]
    period = pattern or _PERIODS.get(found.architecture or "", 1)
    return [at % period < period - 1 for at in range(layers)] if period > 0 else [False] * layers


def _state_of_layer(get: _Numbers, embedding: int) -> int:
    """Return the values that a recurrent layer remembers: of its convolution and of its state."""
    inner, state = get.one("ssm.inner_size"), get.one("ssm.state_size")
    width = inner + 2 * get.one("ssm.group_count") * state
    convolution = max(0, get.one("ssm.conv_kernel") - 1) * width
    wkv = get.one("wkv.head_size")
    return convolution + state * inner + (embedding * (wkv + 2) if wkv else 0)


def _tied_bytes(found: Header) -> int:
    """Measured on x86-64 with the types that llama.cpp repacks there; on processors that repack
    nothing it is too much.
    """
    is_copied = not found.has_output and found.input_kind in _REPACKED
    return found.input_bytes if is_copied else 0
