"""The keeper's promises in every order of orders, exits and ends; faulty keepers break them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from orchestrator.server.keeper import Keeper
from orchestrator.server.tree import Door
from tests.kit.process.keeping import Broken, FakeTree, explore


@pytest.mark.parametrize("keep_s", [0.0, 60.0])
def test_a_keeper_keeps_every_promise_in_every_order(keep_s: float) -> None:
    """And no descriptor stays; those of other tests may go meanwhile."""
    before = len(os.listdir("/proc/self/fd"))
    assert explore(keep_s=keep_s) > 300
    assert len(os.listdir("/proc/self/fd")) <= before


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


class KeepsForEver(Keeper):
    def _look(self) -> None:
        if self._clock() >= self.kept_until:
            self.kept_until += 1.0
        super()._look()


class KeepsWhatItKills(Keeper):
    def _begin_kill(self, order: int | None, grace_s: float) -> None:
        memory = self._memory
        super()._begin_kill(order, grace_s)
        self._memory = memory


class LetsAnybodyIn(Keeper):
    def _let_in(self, door: Door) -> None:
        with mock.patch.object(type(self._host), "is_owner", return_value=True):
            super()._let_in(door)


@pytest.mark.parametrize(
    ("keeper", "broken"),
    [
        (KeepsForEver, "kept too long: "),
        (KeepsWhatItKills, "what was being ended is kept: "),
        (LetsAnybodyIn, "a stranger is let in: "),
    ],
)
def test_a_keeper_that_keeps_wrongly_is_found(keeper: Callable[..., Keeper], broken: str) -> None:
    with pytest.raises(Broken) as found:
        explore(keeper, keep_s=60.0)
    assert str(found.value).startswith(broken), found.value


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
