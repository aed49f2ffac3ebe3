"""What a real llama-server takes of memory: as it says itself, and as we report it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from orchestrator import LoadOutcome, Orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.settings.memory import Memory
from tests.kit.sparse_model import transformer

pytestmark = pytest.mark.external

REQUESTS: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "short": {"max_seq_length": 1024},
    "long": {"max_seq_length": 32768},
    "one slot": {"n_parallel": 1},
    "slots of their own": {"n_parallel": 3, "max_seq_length": 3000},
    "whole slots of their own": {"n_parallel": 4},
    "unified slots": {"n_parallel": 6, "llama_extra_args": ["-kvu"]},
    "by flag": {"max_seq_length": 512, "llama_extra_args": ["-c", "16384"]},
    "q8_0": {"cache_type_kv": "q8_0", "max_seq_length": 8192},
    "f32": {"cache_type_kv": "f32", "n_parallel": 2, "max_seq_length": 8192},
    "two types": {"llama_extra_args": ["-ctk", "q8_0", "--cache-type-v", "q5_1"]},
    "wide": {"llama_extra_args": ["-ub", "1024"]},
    "narrow": {"llama_extra_args": ["-ub", "64", "-b", "256"]},
    "no flash attention": {"llama_extra_args": ["-fa", "off"], "max_seq_length": 4096},
    "n-grams": {"speculative_type": "ngram-mod", "max_seq_length": 4096},
    "embedding": {"kind": "embedding", "max_seq_length": 2048},
}


@pytest.fixture
def orch(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Not of a type that the CPU repacks: its file is mapped, and at the exit counted, as well."""
    return str(transformer(tmp_path_factory.mktemp("model") / "small.gguf", kind="Q8_0"))


def memory_of(outcome: LoadOutcome) -> Memory:
    assert outcome.memory is not None
    return outcome.memory


