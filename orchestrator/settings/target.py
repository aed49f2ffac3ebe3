"""What a server would run, and what differs between two of these.

A `Target` is a request whose model and server binary have been looked up. Two targets are the same
exactly when `differences` is empty; nothing else compares settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Final, Literal

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record
from orchestrator.settings import drafting
from orchestrator.settings.fields import SETTINGS, SHADOWED, Kind, strip_shadowed
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.reference import of_address, split_reference
from orchestrator.settings.request import LoadRequest

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\Z")
_COMPARED: Final = tuple(name for name, row in SETTINGS.items() if row.is_identity)

Source = tuple[str, str | None, Kind]
"""Key of inherited extra args: the model's name, its resolved variant, the kind."""


@dataclass(frozen=True, slots=True)
class ServerBinary(Record):
    """The program to start: a llama-server (`command` is its path) or the embedded one.

    Attributes:
        catalogue: Its flags; None if its help was not read, or could not be.
        names: Public names of its paths.
    """

    kind: Literal["external", "embedded"]
    command: tuple[str, ...]
    identity: FileIdentity
    catalogue: Catalogue | None = field(default=None, compare=False, repr=False)
    names: PathNames = field(default=(), compare=False, repr=False)


NO_SERVER: Final = ServerBinary("external", (), FileIdentity("", 0, 0, 0, 0))
"""For a target that is only downloaded."""


@dataclass(frozen=True, slots=True)
class ReloadReason(Record):
    """One setting in which a running server differs from a request."""

    field: str
    running: object
    requested: object
    names: PathNames = dataclasses.field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Target:
    """What to run.

    Attributes:
        given_alias: The model's name in answers of the server, where a pool gives it one.
    """

    request: LoadRequest
    model: ModelFiles
    server: ServerBinary
    given_alias: str | None = None

    @property
    def source(self) -> Source:
        return self.model.name, self.model.variant, self.request.kind

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        """The model's files and the binary."""
        return (*self.model.files, self.server.identity)

    @property
    def extra_args(self) -> tuple[str, ...]:
        return self.request.llama_extra_args or ()

    @property
    def is_vision(self) -> bool:
        return self.model.projector is not None

    @property
    def can_keep_prompts(self) -> bool:
        """Whether its server can save what it has computed: with a projector it cannot."""
        catalogue = self.server.catalogue
        knows = catalogue is not None and catalogue.has("--slot-save-path")
        return knows and self.request.kind == "chat" and not self.is_vision

    @property
    def has_json_log(self) -> bool:
        """Whether its server logs JSON, with its memory figures in it."""
        catalogue = self.server.catalogue
        return catalogue is not None and catalogue.has("--log-jsonl")

    @property
    def names(self) -> PathNames:
        return (*self.model.names, *self.server.names)

    @property
    def speculative_type(self) -> str | None:
        """The mode whose flags we add: none for a vision model, which cannot draft, and none where
        the extra args select modes themselves.
        """
        mode, args = self.request.speculative_type, self.extra_args
        is_explicit = drafting.has_explicit_mode(args) or mode == drafting.explicit_mode(args)
        return None if self.is_vision or is_explicit or mode == drafting.OFF else mode

    @property
    def effective_speculative_type(self) -> str:
        """The mode in use, by our flags or by extra args, as it may be posted back."""
        if self.is_vision:
            return drafting.OFF
        return self.speculative_type or drafting.explicit_mode(self.extra_args)

    @property
    def alias(self) -> str:
        """The model's name in answers of the server: the given one, else `owner/name:VARIANT`, or a
        file's without its ending. Never a path, and nothing that a list of names or a JSON text
        cannot hold.
        """
        if self.given_alias is not None:
            return self.given_alias
        model = self.model
        if model.hub is not None:
            name = f"{model.hub.repo}:{model.variant}" if model.variant else model.hub.repo
        else:
            name = _SHARD.sub("", PurePath(model.weights[0].path).stem)
        shown = "".join(c if c.isprintable() and c != "," else "_" for c in name)
        return shown.lstrip("-") or "model"

    def is_called(self, model: str) -> bool:
        """Return whether a caller may mean this model: by its file, its repo, or repo:variant."""
        model, _ = of_address(model) or (model, None)
        if model in {self.request.model_path, self.model.name}:
            return True
        repo, variant = split_reference(model) or (model, None)
        return (
            self.model.hub is not None
            and repo.lower() == self.model.name
            and (variant is None or _upper(variant) == _upper(self.model.variant))
        )

    def inheriting(self, committed: Mapping[Source, tuple[str, ...]]) -> Target:
        """Return this target with omitted extra args taken from the last load of its source.

        Args:
            committed: Extra args of the last load that became Healthy, by source.
        """
        if self.request.llama_extra_args is not None or not self.model.is_resolved:
            return self  # the source depends on the resolved variant
        inherited, names = committed.get(self.source, ()), shadowing_fields(self.request)
        if self.request.speculative_type == drafting.explicit_mode(inherited):
            names -= {"speculative_type"}  # the reported mode is posted back: nothing changes
        args = strip_shadowed(inherited, names)
        return replace(self, request=replace(self.request, llama_extra_args=args))

    def with_retention(self, request: LoadRequest) -> Target:
        """Return this target with the `idle_ttl_s` and `pinned` of a newer request for it."""
        ttl_s, pinned = request.idle_ttl_s, request.pinned
        if (ttl_s, pinned) == (self.request.idle_ttl_s, self.request.pinned):
            return self
        return replace(self, request=replace(self.request, idle_ttl_s=ttl_s, pinned=pinned))

    def identity(self) -> dict[str, object]:
        """Return everything that two equal targets share, by the field of a reload reason."""
        request, model = self.request, self.model
        return {
            "model_path": model.weights if model.hub is None else model.name,
            "gguf_variant": model.variant,
            "revision": model.hub and (model.hub.commit or model.hub.revision),
            "mmproj_path": model.projector,
            **{name: request.effective(name) for name in _COMPARED},
            "speculative_type": self.speculative_type,
            "llama_extra_args": self.extra_args,
            "llama_server": self.server,
        }


