"""Checks of the options of an orchestrator. Each raises InvalidRequest, whose `field` names it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


def server_keys(protect_server: object) -> tuple[str, ...] | None:
    """Return the API keys that servers accept besides their own; None = they need no key."""
    if isinstance(protect_server, bool):
        return () if protect_server else None
    given = (protect_server,) if isinstance(protect_server, str) else protect_server
    keys: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (None,)
    for key in keys:
        is_plain = isinstance(key, str) and key.isascii() and key.isprintable() and "," not in key
        if not is_plain or not key.strip():
            message = "protect_server must be a bool, or API keys of printable ASCII without commas"
            raise InvalidRequest.because(message, field="protect_server")
    return keys
