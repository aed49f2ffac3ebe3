"""A load request, validated and normalised when it is made; fields.py defines the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, Unpack

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings.checks import invalid, unknown_field
from orchestrator.settings.fields import SETTINGS, Fields, LoadFields
from orchestrator.settings.reference import of_address, split_reference


@dataclass(frozen=True, slots=True, init=False, repr=False)
class LoadRequest(Fields):
    """One load as a caller requests it.

    Raises:
        MalformedRequest: a field is unknown, or has the wrong type.
        InvalidRequest: a field has a value that cannot be used.

    Attributes:
    """

    def __init__(self, /, **given: Unpack[LoadFields]) -> None:
        values: dict[str, Any] = {**given}
        for name in values.keys() - SETTINGS.keys():
            raise unknown_field(name, SETTINGS)
        if "model_path" not in values:
            raise MalformedRequest.because("model_path is required", field="model_path")
        for name, row in SETTINGS.items():
            object.__setattr__(self, name, row.normal(name, values.get(name, row.default)))
        self._take_address()
        if self.kind == "chat" and self.pooling is not None:
            raise InvalidRequest.because(
                f"pooling is {self.pooling!r}, but kind is chat: set kind to embedding or rerank",
                field="pooling",
            )

    def _take_address(self) -> None:
        """Turn an address on the Hub into a repo, and the revision in it."""
        if (found := of_address(self.model_path)) is None:
            expected = "owner/name, or the address of a repo or of a .gguf file in it"
            raise invalid("model_path", self.model_path, expected)
        path, revision = found
        object.__setattr__(self, "model_path", path)
        if revision is not None and self.revision not in {None, revision}:
            message = f"revision is {self.revision!r}, but model_path has {revision!r}: give one"
            raise InvalidRequest.because(message, field="revision")
        object.__setattr__(self, "revision", self.revision or revision)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a request from JSON-like data.

        Raises:
            MalformedRequest: a field is unknown, or has the wrong type.
            InvalidRequest: a field has a value that cannot be used.
        """
        if not isinstance(values, Mapping):
            raise MalformedRequest.because(
                f"a load request must be an object, not {type(values).__name__}"
            )
        return cls(**{n if isinstance(n, str) else type(n).__name__: v for n, v in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as they may be posted back, without the token."""
        values = {n: getattr(self, n) for n, row in SETTINGS.items() if not row.is_secret}
        if self.llama_extra_args is not None:
            values["llama_extra_args"] = list(self.llama_extra_args)
        return values

    def changed(self) -> dict[str, Any]:
        """Return those of `as_dict` that differ from their default."""
        return {n: v for n, v in self.as_dict().items() if v != SETTINGS[n].default}

    @property
    def variant(self) -> str | None:
        """The requested variant: `gguf_variant`, or the one in `model_path`."""
        _, in_path = split_reference(self.model_path) or (None, None)
        return self.gguf_variant or in_path

    def effective(self, name: str) -> Any:
        """Return the value of a setting, or what the other fields imply where it is None."""
        value, implied = getattr(self, name), SETTINGS[name].implied
        return implied(self) if value is None and implied is not None else value

    def __repr__(self) -> str:
        changed = (
            f"{name}={getattr(self, name)!r}"
            for name, row in SETTINGS.items()
            if not row.is_secret and getattr(self, name) != row.default
        )
        return f"LoadRequest({', '.join(changed)})"


LoadRequest.__doc__ = (LoadRequest.__doc__ or "").rstrip() + "".join(
    f"\n        {name}: {row.help}." for name, row in SETTINGS.items()
)
