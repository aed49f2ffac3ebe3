"""The macros of llama-swap: `${name}` in a text, with `${env.NAME}` for the environment.

`${PORT}` is left as it is: a server here gets its port from the system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

PORT: Final = "${PORT}"
_MACRO: Final = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_MAX_EXPANSIONS: Final = 64
_MAX_LENGTH: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Macros:
    """Texts and numbers by name, and the environment."""

    values: Mapping[str, Any]
    environ: Mapping[str, str]

    def expanded(self, value: Any) -> Any:
        """Replace the macros in a value and all that is in it. A string that is nothing but a macro
        becomes what the macro is, of its type.

        Raises:
            LookupError: There is no such macro, or they have no end.
        """
        if isinstance(value, Mapping):
            return {self.expanded(str(key)): self.expanded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.expanded(one) for one in value]
        for _ in range(_MAX_EXPANSIONS):
            name = _first_in(value) if isinstance(value, str) else None
            if name is None:
                return value
            whole, macro = f"${{{name}}}", self._value_of(name)
            value = macro if value == whole else value.replace(whole, _text(macro))
            if isinstance(value, str) and len(value) > _MAX_LENGTH:
                break
        raise LookupError("its macros have no end")

    def _value_of(self, name: str) -> Any:
        is_variable = name.startswith("env.")
        known = self.environ if is_variable else self.values
        key = name.removeprefix("env.") if is_variable else name
        if key not in known:
            raise LookupError(f"there is no macro ${{{name}}}")
        return known[key]


def _first_in(text: str) -> str | None:
    """Return the name of the first macro but the port."""
    return next((found[1] for found in _MACRO.finditer(text) if found[0] != PORT), None)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
