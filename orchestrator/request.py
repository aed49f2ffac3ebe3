"""What a caller asks for, its normal form, its identity, and what differs from what runs.

Pure: a `LoadRequest` is validated and normalised when it is made; a `Target` is a request whose
model and server binary have been looked at on disk, by somebody else. Two targets are "the same"
exactly when `differences` is empty; nothing else in the library compares settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from orchestrator import server_args, variants
from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.named import Named

if TYPE_CHECKING:
    from orchestrator.catalogue import Catalogue

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


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as the kernel knows it: a replaced file is another file."""

    path: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class HubModel:
    """Where on the Hub a model comes from.

    Attributes:
        repo: `owner/name`; upper and lower case mean the same.
        revision: As it was asked for; None = the default branch.
        commit: What that is, once it is known.
        is_settled: The Hub has nothing to add: it has answered, or it need not be asked.
        note: What is worth knowing about it, e.g. that the Hub could not be asked.
    """

    repo: str
    revision: str | None = None
    commit: str | None = None
    is_settled: bool = True
    note: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: every shard in order, and the projector of a vision model.

    Of a Hub model that is not here there are no weights; until the Hub has answered, the variant is
    the one that was asked for.
    """

    weights: tuple[FileIdentity, ...]
    projector: FileIdentity | None = None
    variant: str | None = None
    hub: HubModel | None = None

    @property
    def is_on_disk(self) -> bool:
        return bool(self.weights)

    @property
    def is_resolved(self) -> bool:
        """Is it known which files it is, be they here or not?"""
        return self.hub is None or self.hub.commit is not None

    @property
    def is_settled(self) -> bool:
        """Is there nothing left that the Hub has to be asked before a server is stopped for it?"""
        return self.hub is None or self.hub.is_settled

    @property
    def name(self) -> str:
        """What the model is called: its repo, or its first file."""
        return self.hub.repo.lower() if self.hub is not None else self.weights[0].path

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in (*self.weights, *filter(None, (self.projector,))))


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """What is started: a llama-server (`command` is its path) or the embedded one.

    Its catalogue (None = not asked, or no clear answer) is knowledge about it, not identity.
    """

    kind: Literal["external", "embedded"]
    command: tuple[str, ...]
    identity: FileIdentity
    catalogue: Catalogue | None = field(default=None, compare=False, repr=False)


NO_SERVER: Final = ServerBinary("external", (), FileIdentity("", 0, 0, 0, 0))
"""Of a target that is only fetched."""


@dataclass(frozen=True, slots=True)
class ReloadReason(Named):
    """One setting that makes a running server the wrong one."""

    field: str
    running: object
    requested: object

    def as_dict(self) -> dict[str, object]:
        return {"field": self.field, "running": self.running, "requested": self.requested}


@dataclass(frozen=True, slots=True)
class Target:
    """A request that has been looked at on disk: what exactly would run."""

    request: LoadRequest
    model: ModelFiles
    server: ServerBinary

    @property
    def source(self) -> tuple[str, str | None]:
        """What extra args are inherited by: the model's identifier and resolved variant."""
        return self.model.name, self.model.variant

    @property
    def extra_args(self) -> tuple[str, ...]:
        return self.request.llama_extra_args or ()

    @property
    def is_vision(self) -> bool:
        return self.model.projector is not None

    @property
    def speculative_type(self) -> str | None:
        """The mode whose flags are managed; None where nothing is: a vision model never drafts,
        and extra args that name modes themselves are left alone.
        """
        mode = self.request.speculative_type
        is_manual = mode == self._manual or server_args.names_modes(self.extra_args)
        return None if self.is_vision or is_manual or mode == server_args.OFF else mode

    @property
    def drafting(self) -> str:
        """The mode that applies, managed or manual, as it may be posted back."""
        if self.is_vision:
            return server_args.OFF
        return self.speculative_type or self._manual

    @property
    def _manual(self) -> str:
        return server_args.manual_mode(self.extra_args)

    def is_called(self, model: str) -> bool:
        """Would somebody call it so? By its file, its repo, or repo and variant."""
        if model in {self.request.model_path, self.model.name}:
            return True
        repo, variant = variants.split_reference(model) or (model, None)
        known = self.model.variant or ""
        return (
            self.model.hub is not None
            and repo.lower() == self.model.name
            and (variant is None or variant.upper() == known.upper())
        )

    def inheriting(self, committed: Mapping[tuple[str, str | None], tuple[str, ...]]) -> Target:
        """Return this target with omitted extra args taken from the last load of its source.

        Args:
            committed: Extra args of the last load that became Healthy, by source.
        """
        if self.request.llama_extra_args is not None or not self.model.is_resolved:
            return self  # what it inherits depends on the variant that is found
        inherited, groups = committed.get(self.source, ()), groups_set_by(self.request)
        if self.request.speculative_type == server_args.manual_mode(inherited):
            groups -= {"speculative_type"}  # posted back as it was shown: it must not change
        kept = server_args.strip_shadowed(inherited, groups)
        return replace(self, request=replace(self.request, llama_extra_args=kept))

    def kept_as(self, request: LoadRequest) -> Target:
        """Return this target, kept loaded for as long as the newest request for it says."""
        ttl_s, pinned = request.idle_ttl_s, request.pinned
        if (ttl_s, pinned) == (self.request.idle_ttl_s, self.request.pinned):
            return self
        return replace(self, request=replace(self.request, idle_ttl_s=ttl_s, pinned=pinned))

    def asked(self, other: Target) -> dict[str, object]:
        """What can be compared with a Hub model of which one of the two is not resolved: what was
        asked for, and what that has turned out to be where the other asks for it by name.
        """
        hub, theirs, variant = self.model.hub, other.model.hub, self._asked_variant
        revision = hub and hub.revision
        if hub is not None and hub.commit is not None:
            variant = self.model.variant if other._asked_variant else variant
            revision = hub.commit if theirs and theirs.revision == hub.commit else revision
        return {
            "gguf_variant": variant and variant.upper(),
            "revision": revision,
            "mmproj_path": self.request.mmproj_path,
        }

    @property
    def _asked_variant(self) -> str | None:
        _, in_path = variants.split_reference(self.request.model_path) or (None, None)
        return self.request.gguf_variant or in_path

    def identity(self) -> dict[str, object]:
        """Everything "the same" means, by the name a reload reason uses."""
        request, model = self.request, self.model
        return {
            "model_path": model.weights if model.hub is None else model.name,
            "gguf_variant": model.variant,
            "revision": model.hub and (model.hub.commit or model.hub.revision),
            "mmproj_path": model.projector,
            "max_seq_length": request.max_seq_length,
            "cache_type_kv": request.cache_type_kv,
            "speculative_type": self.speculative_type,
            "chat_template_override": request.chat_template_override,
            "n_parallel": request.n_parallel,
            "llama_extra_args": self.extra_args,
            "llama_server": self.server,
        }


