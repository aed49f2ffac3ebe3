"""What a caller asks for: a `LoadRequest`, validated and normalised when it is made.

Unknown fields are refused, never dropped; blank means the default. What the fields are is said in
fields.py. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, Unpack

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings.checks import printable
from orchestrator.settings.fields import SETTINGS, Fields, LoadFields


@dataclass(frozen=True, slots=True, init=False, repr=False)
class LoadRequest(Fields):
    """One load as the caller wants it; field names are the public vocabulary."""

    def __init__(self, **given: Unpack[LoadFields]) -> None:
        values: dict[str, Any] = {**given}
        _check_names(values)
        if "model_path" not in values:
            raise MalformedRequest.because("model_path is required", field="model_path")
        for name, row in SETTINGS.items():
            object.__setattr__(self, name, row.check(name, values.get(name, row.default)))
        if self.kind == "chat" and self.pooling is not None:
            raise InvalidRequest.because(
                f"pooling is {self.pooling!r}, and kind is chat: "
                "use it with the kinds embedding and rerank",
                field="pooling",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a request from JSON-like data; unknown fields are refused, never dropped.

        Raises:
            MalformedRequest: a field is unknown, or has the wrong type.
            InvalidRequest: a field has a value that cannot be honoured.
        """
        if not isinstance(values, Mapping):
            raise MalformedRequest.because(
                f"a load request is an object of named fields, not {type(values).__name__}"
            )
        _check_names(values)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The request as it may be posted back, without the token."""
        values = {n: getattr(self, n) for n, row in SETTINGS.items() if not row.is_secret}
        if self.llama_extra_args is not None:
            values["llama_extra_args"] = list(self.llama_extra_args)
        return values

    def meant(self, name: str) -> Any:
        """Return the value of a setting, also where other fields imply it."""
        value, implied = getattr(self, name), SETTINGS[name].implied
        return implied(self) if value is None and implied is not None else value

    def __repr__(self) -> str:
        shown = (
            f"{name}={getattr(self, name)!r}"
            for name, row in SETTINGS.items()
            if not row.is_secret and getattr(self, name) != row.default
        )
        return f"LoadRequest({', '.join(shown)})"


def _check_names(values: Mapping[Any, object]) -> None:
    for name in values:
        if name not in SETTINGS:
            shown = printable(name) if isinstance(name, str) else type(name).__name__
            message = f"unknown field {shown!r}; known fields: {', '.join(sorted(SETTINGS))}"
            raise MalformedRequest.because(message, field=shown)


LoadRequest.__doc__ = "\n".join(
    (
        LoadRequest.__doc__ or "",
        "\nAttributes:",
        *(f"    {name}: {row.help}." for name, row in SETTINGS.items()),
        "\nRaises:",
        "    MalformedRequest: a field has the wrong type, or is unknown.",
        "    InvalidRequest: a field has a value that cannot be honoured.",
    )
)
