"""Pure decisions: the kill ladder, the probe's interval, settings in seconds, redaction, output."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.redaction import redact
from orchestrator.errors import InvalidRequest
from orchestrator.server.ladder import (
    FIRST_PROBE_S,
    LONGEST_PROBE_S,
    TERM_AGAIN_S,
    SignalAt,
    gone_within_s,
    kill_plan,
    next_probe_s,
)
from orchestrator.server.output import MAX_LINES, OutputRing
from orchestrator.settings.checks import MAX_SECONDS, checked_seconds

SECONDS = st.floats(min_value=0.001, max_value=1e6, allow_nan=False)


def test_no_grace_means_sigkill_at_once() -> None:
    assert kill_plan(0, now=5.0) == (SignalAt(5.0, signal.SIGKILL),)


@given(SECONDS, st.floats(min_value=0, max_value=1e9))
def test_ladder_is_term_then_term_again_then_kill(grace_s: float, now: float) -> None:
    """An active stream makes the real server ignore the first SIGTERM; SIGKILL is the last."""
    rungs = kill_plan(grace_s, now=now)
    assert [rung.signum for rung in rungs] == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
    assert rungs[0].at_s == now
    assert rungs[0].at_s <= rungs[1].at_s <= rungs[2].at_s == now + grace_s


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf")])
def test_senseless_grace_is_refused(grace_s: float) -> None:
    with pytest.raises(ValueError, match="grace_s"):
        kill_plan(grace_s, now=0.0)


def test_the_second_term_comes_soon_but_never_after_half_of_the_grace() -> None:
    """A short grace is split; a long one is not waited for before the second try."""
    assert [rung.at_s for rung in kill_plan(0.1, now=5.0)] == [5.0, 5.05, 5.1]
    assert [rung.at_s for rung in kill_plan(10.0, now=5.0)] == [5.0, 5.0 + TERM_AGAIN_S, 15.0]


def test_a_server_of_eighty_gib_has_a_quarter_of_a_second_more_for_each() -> None:
    """Nor is one given up on an hour late."""
    assert gone_within_s(0) == 5.0
    assert gone_within_s(80 << 30) == 25.0


@given(st.integers(min_value=0, max_value=1 << 50))
def test_time_to_be_gone_grows_with_memory(resident_bytes: int) -> None:
    """About 0.064 s a GiB were measured; an 86 GB server must not be given up on too early."""
    assert gone_within_s(resident_bytes) >= 5.0 + 0.064 * resident_bytes / (1 << 30)


def test_probe_interval_starts_small_and_never_exceeds_its_bound() -> None:
    interval = next_probe_s(None)
    assert interval == FIRST_PROBE_S <= 0.002
    for _ in range(100):
        longer = next_probe_s(interval)
        assert interval <= longer <= LONGEST_PROBE_S == 0.25
        interval = longer
    assert interval == LONGEST_PROBE_S


@pytest.mark.parametrize("value", [0, 0.5, 1, MAX_SECONDS])
def test_a_setting_in_seconds_may_be_anything_a_clock_can_wait(value: float) -> None:
    """A month is enough for everybody; beyond that timers overflow."""
    seconds = checked_seconds("kill_grace_s", value)
    assert (seconds, type(seconds)) == (value, float)
    if value:
        assert checked_seconds("idle_ttl_s", value, zero=False) == value


@pytest.mark.parametrize(
    ("value", "zero", "least"),
    [(0, False, "more than 0"), (-1, True, "0"), (MAX_SECONDS + 1, True, "0"), (None, True, "0")],
)
def test_a_setting_that_is_no_time_is_told_what_would_be(
    value: object, zero: bool, least: str
) -> None:
    """Zero means at once where that makes sense, and nowhere else."""
    with pytest.raises(InvalidRequest) as raised:
        checked_seconds("idle_ttl_s", value, zero=zero)
    sentence = f"idle_ttl_s is no time to wait: use {least} to {MAX_SECONDS:.0f} seconds"
    assert (raised.value.message, raised.value.field) == (sentence, "idle_ttl_s")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", None, True])
def test_setting_in_seconds_names_its_field(value: object) -> None:
    with pytest.raises(InvalidRequest) as raised:
        checked_seconds("kill_grace_s", value)
    assert raised.value.field == "kill_grace_s"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_AbCdEfGhIjKlMn here", "AbCdEfGhIjKlMn"),
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("using --api-key s3cr3tvalue now", "s3cr3tvalue"),
        ("proxy http://user:hunter22@host:80/", "hunter22"),
        ("HF_TOKEN=abcdefgh", "abcdefgh"),
        ("MY_API_KEY='abcdefgh'", "abcdefgh"),
        ("sk-abcdefghijklmnop", "abcdefghijklmnop"),
    ],
)
def test_secret_in_the_output_is_blanked(text: str, secret: str) -> None:
    """The log tail travels in errors, status and HTTP answers."""
    ring = OutputRing()
    ring.feed(text.encode() + b"\n")
    assert secret not in ring.tail()[0]
    assert "[redacted]" in ring.tail()[0]


@given(st.text())
def test_redaction_is_idempotent(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_in_any_pieces_become_clean_lines(pieces: list[bytes]) -> None:
    """A server may print anything; what we keep has no control characters."""
    ring = OutputRing()
    for piece in pieces:
        ring.feed(piece)
    ring.close()
    assert ring.bytes_seen == sum(map(len, pieces))
    for line in ring.tail(MAX_LINES):
        assert not any(ord(c) < 32 and c != "\t" for c in line)


def test_ring_keeps_the_last_lines_and_bounds_the_longest() -> None:
    """The head of a log explains nothing; a line without end must not eat the memory."""
    ring = OutputRing()
    ring.feed(b"".join(b"line %d\n" % n for n in range(3 * MAX_LINES)))
    assert ring.tail(1) == (f"line {3 * MAX_LINES - 1}",)
    assert len(ring.tail(10 * MAX_LINES)) == MAX_LINES
    for _ in range(64):
        ring.feed(b"x" * 65536)
    ring.feed(b"\n")
    assert len(ring.tail(1)[0]) <= 8192


def test_address_is_read_from_a_line_in_pieces() -> None:
    ring = OutputRing()
    for piece in (b"0.1 I srv  llama_server: listen", b"ing on http://127.0.0.1:43", b"210\n"):
        assert ring.announced == ()
        ring.feed(piece)
    assert ring.announced == ("http://127.0.0.1:43210",)
