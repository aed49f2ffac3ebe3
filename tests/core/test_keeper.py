"""The keeper's promises in every order of orders, exits and ends; faulty keepers break them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.server.keeper import Keeper
from tests.kit.process.keeping import Broken, FakeTree, explore


def test_a_keeper_keeps_every_promise_in_every_order() -> None:
    """And no descriptor."""
    before = os.listdir("/proc/self/fd")
    assert explore() > 300
    assert os.listdir("/proc/self/fd") == before


class EmptyTooEarly(FakeTree):
    def is_empty(self) -> bool:
        return not self.is_running


class LosesAnExit(Keeper):
    def _tell_exit(self) -> None:
        if self.kill is None:
            super()._tell_exit()


class TellsTwice(Keeper):
    def _tell_exit(self) -> None:
        before = self._untold
        super()._tell_exit()
        self._untold = before


class EndsWithItsSocket(Keeper):
    def _look(self) -> None:
        super()._look()
        self.is_done |= self.channel is None


class NeverGivesUp(Keeper):
    def _end(self, kill: Any, **answer: Any) -> None:
        if answer["is_empty"]:
            super()._end(kill, **answer)


class LetsAHostDie(Keeper):
    def _inherit(self) -> None:
        pass


@pytest.mark.parametrize(
    ("keeper", "tree", "broken"),
    [
        (Keeper, EmptyTooEarly, "it has left something: spawn, close, daemon, exit"),
        (LosesAnExit, FakeTree, "a lost exit: "),
        (TellsTwice, FakeTree, "an exit that is told twice: "),
        (EndsWithItsSocket, FakeTree, "it has left something: spawn, close"),
        (NeverGivesUp, FakeTree, "a kill without an end: "),
        (LetsAHostDie, FakeTree, "a dead host's server goes on: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_faulty_keeper_is_found(
    keeper: Callable[..., Keeper], tree: Callable[[], FakeTree], broken: str
) -> None:
    with pytest.raises(Broken) as found:
        explore(keeper, tree)
    assert str(found.value).startswith(broken), found.value