def groups_set_by(request: LoadRequest) -> frozenset[str]:
    """Return the fields of this request that take over flags of inherited args."""
    return frozenset(name for name in server_args.SHADOWED if getattr(request, name))


def differences(running: Target, requested: Target) -> tuple[ReloadReason, ...]:
    """Return what keeps `running` from serving `requested`; empty means they are the same."""
    ours, theirs = running.identity(), requested.identity()
    if not (running.model.is_resolved and requested.model.is_resolved):
        ours, theirs = ours | running.asked(requested), theirs | requested.asked(running)
    elif running.model.is_on_disk != requested.model.is_on_disk:  # which projector, nobody knows
        ours["mmproj_path"] = running.request.mmproj_path
        theirs["mmproj_path"] = requested.request.mmproj_path
    return tuple(
        ReloadReason(name, _shown(ours[name]), _shown(theirs[name]))
        for name in ours
        if ours[name] != theirs[name]
    )


def is_same_model(one: Target, other: Target) -> bool:
    """Would both be made of the same files?"""
    names = {"model_path", "gguf_variant", "revision", "mmproj_path"}
    return not any(reason.field in names for reason in differences(one, other))


def _shown(value: object) -> object:
    match value:
        case (FileIdentity() as only,):
            return _shown(only)
        case (FileIdentity(), *_):
            return [_shown(shard) for shard in value]
        case FileIdentity():
            return (
                f"{value.path} ({value.size_bytes} bytes, mtime {value.mtime_ns}, "
                f"inode {value.inode} of device {value.device})"
            )
        case ServerBinary():
            return f"{value.kind}: {_shown(value.identity)}"
        case tuple():
            return list(value)
        case _:
            return value


def _malformed(field: str, wanted: str, value: object) -> MalformedRequest:
    kind = type(value).__name__
    return MalformedRequest.because(f"{field} must be {wanted}, not {kind}", field=field)


def _text(field: str, value: object) -> str | None:
    """Stripped; blank means None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise _malformed(field, "a string", value)
    if not server_args.is_encodable(value):
        raise InvalidRequest.because(f"{field} is not valid Unicode text", field=field)
    return value.strip() or None


def _line(field: str, value: object) -> str | None:
    text = _text(field, value)
    if text is not None and server_args.holds_control(text):
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
    return server_args.normal_cache_type(_line(field, value))


def _speculative_type(field: str, value: object) -> str | None:
    return server_args.normal_speculative_type(_line(field, value))


def _extra_args(field: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise _malformed(field, "a list of strings", value)
    args = tuple(value)
    for token in args:
        if not isinstance(token, str):
            raise _malformed(field, "a list of strings", token)
    server_args.check_extra_args(args)
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
