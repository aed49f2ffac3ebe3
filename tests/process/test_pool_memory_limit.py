"""A pool whose budget is what its control group allows: the kernel never has to kill for memory.

Weights are read without mmap here: mapped pages would make room by themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.process.control_group import MemoryGroup, memory_group

pytestmark = [pytest.mark.external, pytest.mark.timeout(900)]

MIB: Final = 1 << 20
SIZES: Final = [(700, 400), pytest.param((3072, 2048), marks=pytest.mark.deep)]
"""MiB of the group and of each of two models: one fits beside the host, both do not."""

ARGS: Final = ["--load-mode", "none"]
_JOIN: Final = """
import json, os, sys
from pathlib import Path
given = json.loads(sys.argv[1])
Path(given["procs"]).write_text(str(os.getpid()))
"""
_POOL: Final = """
import urllib.request
from orchestrator import ModelPool

def ask(server):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
    body = json.dumps({"prompt": "hi", "n_predict": 4}).encode()
    request = urllib.request.Request(f"{server.base_url}/completion", body, headers)
    return urllib.request.urlopen(request, timeout=60).status

seen = []
with ModelPool(given["catalogue"], **given["options"]) as pool:
    for name in ("a", "b") * 3:
        with pool.lease(name) as server:
            [host] = pool.status().budget
            resident = [one.name for one in pool.status().models if one.state == "Healthy"]
            status = ask(server)
            seen.append([status, resident, host.reserved_mib, host.total_mib])
    evictions = pool._owner.evictions
print(json.dumps({"seen": seen, "evictions": evictions}))
"""
_BOTH: Final = """
from orchestrator import Orchestrator, OrchestratorError

ended, options = [], given["options"]
with Orchestrator(slot="a", **options) as a, Orchestrator(slot="b", **options) as b:
    for orch, entry in zip((a, b), given["catalogue"]["models"].values()):
        try:
            orch.load(entry["model_path"], llama_extra_args=entry["llama_extra_args"])
        except OrchestratorError as error:
            ended.append(error.category)
print(json.dumps(ended))
"""


@pytest.fixture
def models(tmp_path: Path, sizes: tuple[int, int]) -> dict[str, Any]:
    """Return the entries of two models."""
    paths = {
        name: write_tiny_model(tmp_path / f"{name}.gguf", seed=n, padding_bytes=sizes[1] * MIB)
        for n, name in enumerate("ab")
    }
    return {
        name: {"model_path": str(path), "llama_extra_args": ARGS, "max_seq_length": 512}
        for name, path in paths.items()
    }


def run_in(group: MemoryGroup, script: str, **given: Any) -> Any:
    """Run a host in the group, and return what it prints."""
    text = json.dumps({"procs": str(group.procs), **given})
    done = subprocess.run(
        [sys.executable, "-c", _JOIN + script, text], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sizes", SIZES)
def test_one_model_evicts_the_other_and_the_kernel_kills_none(
    sizes: tuple[int, int], models: dict[str, Any], llama_server: str, state_dir: Path
) -> None:
    settings = {"headroom": "32 MiB", "cache_ram_mib": 0, "min_resident_s": 0, "max_wait_s": 1}
    options = {"llama_server": llama_server, "state_dir": str(state_dir)}
    with memory_group(sizes[0] * MIB) as group:
        catalogue = {"pool": settings, "models": models}
        found = run_in(group, _POOL, catalogue=catalogue, options=options)
        assert group.oom_kills == 0
        print(f"\nat most {(group.peak_bytes or 0) // MIB} MiB, page cache included")
    assert [resident for _, resident, *_ in found["seen"]] == [["a"], ["b"]] * 3
    for status, _, reserved_mib, total_mib in found["seen"]:
        assert status == 200
        assert sizes[1] <= reserved_mib <= total_mib < sizes[0]
    assert found["evictions"] == {"room": 5}


@pytest.mark.parametrize("sizes", SIZES)
def test_without_a_pool_the_kernel_kills_a_server(
    sizes: tuple[int, int], models: dict[str, Any], llama_server: str, state_dir: Path
) -> None:
    """The limit is a real one: what the pool prevents does happen."""
    options = {"llama_server": llama_server, "state_dir": str(state_dir)}
    with memory_group(sizes[0] * MIB) as group:
        run_in(group, _BOTH, catalogue={"models": models}, options=options)
        assert group.oom_kills > 0
