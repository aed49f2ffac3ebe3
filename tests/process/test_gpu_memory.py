"""A server starts when the GPU has taken back what its predecessor held; the tool is a double."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import Cancelled, State
from tests.kit.process.support import Background, Fake, Make, until

Tool = Callable[[str], Path]

# The double says the lines of a file one after the other, and the last one from then on.
SAYS = """
n=$(wc -l < "$0.asked")
echo >> "$0.asked"
sed -n "$((n + 1))p;\\$p" "$0.says" | head -1
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Put a double of `nvidia-smi` into the PATH; it runs this shell script."""

    def install(script: str) -> Path:
        path = tmp_path / "tools" / "nvidia-smi"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        path.with_name("nvidia-smi.asked").touch()
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return path.with_name("nvidia-smi.asked")

    return install


def asked(journal: Path) -> int:
    return len(journal.read_text().splitlines())


def test_a_server_starts_after_two_equal_answers(
    make: Make, fake: Fake, tool: Tool, model_a: str, model_b: str
) -> None:
    journal = tool(SAYS)
    journal.with_name("nvidia-smi.says").write_text("9000\n700\n30\n30\n1\n")
    orch = make()
    orch.load(model_a)
    assert asked(journal) == 0  # nothing has ended
    orch.load(model_b)
    assert asked(journal) == 4


@pytest.mark.parametrize(
    "script",
    ['date +%N; echo >> "$0.asked"', 'echo >> "$0.asked"; exec sleep 600'],
    ids=["never the same", "never an answer"],
)
def test_a_server_starts_after_two_seconds_in_any_case(
    make: Make, tool: Tool, model_a: str, model_b: str, script: str
) -> None:
    journal = tool(script)
    orch = make()
    orch.load(model_a)
    begun = time.monotonic()
    assert orch.load(model_b).status == "loaded"
    assert asked(journal) >= 1
    assert 1.5 < time.monotonic() - begun < 10


def test_a_tool_that_fails_is_asked_once(
    make: Make, tool: Tool, model_a: str, model_b: str
) -> None:
    journal = tool('echo >> "$0.asked"; exit 9')
    orch = make()
    orch.load(model_a)
    orch.load(model_b)
    assert asked(journal) == 1


def test_a_cancel_does_not_wait_for_the_gpu(
    make: Make, fake: Fake, tool: Tool, model_a: str, model_b: str
) -> None:
    journal = tool('echo >> "$0.asked"; exec sleep 600')
    orch = make()
    orch.load(model_a)
    loading = Background(orch.load, model_b)
    until(lambda: asked(journal), "the question")
    begun = time.monotonic()
    assert orch.cancel(generation=2)
    assert time.monotonic() - begun < 1.0
    assert isinstance(loading.error(), Cancelled)
    assert orch.status().state is State.IDLE
    assert len(fake.entries("start")) == 1
