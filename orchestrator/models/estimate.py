"""What a model will need of memory, before its server has said it: an estimate.

`files_of` reads sizes and headers, `estimate` computes. The caches are computed as llama.cpp does;
the formula of the compute buffer is fitted to what build 11434 reports for models of many shapes,
and lies rather above than below. `beside_mib` is what the server's own figures leave out.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Final

from orchestrator.base.record import Record
from orchestrator.errors import InvalidModel
from orchestrator.models.gguf_file import BLOCKS
from orchestrator.models.hyperparameters import Hyperparameters, hyperparameters
from orchestrator.models.local import identity_of
from orchestrator.settings.files import FileIdentity
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.resources import Resources, resources_of
from orchestrator.settings.target import Target

_MIB: Final = 1 << 20
_PROJECTOR: Final = 1.5  # times its file: its buffers are in no figure of the server
_UNREAD: Final = 1.1  # times the files of a model whose header cannot be read yet
_CELLS: Final = 256  # a cache has a multiple of this
_KINDS: Final = (0, 1, 30, 8, 2, 3, 20, 6, 7)  # in files, of the types of a cache
_TYPES: Final = dict(zip(CACHE_TYPES, _KINDS, strict=True))
_LARGEST: Final = "f32"


@dataclass(frozen=True, slots=True)
class Estimate(Record):
    """Memory in MiB, rounded up, of all devices together.

    Attributes:
        weights_mib: The model and its draft model.
        context_mib: The caches and states of both.
        compute_mib: The buffers of both.
        extra_mib: `beside_mib`.
    """

    weights_mib: int
    context_mib: int
    compute_mib: int
    extra_mib: int

    @property
    def server_mib(self) -> int:
        """What the server's own figures would be."""
        return self.weights_mib + self.context_mib + self.compute_mib

    @property
    def total_mib(self) -> int:
        return self.server_mib + self.extra_mib


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of one model.

    Attributes:
        size_bytes: Of all its parts.
        shape: None where its header is not on this machine, or cannot be read.
    """

    size_bytes: int
    shape: Hyperparameters | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """What a server would load."""

    model: Weights
    draft: Weights | None = None


def files_of(target: Target) -> Files:
    """Return sizes and headers, in about 0.1 s. What is not there counts as nothing: the server
    refuses it.
    """
    model, resources = target.model, resources_of(target)
    size_bytes = sum(file.size_bytes for file in model.weights) or model.listed_bytes
    draft = resources.draft_path
    return Files(
        Weights(size_bytes, _shape_of(model.weights[0]) if model.weights else None),
        _draft(draft) if draft is not None else None,
    )


def _draft(path: str) -> Weights:
    with contextlib.suppress(OSError):
        file = identity_of(path)
        return Weights(file.size_bytes, _shape_of(file))
    return Weights(0)


def _shape_of(file: FileIdentity) -> Hyperparameters | None:
    with contextlib.suppress(InvalidModel):
        return hyperparameters(file)
    return None


def _size_of(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


def beside_mib(target: Target) -> int:
    """Return what a server needs on the host beside its own figures, which know neither the
    projector nor adapters nor the cache of prompts, in MiB.
    """
    projector, asked = target.model.projector, resources_of(target)
    size_bytes = projector.size_bytes * _PROJECTOR if projector is not None else 0
    adapters_bytes = sum(map(_size_of, asked.adapter_paths))
    return _mib(size_bytes) + _mib(adapters_bytes) + asked.cache_ram_mib


def estimate(target: Target, files: Files) -> Estimate:
    """Return what a server needs for all of the context that it is asked for.

    Args:
        target: What to run, with its effective extra args.
        files: `files_of` it.
    """
    asked, draft = resources_of(target), files.draft
    cells = _cells(asked, files.model.shape.context_length if files.model.shape else 0)
    needs = [_need(files.model, asked, cells, asked.cache_types)]
    if draft is not None:
        needs.append(_need(draft, asked, cells, asked.draft_cache_types))
    weights, context, compute = map(sum, zip(*needs, strict=True))
    return Estimate(_mib(weights), _mib(context), _mib(compute), beside_mib(target))


def _cells(asked: Resources, trained: int) -> int:
    """Return the tokens of each cache. Of an Auto context every one has what the model was trained
    for, whatever their number.
    """
    return _rounded(asked.context // asked.caches if asked.context else trained)


def _need(
    files: Weights, asked: Resources, cells: int, cache_types: tuple[str, str]
) -> tuple[float, float, float]:
    """Return the bytes of weights, context and buffers of one model."""
    if (shape := files.shape) is None:
        return files.size_bytes * _UNREAD, 0, 0
    tokens = min(asked.batch, asked.context or cells * asked.caches)
    window = cells
    if shape.window and not asked.has_full_windows:
        sharers = asked.slots // asked.caches
        window = min(cells, _rounded(shape.window * sharers + tokens))
    weights = files.size_bytes - shape.header_bytes + shape.tied_bytes
    context = _context_bytes(shape, asked, cells, window, cache_types)
    return max(0, weights), context, _compute_bytes(shape, asked, cells, window, tokens)


def _context_bytes(
    shape: Hyperparameters, asked: Resources, cells: int, window: int, cache_types: tuple[str, str]
) -> float:
    if not shape.is_causal:
        return 0
    k_bytes, v_bytes = map(_bytes_of_value, cache_types)
    of_head = shape.key_length * k_bytes + shape.value_length * v_bytes
    heads = cells * shape.kv_heads + window * shape.window_kv_heads
    return asked.caches * heads * of_head + asked.slots * shape.state_values * 4


def _compute_bytes(
    shape: Hyperparameters, asked: Resources, cells: int, window: int, tokens: int
) -> int:
    """Return the bytes of the widest place of a layer, the masks, and the logits of the tokens that
    are outputs.
    """
    seen = cells if shape.is_causal else tokens
    scores = 0 if asked.has_flash_attention else shape.head_count * seen
    widest = max(
        3 * shape.feed_forward_length,
        2 * shape.expert_output,
        2 * shape.head_count * shape.key_length + scores,
        6 * shape.inner_size,
    )
    layer = 4 * tokens * (widest + 7 * shape.embedding_length)
    masks = tokens * (seen + (window if shape.window_kv_heads else 0))
    masks *= 2 if asked.has_flash_attention else 4
    if not shape.is_causal:
        return masks + layer
    if not asked.judged:  # logits of all tokens: wider than a layer, whose place they take
        logits = 4 * tokens * (shape.vocab_size + 7 * shape.embedding_length)
        return masks + max(layer, logits)
    return masks + layer + 4 * min(tokens, asked.slots * asked.judged) * shape.vocab_size


def _bytes_of_value(cache_type: str) -> float:
    values, size_bytes = BLOCKS[_TYPES.get(cache_type.lower(), _TYPES[_LARGEST])]
    return size_bytes / values


def _rounded(cells: int) -> int:
    return max(1, -(-cells // _CELLS)) * _CELLS


def _mib(size_bytes: float) -> int:
    return -int(-size_bytes // _MIB)
