"""Extra args compared with the flags of one binary, before anything is stopped for them.

llama-server exits for a flag that it does not list, a flag without its value and a value outside
its choices; by then the running model is gone. In doubt an arg passes: the server judges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final, NoReturn

from orchestrator.errors import RefusedArgument
from orchestrator.settings.fields import SETTINGS
from orchestrator.settings.flags import flag_of, value_of
from orchestrator.settings.help_text import Catalogue, FlagHelp

_FIELD: Final = "llama_extra_args"
_SWITCH: Final = frozenset({"on", "off"})
_SWITCH_TOO: Final = frozenset({"1", "0", "true", "false", "enabled", "disabled"})
_SHOWN: Final = 60
_NEAR: Final = 0.75  # of difflib's ratio

_Accepted = Mapping[str, FlagHelp]
"""`Catalogue.accepted`."""


def check_known(args: tuple[str, ...], catalogue: Catalogue) -> None:
    """Refuse extra args that this binary does not accept.

    Raises:
        RefusedArgument: names the arg, and the nearest flag or field of a request.
    """
    accepted, at = catalogue.accepted, 0
    while at < len(args):
        token = args[at]
        flag = _entry(token, accepted)
        if flag is None:
            _refuse_unknown(token, catalogue, accepted)
        # whatever follows a flag that takes a value is that value
        at, values = at + 1 + flag.value_count, args[at + 1 : at + 1 + flag.value_count]
        if len(values) < flag.value_count or any(_is_flag(v, accepted) for v in values):
            count = "a value" if flag.value_count == 1 else f"{flag.value_count} values"
            _refuse(f"{token} in {_FIELD} needs {count}: {flag.placeholder}")
        if flag.choices and not _is_choice(values[0], flag.choices):
            shown = values[0][:_SHOWN]
            choices = ", ".join(flag.choices)
            _refuse(f"{token} in {_FIELD} does not accept {shown!r}: use one of {choices}")


def template_of(args: tuple[str, ...]) -> str | None:
    """Return the chat template that extra args contain; the last one counts."""
    return value_of(args, "--chat-template")


def _entry(token: str, accepted: _Accepted) -> FlagHelp | None:
    return accepted.get(token.replace("_", "-") if token.startswith("--") else token)


def _is_flag(value: str, accepted: _Accepted) -> bool:
    return flag_of(value) is not None and _entry(value, accepted) is not None


def _is_choice(value: str, choices: tuple[str, ...]) -> bool:
    if set(choices) >= _SWITCH and value in _SWITCH_TOO:
        return True
    return all(part in choices for part in value.split(","))


def _refuse_unknown(token: str, catalogue: Catalogue, accepted: _Accepted) -> NoReturn:
    name = flag_of(token)
    if name is None:
        _refuse(f"{token[:_SHOWN]!r} in {_FIELD} follows no flag that takes a value")
    entry = catalogue.get(name)
    if "=" in token and entry is not None:
        _refuse(f"{name} and its value are two elements of {_FIELD}, without a =")
    if entry is not None:
        _refuse(f"{name} in {_FIELD} was removed from this llama-server")
    near = get_close_matches(name, accepted, cutoff=_NEAR)[:1]
    ours = get_close_matches(name.strip("-").replace("-", "_"), SETTINGS, cutoff=_NEAR)[:1]
    hints = " or ".join([*near, *(f"the field {field}" for field in ours)])
    hint = f": did you mean {hints}?" if hints else ""
    _refuse(f"{name[:_SHOWN]} in {_FIELD} is not a flag of this llama-server{hint}")


def _refuse(message: str) -> NoReturn:
    raise RefusedArgument.because(message, field=_FIELD)
