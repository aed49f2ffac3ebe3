"""Checks of the options of an orchestrator. Each raises InvalidRequest, whose `field` names it."""

from __future__ import annotations

from orchestrator.errors import InvalidRequest
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.settings.checks import checked_seconds


def check_choice(field: str, value: object, *choices: str) -> None:
    if value not in choices:
        message = f"{field} is {value!r}: use {' or '.join(choices)}"
        raise InvalidRequest.because(message, field=field)


def restart_policy(restart: object) -> RestartPolicy | None:
    """Return the policy that the option `restart` means; None = no restarts."""
    if restart == "never":
        return None
    policy = RestartPolicy() if restart == "on-crash" else restart
    if not isinstance(policy, RestartPolicy):
        message = f"restart is {restart!r}: use never, on-crash or a RestartPolicy"
        raise InvalidRequest.because(message, field="restart")
    for name in ("backoff_s", "backoff_max_s", "cool_down_s", "stable_after_s"):
        checked_seconds(f"restart.{name}", policy[name])
    if not isinstance(policy.limit, int) or isinstance(policy.limit, bool) or policy.limit < 1:
        message = f"restart.limit is {policy.limit!r}: it must be an integer of at least 1"
        raise InvalidRequest.because(message, field="restart.limit")
    return policy


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number of at least 1; `field` names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        message = f"{name} is {value!r}: use a whole number of at least 1"
        raise InvalidRequest.because(message, field=name)


def check_switch(name: str, value: object) -> None:
    """Refuse what is not a bool; `field` names it."""
    if not isinstance(value, bool):
        raise InvalidRequest.because(f"{name} is {value!r}: use True or False", field=name)
