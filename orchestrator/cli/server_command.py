"""A command line of llama-server as the fields of a load request.

The rows of `settings/fields.py` and `settings/flags.py` know which flags are fields and which are
refused; all others become `llama_extra_args`, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final

from orchestrator.cli.macros import PORT
from orchestrator.errors import OrchestratorError, RefusedArgument
from orchestrator.settings.fields import REFUSED, SETTINGS, check_extra_args, type_of
from orchestrator.settings.flags import flag_of

_CONTAINERS: Final = {"docker", "podman", "nerdctl"}
_SHELLS: Final = {"sh", "bash", "zsh", "dash"}
_USE: Final = re.compile(r"use the field (\w+) instead")


def _fields() -> Iterator[tuple[str, str]]:
    for reason, flags in REFUSED.items():
        if named := _USE.match(reason):
            yield from ((flag, named[1]) for flag in flags.split())
    for name, row in SETTINGS.items():
        if row.argv:
            yield from ((flag, name) for flag in row.shadowed.split())


_FIELDS: Final = dict(_fields())
"""Fields, by every flag that means one."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """What a command line says.

    Attributes:
        program: The server's binary.
        wrapper: What stands before it.
        fields: Of a load request, with `llama_extra_args`.
        left_out: Why a flag is not in them.
    """

    program: str
    wrapper: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read_command(words: Sequence[str]) -> ServerCommand | None:
    """Return what a command line says, None if it starts no llama-server on this machine."""
    names = [PurePath(word).name for word in words]
    if not names or names[0] in _CONTAINERS | _SHELLS:
        return None
    at = next((at for at, name in enumerate(names) if "llama-server" in name), None)
    if at is None:
        return None
    read = ServerCommand(words[at], tuple(words[:at]))
    given, args = _split(words[at + 1 :], read.left_out)
    for name, values in given.items():
        _set(read, args, name, values)
    if args:
        read.fields["llama_extra_args"] = args
    return read


_Given = dict[str, list[tuple[str, str]]]
"""Flags and their values, by field."""


def _split(words: Sequence[str], left_out: list[str]) -> tuple[_Given, list[str]]:
    given: _Given = {}
    args: list[str] = []
    tokens = list(words)
    while tokens:
        token = tokens.pop(0)
        flag = flag_of(token)
        name, why = (None, None) if flag is None else (_FIELDS.get(flag), _refusal(token))
        if flag is None or (name is None and why is None):
            args.append(token)
            continue
        value = token.partition("=")[2]
        if not value and tokens and flag_of(tokens[0]) is None:
            value = tokens.pop(0)
        if name is not None:
            given.setdefault(name, []).append((flag, value))
        elif why is not None and value != PORT:
            left_out.append(why)
    return given, args


def _refusal(token: str) -> str | None:
    try:
        check_extra_args((token,))
    except RefusedArgument as error:
        return error.message
    except OrchestratorError:
        return None  # found where the entry is checked
    return None


def _set(read: ServerCommand, args: list[str], name: str, values: list[tuple[str, str]]) -> None:
    """Set a field to what its flags say; the last one counts."""
    flag, text = values[-1]
    if name == "hf_token":
        read.left_out.append(f"{flag} is not written to a file: set HF_TOKEN where you serve")
        return
    if name == "kind":
        text = "rerank" if any("rerank" in flag for flag, _ in values) else "embedding"
    if name == "cache_type_kv" and not _is_same_for_both(values):
        args += [word for pair in values for word in pair]
        return
    if name == "mmproj_path" and "://" in text:
        read.left_out.append(f"{flag}: a projector is a file here, or found in the Hub repo")
        return
    try:
        value = SETTINGS[name].normal(name, type_of(name)(text))
    except OrchestratorError as error:
        read.left_out.append(f"{flag}: {error.message}")
        return
    except ValueError:
        read.left_out.append(f"{flag}: {text[:40]!r} is no number")
        return
    if value != SETTINGS[name].default:
        read.fields[name] = value


def _is_same_for_both(values: list[tuple[str, str]]) -> bool:
    """Whether the types of K and of V are given, and the same; the flags end with the letter."""
    types = {flag[-1]: text for flag, text in values}
    return len(types) == 2 and len(set(types.values())) == 1
