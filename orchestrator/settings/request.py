"""What a caller asks for: a `LoadRequest`, validated and normalised when it is made.

Unknown fields are refused, never dropped; blank means the default. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self, get_args

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings import flags

OnBusy = Literal["supersede", "queue", "reject"]
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_CONTEXT: Final = 1 << 30
MAX_SECONDS: Final = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One load as the caller wants it; field names are the public vocabulary.

    Attributes:
        model_path: A local `.gguf` file, a folder with one, or a Hub repo `owner/name[:VARIANT]`.
        gguf_variant: Quant label or path inside the repo or folder; None = pick.
        revision: Hub revision; None = the default branch.
        hf_token: Secret; never shown by `repr`, status, events or errors.
        max_seq_length: Context in tokens; 0 = Auto (the server decides).
        cache_type_kv: KV cache type for K and V; None = the server's default.
        speculative_type: `default`, a type the server knows, `off`; None = off, but inherited
            flags for drafting stay.
        chat_template_override: Jinja text; None = the model's own.
        llama_extra_args: llama-server flags; None = inherit, () = clear.
        mmproj_path: Vision projector file.
        n_parallel: `--parallel`, 1 to 64; None = the server's default.
        force_reload: Reload even when nothing differs.
        on_busy: What to do when another load is in flight.
        load_request_id: The caller's handle for a scoped cancel.
        prefetch: Download first, while the running model keeps serving.
        restore_previous: If this start fails, bring the previous model back.
        idle_ttl_s: Unload after this long without use, seconds; None = the orchestrator's.
        pinned: Never unload for being idle.
        stall_timeout_s: Give up after this long without any progress, seconds.
        deadline_s: Give up after this long in all, seconds; None = never. Who joins a load in
            flight shares its two limits; to wait for less, cancel the wait.

    Raises:
        MalformedRequest: a field has the wrong type.
        InvalidRequest: a field has a value that cannot be honoured.
    """

    model_path: str
    gguf_variant: str | None = None
    revision: str | None = None
    hf_token: str | None = None
    max_seq_length: int = 0
    cache_type_kv: str | None = None
    speculative_type: str | None = None
    chat_template_override: str | None = None
    llama_extra_args: tuple[str, ...] | None = None
    mmproj_path: str | None = None
    n_parallel: int | None = None
    force_reload: bool = False
    on_busy: OnBusy = "supersede"
    load_request_id: str | None = None
    prefetch: bool = False
    restore_previous: bool = False
    idle_ttl_s: float | None = None
    pinned: bool = False
    stall_timeout_s: float = 600.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name, normalise in _NORMAL.items():
            object.__setattr__(self, name, normalise(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a request from JSON-like data; unknown fields are refused, never dropped."""
        if not isinstance(values, Mapping):
            raise MalformedRequest.because(
                f"a load request is an object of named fields, not {type(values).__name__}"
            )
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                shown = _printable(name) if isinstance(name, str) else type(name).__name__
                raise MalformedRequest.because(
                    f"unknown field {shown!r}; known fields: {', '.join(sorted(known))}",
                    field=shown,
                )
        if "model_path" not in values:
            raise MalformedRequest.because("model_path is required", field="model_path")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The request as it may be posted back, without the token."""
        values = asdict(self)
        del values["hf_token"]
        if self.llama_extra_args is not None:
            values["llama_extra_args"] = list(self.llama_extra_args)
        return values

    def __repr__(self) -> str:
        shown = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name != "hf_token" and getattr(self, f.name) != f.default
        )
        return f"LoadRequest({', '.join(shown)})"


def _malformed(field: str, wanted: str, value: object) -> MalformedRequest:
    kind = type(value).__name__
    return MalformedRequest.because(f"{field} must be {wanted}, not {kind}", field=field)


def _text(field: str, value: object) -> str | None:
    """Stripped; blank means None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise _malformed(field, "a string", value)
    if not flags.is_encodable(value):
        raise InvalidRequest.because(f"{field} is not valid Unicode text", field=field)
    return value.strip() or None


def _line(field: str, value: object) -> str | None:
    text = _text(field, value)
    if text is not None and flags.holds_control(text):
        raise InvalidRequest.because(f"{field} holds a control character", field=field)
    return text


def _model_path(field: str, value: object) -> str:
    if value is None:
        raise _malformed(field, "a string", value)
    if (text := _line(field, value)) is None:
        raise InvalidRequest.because(
            f"{field} is empty: give a .gguf file, a folder with one, or a Hub repo id", field=field
        )
    return text


def _template(field: str, value: object) -> str | None:
    """Kept exactly as written, because white space means something in a template."""
    return None if _text(field, value) is None else str(value)


def _printable(text: str) -> str:
    """What an error can carry: text that any answer can hold, of a bounded length."""
    return text[:64].encode(errors="backslashreplace").decode()


def _number(value: float) -> str:
    """A number as an error shows it; Python refuses to write out one of more than 4300 digits."""
    return "out of range" if abs(value) > 1e18 else str(value)


def _boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _malformed(field, "true or false", value)
    return value


def _integer(field: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _malformed(field, "a whole number", value)
    if not low <= value <= high:
        raise InvalidRequest.because(
            f"{field} is {_number(value)}: use {low} to {high}", field=field
        )
    return value


def _context(field: str, value: object) -> int:
    return _integer(field, value, 0, _MAX_CONTEXT)


def _parallel(field: str, value: object) -> int | None:
    return None if value is None else _integer(field, value, 1, 64)


def _seconds(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _malformed(field, "a number of seconds", value)
    if not 0 < value <= MAX_SECONDS:  # false for NaN too, and safe for a huge int
        raise InvalidRequest.because(
            f"{field} is {_number(value)}: use more than 0 to {MAX_SECONDS:.0f} seconds",
            field=field,
        )
    return float(value)


def _seconds_or_none(field: str, value: object) -> float | None:
    return None if value is None else _seconds(field, value)


def _cache_type(field: str, value: object) -> str | None:
    return flags.normal_cache_type(_line(field, value))


def _speculative_type(field: str, value: object) -> str | None:
    return flags.normal_speculative_type(_line(field, value))


def _extra_args(field: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise _malformed(field, "a list of strings", value)
    args = tuple(value)
    for token in args:
        if not isinstance(token, str):
            raise _malformed(field, "a list of strings", token)
    flags.check_extra_args(args)
    return args


def _on_busy(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _malformed(field, "a string", value)
    if value not in get_args(OnBusy):
        raise InvalidRequest.because(
            f"{field} is {value[:40]!r}: use one of {', '.join(get_args(OnBusy))}", field=field
        )
    return value


def _request_id(field: str, value: object) -> str | None:
    text = _text(field, value)
    if text is not None and not _REQUEST_ID.fullmatch(text):
        raise InvalidRequest.because(
            f"{field} must be 1 to 128 of A-Z a-z 0-9 . _ : - and start with a letter or a digit",
            field=field,
        )
    return text


_NORMAL: Final[dict[str, Callable[[str, Any], object]]] = {
    "model_path": _model_path,
    "gguf_variant": _line,
    "revision": _line,
    "hf_token": _line,
    "max_seq_length": _context,
    "cache_type_kv": _cache_type,
    "speculative_type": _speculative_type,
    "chat_template_override": _template,
    "llama_extra_args": _extra_args,
    "mmproj_path": _line,
    "n_parallel": _parallel,
    "force_reload": _boolean,
    "on_busy": _on_busy,
    "load_request_id": _request_id,
    "prefetch": _boolean,
    "restore_previous": _boolean,
    "idle_ttl_s": _seconds_or_none,
    "pinned": _boolean,
    "stall_timeout_s": _seconds,
    "deadline_s": _seconds_or_none,
}
