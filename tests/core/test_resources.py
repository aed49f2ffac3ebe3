"""What a command line asks for that costs memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.settings.resources import Resources, resources_of
from tests.kit.settings import PROJECTOR, local, target

NOTHING = Resources(
    context=0,
    slots=4,
    caches=1,
    batch=512,
    judged=1,
    cache_types=("f16", "f16"),
    draft_cache_types=("f16", "f16"),
    has_full_windows=False,
    has_flash_attention=True,
    cache_ram_mib=0,
    draft_path=None,
    adapter_paths=(),
    devices=None,
    is_on_one_gpu=False,
)


def asked(*args: str, **fields: Any) -> Resources:
    return resources_of(target(llama_extra_args=list(args), **fields))


def test_what_is_not_requested_has_the_servers_defaults() -> None:
    assert asked() == NOTHING
    assert resources_of(target()) == NOTHING


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ("-c 4096", {"context": 4096}),
        ("-c 4096 --ctx-size 512", {"context": 512}),
        ("--ctx_size 4096", {"context": 4096}),
        ("-c nonsense", {}),
        ("-c", {}),
        ("-c -1", {}),
        ("-ub 64", {"batch": 64}),
        ("-ub 4096", {"batch": 2048}),
        ("-ub 0 -b 1024", {"batch": 1024}),
        ("--batch-size 100", {"batch": 100}),
        ("-b 0", {"batch": 1}),
        ("-ctk q8_0", {"cache_types": ("q8_0", "f16")}),
        ("--cache-type-v q4_0", {"cache_types": ("f16", "q4_0")}),
        ("-ctkd q8_0 -ctvd q5_0", {"draft_cache_types": ("q8_0", "q5_0")}),
        ("--swa-full", {"has_full_windows": True}),
        ("-fa off", {"has_flash_attention": False}),
        ("--flash-attn 0", {"has_flash_attention": False}),
        ("-fa off -fa auto", {}),
        ("-no-kvu", {"caches": 4}),
        ("-no-kvu --kv-unified", {}),
        ("-cram 100", {"cache_ram_mib": 100}),
        ("--cache-ram 0", {"cache_ram_mib": 0}),
        ("-cram -1", {"cache_ram_mib": 8192}),
        ("-md a.gguf", {"draft_path": "a.gguf", "judged": 4}),
        ("--spec-draft-model a.gguf --spec-draft-n-max 8", {"draft_path": "a.gguf", "judged": 9}),
        ("--spec-default", {"judged": 65}),
        ("--spec-type ngram-mod --spec-ngram-mod-n-max 16", {"judged": 17}),
        ("--spec-type none", {}),
        ("--lora a,b --lora-scaled c:0.5,d:e:2", {"adapter_paths": ("a", "b", "c", "d:e")}),
        ("--lora", {}),
        ("-ngl 0", {"devices": ()}),
        ("-ngl 99", {}),
        ("--n-gpu-layers 99 --gpu-layers 0", {"devices": ()}),
        ("--device none", {"devices": ()}),
        ("-dev CUDA0,CUDA2", {"devices": ("CUDA0", "CUDA2")}),
        ("-sm none", {"is_on_one_gpu": True}),
        ("--split-mode row", {}),
    ],
)
def test_extra_args_are_read_as_the_server_reads_them(args: str, changed: dict[str, Any]) -> None:
    """The last of several wins; what it would refuse counts as missing."""
    assert asked(*args.split()) == replace(NOTHING, **changed)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"max_seq_length": 4096}, {"context": 4096}),
        ({"n_parallel": 1}, {"slots": 1}),
        ({"n_parallel": 8}, {"slots": 8, "caches": 8}),
        ({"cache_type_kv": "q8_0"}, {"cache_types": ("q8_0", "q8_0")}),
        ({"cache_ram_mib": 7}, {"cache_ram_mib": 7}),
        ({"cache_ram_mib": 0}, {"cache_ram_mib": 0}),
        ({"kind": "embedding"}, {"cache_ram_mib": 0, "judged": 0}),
        ({"kind": "rerank", "cache_ram_mib": 7}, {"cache_ram_mib": 7, "judged": 0}),
        ({"speculative_type": "ngram-mod"}, {"judged": 65}),
        (
            {"speculative_type": "ngram-mod", "model": local(projector=PROJECTOR)},
            {},  # it cannot draft
        ),
    ],
)
def test_fields_are_read(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    assert asked(**fields) == replace(NOTHING, **changed)


def test_extra_args_win_over_fields() -> None:
    args = ["-c", "512", "-ctk", "q4_0", "-cram", "5", "-kvu"]
    found = asked(*args, max_seq_length=4096, cache_type_kv="q8_0", cache_ram_mib=9, n_parallel=2)
    expected: dict[str, Any] = {
        "context": 512,
        "slots": 2,
        "cache_types": ("q4_0", "q8_0"),
        "cache_ram_mib": 5,
    }
    assert found == replace(NOTHING, **expected)
