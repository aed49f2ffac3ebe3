"""What a command line asks for that costs memory: by its fields, or by extra args, which win.

A value that is no number counts as missing: the server refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from orchestrator.settings.drafting import OFF
from orchestrator.settings.flags import flag_of, value_of
from orchestrator.settings.target import Target

_SLOTS: Final = 4  # where the number is the server's choice; they share one cache
_BATCH: Final = 2048
_UBATCH: Final = 512
_DRAFTED: Final = 3
_DRAFTED_NGRAM: Final = 64
_CACHE_RAM_MIB: Final = 8192  # the server's default for chat, which no limit (-1) counts as
_UNIFIED: Final = {
    **dict.fromkeys(("-kvu", "--kv-unified"), True),
    **dict.fromkeys(("-no-kvu", "--no-kv-unified"), False),
}
_OFF: Final = frozenset({"off", "disabled", "false", "0"})


@dataclass(frozen=True, slots=True)
class Resources:
    """Numbers are llama-server's defaults where nothing is requested.

    Attributes:
        context: Tokens of all slots together; 0 = Auto.
        slots: Requests at the same time.
        caches: 1 where the slots share one, else one for each slot.
        batch: The most tokens computed at once.
        judged: Tokens of each slot whose logits are computed at once; 0 = those of all.
        cache_types: Of keys and of values.
        draft_cache_types: The same of the draft model.
        has_full_windows: Whether layers with a window have the cache of the others.
        has_flash_attention: Without it the scores of all pairs of tokens are stored.
        cache_ram_mib: Of prompts that wait on the host.
        draft_path: The draft model's file.
        adapter_paths: LoRA files.
        devices: The GPUs to use; None = all, () = none.
        is_on_one_gpu: Whether the model is on the first of these only.
    """

    context: int
    slots: int
    caches: int
    batch: int
    judged: int
    cache_types: tuple[str, str]
    draft_cache_types: tuple[str, str]
    has_full_windows: bool
    has_flash_attention: bool
    cache_ram_mib: int
    draft_path: str | None
    adapter_paths: tuple[str, ...]
    devices: tuple[str, ...] | None
    is_on_one_gpu: bool


def resources_of(target: Target) -> Resources:
    """Return what the server of a target would use."""
    request, args = target.request, target.extra_args
    slots = request.n_parallel or _SLOTS
    unified = [_UNIFIED[flag] for flag in map(flag_of, args) if flag in _UNIFIED]
    is_unified = unified[-1] if unified else request.n_parallel is None
    kv = request.cache_type_kv or "f16"
    batch = _number(value_of(args, "-b", "--batch-size"), _BATCH)
    ubatch = _number(value_of(args, "-ub", "--ubatch-size"), _UBATCH) or batch
    drafted = _drafted(args, target.effective_speculative_type)
    return Resources(
        context=max(0, _number(value_of(args, "-c", "--ctx-size"), request.max_seq_length)),
        slots=slots,
        caches=1 if is_unified else slots,
        batch=max(1, min(batch, ubatch)),
        judged=1 + drafted if request.kind == "chat" else 0,
        cache_types=(
            value_of(args, "-ctk", "--cache-type-k") or kv,
            value_of(args, "-ctv", "--cache-type-v") or kv,
        ),
        draft_cache_types=(
            value_of(args, "-ctkd", "--cache-type-k-draft", "--spec-draft-type-k") or "f16",
            value_of(args, "-ctvd", "--cache-type-v-draft", "--spec-draft-type-v") or "f16",
        ),
        has_full_windows="--swa-full" in map(flag_of, args),
        has_flash_attention=value_of(args, "-fa", "--flash-attn") not in _OFF,
        cache_ram_mib=_cache_ram_mib(target),
        draft_path=value_of(args, "-md", "--model-draft", "--spec-draft-model"),
        adapter_paths=tuple(_adapters(args)),
        devices=_devices(args),
        is_on_one_gpu=value_of(args, "-sm", "--split-mode") == "none",
    )


def _drafted(args: tuple[str, ...], mode: str) -> int:
    if mode == OFF:
        return 0
    if "ngram" in mode or "default" in mode:
        return max(0, _number(value_of(args, "--spec-ngram-mod-n-max"), _DRAFTED_NGRAM))
    return max(0, _number(value_of(args, "--spec-draft-n-max"), _DRAFTED))


def _cache_ram_mib(target: Target) -> int:
    """Only what is asked for is counted: a server's own default is seldom filled."""
    requested = target.request.effective("cache_ram_mib") or 0
    value = _number(value_of(target.extra_args, "-cram", "--cache-ram"), requested)
    return value if value >= 0 else _CACHE_RAM_MIB


def _adapters(args: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of every such flag: they add up."""
    for token, value in pairwise(args):
        flag = flag_of(token)
        if flag == "--lora":
            yield from value.split(",")
        elif flag == "--lora-scaled":
            yield from (part.rpartition(":")[0] for part in value.split(","))


def _devices(args: tuple[str, ...]) -> tuple[str, ...] | None:
    layers = value_of(args, "-ngl", "--gpu-layers", "--n-gpu-layers")
    names = value_of(args, "-dev", "--device")
    if layers == "0" or names == "none":
        return ()
    return tuple(names.split(",")) if names else None


def _number(text: str | None, default: int) -> int:
    with contextlib.suppress(ValueError):
        return default if text is None else int(text)
    return default
