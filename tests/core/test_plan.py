"""The kill ladder, the interval of the probe, and settings in seconds."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.server.ladder import KILL, TERM_AGAIN_S, SignalAt, gone_within_s, kill_plan
from orchestrator.server.readiness import FIRST_PROBE_S, LONGEST_PROBE_S, next_probe_s
from orchestrator.settings.checks import MAX_SECONDS, checked_seconds

SECONDS = st.floats(min_value=0.001, max_value=1e6, allow_nan=False)


def test_no_grace_means_sigkill_at_once() -> None:
    assert kill_plan(0, now=5.0) == (SignalAt(5.0, KILL),)


@given(SECONDS, st.floats(min_value=0, max_value=1e9))
def test_ladder_is_sigterm_twice_then_sigkill(grace_s: float, now: float) -> None:
    """With an active stream the real server ignores the first SIGTERM."""
    rungs = kill_plan(grace_s, now=now)
    assert [rung.signum for rung in rungs] == [signal.SIGTERM, signal.SIGTERM, KILL]
    assert rungs[0].at_s == now
    assert rungs[0].at_s <= rungs[1].at_s <= rungs[2].at_s == now + grace_s


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf")])
def test_invalid_grace_is_refused(grace_s: float) -> None:
    with pytest.raises(ValueError, match="grace_s"):
        kill_plan(grace_s, now=0.0)


def test_second_sigterm_comes_soon_and_at_half_of_a_short_grace() -> None:
    assert [rung.at_s for rung in kill_plan(0.1, now=5.0)] == [5.0, 5.05, 5.1]
    assert [rung.at_s for rung in kill_plan(10.0, now=5.0)] == [5.0, 5.0 + TERM_AGAIN_S, 15.0]


def test_kill_timeout_grows_by_a_quarter_of_a_second_per_gib() -> None:
    assert gone_within_s(0) == 5.0
    assert gone_within_s(80 << 30) == 25.0


@given(st.integers(min_value=0, max_value=1 << 50))
def test_kill_timeout_exceeds_the_measured_time(resident_bytes: int) -> None:
    """About 0.064 s per GiB were measured."""
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
def test_setting_in_seconds_may_be_up_to_a_month(value: float) -> None:
    """Beyond that, timers overflow."""
    seconds = checked_seconds("kill_grace_s", value)
    assert (seconds, type(seconds)) == (value, float)
    if value:
        assert checked_seconds("idle_ttl_s", value, zero=False) == value


@pytest.mark.parametrize(
    ("value", "zero", "least"),
    [
        (0, False, "more than 0"),
        (-1, True, "at least 0"),
        (MAX_SECONDS + 1, True, "at least 0"),
        (None, True, "at least 0"),
    ],
)
def test_invalid_setting_in_seconds_names_the_valid_range(
    value: object, zero: bool, least: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        checked_seconds("idle_ttl_s", value, zero=zero)
    assert raised.value.field == "idle_ttl_s"
    assert f" must be {least} and at most {MAX_SECONDS:.0f} seconds" in raised.value.message


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", None, True])
def test_invalid_setting_in_seconds_names_its_field(value: object) -> None:
    with pytest.raises(InvalidRequest) as raised:
        checked_seconds("kill_grace_s", value)
    assert raised.value.field == "kill_grace_s"
