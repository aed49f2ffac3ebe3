"""What exactly would run, and what differs between two of these.

A `Target` is a request whose model and server binary have been looked up, by somebody else. Two
targets are "the same" exactly when `differences` is empty; nothing else compares settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record
from orchestrator.settings import flags
from orchestrator.settings.fields import SETTINGS, SHADOWED, Kind, strip_shadowed
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.reference import split_reference
from orchestrator.settings.request import LoadRequest

_COMPARED: Final = tuple(name for name, row in SETTINGS.items() if row.is_identity)


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """What is started: a llama-server (`command` is its path) or the embedded one.

    Its catalogue (None = not asked, or no clear answer) is knowledge about it, not identity, and so
    is what its paths are called where strangers see them.
    """

    kind: Literal["external", "embedded"]
    command: tuple[str, ...]
    identity: FileIdentity
    catalogue: Catalogue | None = field(default=None, compare=False, repr=False)
    names: PathNames = field(default=(), compare=False, repr=False)


Source = tuple[str, str | None, Kind]

NO_SERVER: Final = ServerBinary("external", (), FileIdentity("", 0, 0, 0, 0))
"""Of a target that is only fetched."""


@dataclass(frozen=True, slots=True)
class ReloadReason(Record):
    """One setting that makes a running server the wrong one."""

    field: str
    running: object
    requested: object
    names: PathNames = dataclasses.field(default=(), compare=False, repr=False)

    def as_dict(self) -> dict[str, object]:
        return {"field": self.field, "running": self.running, "requested": self.requested}


@dataclass(frozen=True, slots=True)
class Target:
    """A request that has been looked at on disk: what exactly would run."""

    request: LoadRequest
    model: ModelFiles
    server: ServerBinary

    @property
    def source(self) -> Source:
        """What extra args are inherited by: the model's name, its resolved variant, the kind."""
        return self.model.name, self.model.variant, self.request.kind

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
        is_manual = mode == self._manual or flags.names_modes(self.extra_args)
        return None if self.is_vision or is_manual or mode == flags.OFF else mode

    @property
    def drafting(self) -> str:
        """The mode that applies, managed or manual, as it may be posted back."""
        if self.is_vision:
            return flags.OFF
        return self.speculative_type or self._manual

    @property
    def _manual(self) -> str:
        return flags.manual_mode(self.extra_args)

    @property
    def names(self) -> PathNames:
        """What its paths are called where strangers see them."""
        return (*self.model.names, *self.server.names)

    def is_called(self, model: str) -> bool:
        """Would somebody call it so? By its file, its repo, or repo and variant."""
        if model in {self.request.model_path, self.model.name}:
            return True
        repo, variant = split_reference(model) or (model, None)
        known = self.model.variant or ""
        return (
            self.model.hub is not None
            and repo.lower() == self.model.name
            and (variant is None or variant.upper() == known.upper())
        )

    def inheriting(self, committed: Mapping[Source, tuple[str, ...]]) -> Target:
        """Return this target with omitted extra args taken from the last load of its source.

        Args:
            committed: Extra args of the last load that became Healthy, by source.
        """
        if self.request.llama_extra_args is not None or not self.model.is_resolved:
            return self  # what it inherits depends on the variant that is found
        inherited, groups = committed.get(self.source, ()), groups_set_by(self.request)
        if self.request.speculative_type == flags.manual_mode(inherited):
            groups -= {"speculative_type"}  # posted back as it was shown: it must not change
        kept = strip_shadowed(inherited, groups)
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
        _, in_path = split_reference(self.request.model_path) or (None, None)
        return self.request.gguf_variant or in_path

    def identity(self) -> dict[str, object]:
        """Everything "the same" means, by the name a reload reason uses."""
        request, model = self.request, self.model
        return {
            "model_path": model.weights if model.hub is None else model.name,
            "gguf_variant": model.variant,
            "revision": model.hub and (model.hub.commit or model.hub.revision),
            "mmproj_path": model.projector,
            **{name: request.meant(name) for name in _COMPARED},
            "speculative_type": self.speculative_type,
            "llama_extra_args": self.extra_args,
            "llama_server": self.server,
        }


def groups_set_by(request: LoadRequest) -> frozenset[str]:
    """Return the fields of this request that take over flags of inherited args."""
    return frozenset(n for n in SHADOWED if getattr(request, n) != SETTINGS[n].default)


def differences(running: Target, requested: Target) -> tuple[ReloadReason, ...]:
    """Return what keeps `running` from serving `requested`; empty means they are the same."""
    ours, theirs = running.identity(), requested.identity()
    if not (running.model.is_resolved and requested.model.is_resolved):
        ours, theirs = ours | running.asked(requested), theirs | requested.asked(running)
    elif running.model.is_on_disk != requested.model.is_on_disk:  # which projector, nobody knows
        ours["mmproj_path"] = running.request.mmproj_path
        theirs["mmproj_path"] = requested.request.mmproj_path
    names = (*running.names, *requested.names)
    return tuple(
        ReloadReason(name, _shown(ours[name]), _shown(theirs[name]), names)
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