def shadowing_fields(request: LoadRequest) -> frozenset[str]:
    """Return the fields of a request that remove flags from inherited args."""
    return frozenset(n for n in SHADOWED if getattr(request, n) != SETTINGS[n].default)


def differences(running: Target, requested: Target) -> tuple[ReloadReason, ...]:
    """Return why `running` cannot serve `requested`; empty means they are the same."""
    ours, theirs = running.identity(), requested.identity()
    is_known = running.model.is_resolved and requested.model.is_resolved
    if not (is_known and (requested.model.is_settled or _has_revision_of(requested, running))):
        ours |= _as_requested(running, requested)
        theirs |= _as_requested(requested, running)
    elif running.model.is_on_disk != requested.model.is_on_disk:  # one projector is unknown
        ours["mmproj_path"] = running.request.mmproj_path
        theirs["mmproj_path"] = requested.request.mmproj_path
    names = (*running.names, *requested.names)
    return tuple(
        ReloadReason(name, _shown(ours[name]), _shown(theirs[name]), names)
        for name in ours
        if ours[name] != theirs[name]
    )


def keeps_commit(running: Target, requested: LoadRequest) -> bool:
    """Return whether a request is for the repo, revision and variant that run, whatever commit the
    revision has by now.
    """
    repo, _ = split_reference(requested.model_path) or (None, None)
    hub, names = running.model.hub, (running.model.variant, running.request.variant)
    return (
        hub is not None
        and repo is not None
        and repo.lower() == hub.repo.lower()
        and not requested.force_reload
        and requested.revision == running.request.revision
        and _upper(requested.variant) in map(_upper, names)
    )


def is_same_model(one: Target, other: Target) -> bool:
    """Return whether both are made of the same files."""
    names = {"model_path", "gguf_variant", "revision", "mmproj_path"}
    return not any(reason.field in names for reason in differences(one, other))


def _as_requested(target: Target, other: Target) -> dict[str, object]:
    """Return the parts of a Hub model to compare while one of two targets is not resolved: what was
    requested, or what it was resolved to where the other requests that by name.
    """
    hub, other_hub, variant = target.model.hub, other.model.hub, target.request.variant
    revision = hub and hub.revision
    if hub is not None and hub.commit is not None:
        variant = target.model.variant if other.request.variant else variant
        revision = hub.commit if other_hub and other_hub.revision == hub.commit else revision
    return {
        "gguf_variant": _upper(variant),
        "revision": revision,
        "mmproj_path": target.request.mmproj_path,
    }


def _has_revision_of(target: Target, other: Target) -> bool:
    return target.request.revision == other.request.revision


def _upper(variant: str | None) -> str | None:
    return variant and variant.upper()


def _shown(value: object) -> object:
    match value:
        case (FileIdentity() as only,):
            return _shown(only)
        case tuple():
            return [_shown(part) for part in value]
        case FileIdentity():
            return (
                f"{value.path} ({value.size_bytes} bytes, mtime {value.mtime_ns}, "
                f"inode {value.inode} of device {value.device})"
            )
        case ServerBinary():
            return f"{value.kind}: {_shown(value.identity)}"
        case _:
            return value
