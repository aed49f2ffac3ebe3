"""A cancel token is set once, and calls back once."""

from __future__ import annotations

from orchestrator.base.tokens import CancelReason, CancelToken, Generation


def test_token_keeps_its_first_reason_and_calls_back_once() -> None:
    token, called = CancelToken(Generation(7)), list[str]()
    token.on_set(lambda: called.append("first"))
    token.on_set(lambda: called.append("second"))
    assert (token.generation, token.is_set(), token.reason, called) == (7, False, None, [])
    token.set(CancelReason.DEADLINE)
    token.set(CancelReason.USER)
    assert (token.is_set(), token.reason) == (True, CancelReason.DEADLINE)
    assert called == ["first", "second"]


def test_callback_added_after_the_cancel_runs_at_once() -> None:
    """An effect that begins while its load is being cancelled must not wait for ever."""
    token, called = CancelToken(Generation(1)), list[str]()
    token.set(CancelReason.USER)
    token.on_set(lambda: called.append("late"))
    assert called == ["late"]


def test_callback_may_read_the_token_and_add_a_callback() -> None:
    """It runs outside of the lock, so nothing it does can deadlock."""
    token, called = CancelToken(Generation(1)), list[bool]()
    token.on_set(lambda: token.on_set(lambda: called.append(token.is_set())))
    token.set(CancelReason.SHUTDOWN)
    assert called == [True]
