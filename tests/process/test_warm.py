"""The next model is read ahead while the running server drains."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import State, Superseded
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.cached import in_memory, make_cold
from tests.kit.process.support import Background, Fake, Make, until


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = write_tiny_model(tmp_path / "cold.gguf", padding_bytes=64 << 20)
    make_cold(path)
    return path


def test_a_model_is_read_while_the_running_server_drains(
    make: Make, fake: Fake, model_a: str, cold: Path
) -> None:
    orch = make()
    orch.load(model_a)
    assert in_memory(cold) < 0.5
    with orch.lease():
        loading = Background(orch.load, str(cold))
        until(lambda: in_memory(cold) == 1.0, "the file in memory")
        until(lambda: orch.progress().fraction == 1.0, "the progress")
        shown = orch.progress()
        assert (orch.status().state, shown.bytes_done) == (State.KILLING, cold.stat().st_size)
        assert len(fake.entries("start")) == 1
    assert loading.result().status == "loaded"


@pytest.mark.parametrize(
    ("warm", "extra_args"), [(False, []), (True, ["--direct-io"])], ids=["off", "direct io"]
)
def test_nothing_is_read_where_it_is_of_no_use(
    make: Make,
    fake: Fake,
    model_a: str,
    cold: Path,
    warm: bool,
    extra_args: list[str],
) -> None:
    """The fake server does not read it."""
    orch = make(warm=warm)
    orch.load(model_a)
    orch.load(str(cold), llama_extra_args=extra_args)
    assert in_memory(cold) < 0.5


def test_a_cancel_does_not_wait_for_what_is_read(
    make: Make, fake: Fake, model_a: str, cold: Path
) -> None:
    orch = make()
    orch.load(model_a)
    with orch.lease():
        loading = Background(orch.load, str(cold))
        until(lambda: orch.status().loading, "the load")
        again = Background(orch.load, model_a)
        assert isinstance(loading.error(), Superseded)
    assert again.result().status in {"loaded", "already_loaded"}