def printed(orch: Orchestrator) -> list[int]:
    """Return the server's own figures in MiB, in order; the last one is printed at its exit."""
    lines = "\n".join(orch.logs(2000))
    return [int(mib) for mib in re.findall(r"^memory, MiB: Host (\d+)$", lines, re.MULTILINE)]


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS.keys())
def test_memory_is_what_the_server_says_at_its_exit(
    orch: Orchestrator, model: str, fields: dict[str, Any]
) -> None:
    """Within 1 MiB; and the next plan knows it before anything is started."""
    before = orch.plan(model, **fields)
    assert before.memory is not None
    assert before.memory.source == "estimate"
    memory = memory_of(orch.load(model, **fields))
    loaded = orch.status().loaded
    assert loaded is not None
    assert loaded.memory == memory
    assert (memory.source, memory.fitted) == ("exact", False)
    assert orch.plan(model, **fields).action == "none"
    orch.unload()
    assert memory.server_mib is not None
    assert abs(memory.server_mib - printed(orch)[-1]) <= 1
    assert memory.devices == {"Host": memory.mib}
    after = orch.plan(model, **fields)
    assert after.memory == memory
    assert after.fits
    assert abs(before.memory.mib - memory.mib) <= max(32, memory.mib // 10)


def test_draft_model_is_counted(orch: Orchestrator, model: str, tmp_path: Path) -> None:
    """It prints a figure of its own, and only at its start."""
    draft = write_tiny_model(tmp_path / "draft.gguf", seed=3)
    args = ["-md", str(draft)]
    memory = memory_of(orch.load(model, llama_extra_args=args, max_seq_length=2048))
    first, second, *_ = printed(orch)
    assert second > 0
    assert memory.server_mib == first + second


def test_draft_model_is_counted_where_each_slot_has_its_context(
    orch: Orchestrator, model: str, tmp_path: Path
) -> None:
    """What all slots want is printed in between."""
    draft = write_tiny_model(tmp_path / "draft.gguf", seed=3)
    memory = memory_of(orch.load(model, llama_extra_args=["-md", str(draft)], n_parallel=4))
    one, all_, second, *_ = printed(orch)
    assert one < all_
    assert memory.server_mib == all_ + second
    assert not memory.fitted


def test_draft_model_of_the_same_file_is_counted(orch: Orchestrator, model: str) -> None:
    memory = memory_of(orch.load(model, llama_extra_args=["-md", model], max_seq_length=2048))
    assert memory.server_mib == 2 * printed(orch)[0]
    assert not memory.fitted


def test_projector_and_prompt_cache_are_added(orch: Orchestrator, model: str) -> None:
    """The server's own figure has neither."""
    memory = memory_of(orch.load(model, max_seq_length=1024, cache_ram_mib=300))
    assert memory.server_mib == printed(orch)[0]
    assert memory.mib == memory.server_mib + 300
    by_flag = memory_of(orch.load(model, max_seq_length=1024, llama_extra_args=["-cram", "200"]))
    assert by_flag.server_mib is not None
    assert by_flag.mib == by_flag.server_mib + 200


def test_context_that_the_server_reduces_is_what_is_counted(orch: Orchestrator, model: str) -> None:
    """The figures before it reads a weight are those of its trials."""
    full = memory_of(orch.load(model))
    orch.unload()
    total_mib = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    assert full.server_mib is not None
    target = str(total_mib - full.server_mib + 20)
    outcome = orch.load(model, llama_extra_args=["--fit-target", target, "--fit-ctx", "1024"])
    memory = memory_of(outcome)
    assert memory.fitted
    orch.unload()
    first, least, taken = printed(orch)
    assert least < taken < first
    assert memory.server_mib is not None
    assert abs(memory.server_mib - taken) <= 1


def test_figure_is_forgotten_when_a_file_changes(
    orch: Orchestrator, model: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(Path(model).read_bytes())
    orch.load(str(mine), max_seq_length=1024)
    orch.unload()
    known = orch.plan(str(mine), max_seq_length=1024).memory
    assert known is not None
    assert known.source == "exact"
    mine.write_bytes(Path(model).read_bytes())
    again = orch.plan(str(mine), max_seq_length=1024).memory
    assert again is not None
    assert again.source == "estimate"


def test_binary_without_the_json_log_is_estimated(
    llama_server: str, model: str, state_dir: Path, tmp_path: Path
) -> None:
    """An older build works as before."""
    old = tmp_path / "old-server"
    server = shlex.quote(llama_server)
    older_help = f'[ "$1" = --help ] && {{ {server} --help | grep -v log-jsonl; exit; }}'
    old.write_text(f'#!/bin/sh\n{older_help}\nexec {server} "$@"\n')
    old.chmod(0o755)
    with Orchestrator(llama_server=str(old), state_dir=state_dir) as orch:
        outcome = orch.load(model, max_seq_length=1024)
        plan = orch.plan(model, max_seq_length=2048)
        assert memory_of(outcome).source == "estimate"
        assert memory_of(outcome).server_mib is None
        assert not printed(orch)
        assert any("model loaded" in line for line in orch.logs())
    assert plan.memory is not None
    assert plan.memory.mib > memory_of(outcome).mib


def test_embedded_server_is_estimated(model: str, state_dir: Path) -> None:
    """It prints no figures."""
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        assert memory_of(orch.load(model, max_seq_length=1024)).source == "estimate"


def test_adopted_server_has_the_figure_it_printed_for_another(
    llama_server: str, model: str, state_dir: Path
) -> None:
    def owner() -> Orchestrator:
        return Orchestrator(llama_server=llama_server, state_dir=state_dir, on_host_exit="keep")

    with owner() as first:
        memory = memory_of(first.load(model, max_seq_length=1024))
    with owner() as second:
        loaded = second.status().loaded
        assert loaded is not None
        assert loaded.adopted
        assert loaded.memory == memory
        second.close(keep=False)


def test_what_cannot_fit_is_known_beforehand(
    orch: Orchestrator, model: str, tmp_path: Path
) -> None:
    """With what is free; a context that is Auto may be made smaller."""
    plan = orch.plan(model, max_seq_length=1 << 30)
    assert plan.memory is not None
    assert plan.free is not None
    assert plan.memory.devices["Host"] > plan.free["Host"]
    assert plan.fits is False
    assert orch.plan(model).fits is True


def test_context_of_slots_of_their_own_is_reduced_for_each(orch: Orchestrator, model: str) -> None:
    full = memory_of(orch.load(model, n_parallel=4))
    orch.unload()
    total_mib = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    assert full.server_mib is not None
    args = ["--fit-target", str(total_mib - full.server_mib + 60), "--fit-ctx", "1024"]
    memory = memory_of(orch.load(model, llama_extra_args=args, n_parallel=4))
    orch.unload()
    assert memory.fitted
    assert memory.server_mib is not None
    assert abs(memory.server_mib - printed(orch)[-1]) <= 1
