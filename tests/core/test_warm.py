"""Which loads have their files read ahead, and what of them is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.machine.commands import Kill, Warm
from orchestrator.machine.context import Policy
from orchestrator.server import memory
from orchestrator.server.page_cache import read_ahead
from tests.kit.cached import in_memory, make_cold
from tests.kit.machine.run import A, B, H, K, Run, healthy

WARM = Policy(warms=True)
MIB = 1 << 20


def warmed(run: Run) -> list[tuple[int, str]]:
    return [(c.generation, c.target.request.model_path) for c in run.commands_of(Warm)]


def test_the_next_model_is_read_ahead_from_the_step_that_decides() -> None:
    """Before the kill begins, and while leases hold it up."""
    run = healthy(A, WARM)
    lease = run.lease()
    run.load(B)
    assert (run.state, warmed(run), run.commands_of(Kill)) == (K, [(2, B)], [])
    run.release(lease)
    assert warmed(run) == []
    assert run.settle().model == B


def test_nothing_is_read_ahead_where_no_server_ends() -> None:
    run = Run(WARM)
    run.load(A)
    assert warmed(run) == []
    run = healthy(A, Policy(warms=False))
    run.load(B)
    assert warmed(run) == []


def test_a_load_that_takes_over_is_read_ahead_and_one_that_waits_is_not() -> None:
    run = healthy(A, WARM)
    run.lease()
    run.load("C")
    assert warmed(run) == [(2, "C")]
    run.load(B)
    assert (run.tokens(), warmed(run)) == ([2], [(3, B)])
    run.load("o/D", on_busy="queue")
    assert warmed(run) == []


def test_a_hub_model_is_read_ahead_once_it_is_on_disk() -> None:
    run = healthy(A, WARM)
    run.lease()
    run.load("o/B", prefetch=True)
    run.resolved(2, "o/B")
    assert (run.state, warmed(run)) == (H, [])
    run.fetched_beside(2, "o/B").promote()
    assert (run.state, warmed(run)) == (K, [(2, "o/B")])


# What is read


@pytest.fixture
def cold(tmp_path: Path) -> str:
    """A file of 32 MiB that is not in the page cache."""
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(MIB) * 32)
    make_cold(path)
    return str(path)


def never() -> bool:
    return False


def test_a_cold_file_is_read_and_a_warm_one_is_not(cold: str) -> None:
    assert in_memory(cold) == 0.0
    assert read_ahead([cold], [], never) >= 16 * MIB  # the kernel reads ahead, too
    assert in_memory(cold) == 1.0
    assert read_ahead([cold], [], never) == 0


def test_it_ends_between_two_pieces(cold: str) -> None:
    asked = iter([False, False, True])
    assert read_ahead([cold], [], lambda: next(asked)) <= 16 * MIB
    assert in_memory(cold) < 1.0


@pytest.mark.parametrize("room", [None, 33 * MIB])
def test_what_does_not_fit_is_left_alone(
    cold: str, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    """A margin stays free."""
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    assert read_ahead([cold], [], never) == 0


def test_the_running_model_keeps_its_pages(cold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 40 * MIB)
    assert read_ahead([cold], [os.getpid()], never) == 0
    assert read_ahead([cold], [1 << 22], never) >= 16 * MIB


def test_a_missing_file_is_the_servers_to_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_ahead([str(tmp_path / "none.gguf")], [], never)
