"""A cancel token: one load's, set once, and whoever waits is woken once."""

from __future__ import annotations

from orchestrator.base.tokens import CancelReason, CancelToken, Generation


def test_a_token_keeps_its_first_reason_and_wakes_everybody_once() -> None:
    """Who cancelled is told; a second reason would make two stories of one load."""
    token, woken = CancelToken(Generation(7)), list[str]()
    token.on_set(lambda: woken.append("first"))
    token.on_set(lambda: woken.append("second"))
    assert (token.generation, token.is_set(), token.reason, woken) == (7, False, None, [])
    assert repr(token) == "CancelToken(generation=7, unset)"
    token.set(CancelReason.DEADLINE)
    token.set(CancelReason.USER)
    assert (token.is_set(), token.reason) == (True, CancelReason.DEADLINE)
    assert woken == ["first", "second"]
    assert repr(token) == "CancelToken(generation=7, deadline)"


def test_who_comes_after_the_cancel_is_woken_at_once() -> None:
    """An effect that begins while its load is being cancelled must not wait for ever."""
    token, woken = CancelToken(Generation(1)), list[str]()
    token.set(CancelReason.USER)
    token.on_set(lambda: woken.append("late"))
    assert woken == ["late"]


def test_a_callback_may_look_at_the_token_and_add_another() -> None:
    """It runs outside of the guard: nothing it does with the token can lock up."""
    token, woken = CancelToken(Generation(1)), list[bool]()
    token.on_set(lambda: token.on_set(lambda: woken.append(token.is_set())))
    token.set(CancelReason.SHUTDOWN)
    assert woken == [True]
