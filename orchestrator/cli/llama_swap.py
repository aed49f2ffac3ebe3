"""The configuration of llama-swap as the catalogue of a pool, and what has no counterpart in it.

Its commands are read as llama-server's (`server_command.py`). Pure: nothing is started, and the
environment is a mapping. Source: llama-swap's config.example.yaml and config-schema.json.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.cli.drafts import Draft, unique_name
from orchestrator.cli.macros import PORT, Macros
from orchestrator.cli.server_command import ServerCommand, read_command
from orchestrator.errors import InvalidCatalogue
from orchestrator.pool.catalogue import catalogue_of
from orchestrator.pool.places import KeyPath, dotted
from orchestrator.pool.reading import NOT_IN_PRESETS

_NO_MEMBER: Final = "models are listed without it"
_NOTHING: Final = "there is nothing like it here"
_KILL_GRACE: Final = "serve --kill-grace is for all models"

_OF_FILE: Final = {
    "healthCheckTimeout": "a load may take long, but not without progress for stall_timeout_s "
    "(600 s); deadline_s of a model limits it in all",
    "logLevel": "serve has --log-level",
    "logTimeFormat": "serve has --log-format",
    "logToStdout": "llama-orchestrator logs NAME shows what a server prints",
    "sendLoadingState": "a request just waits; GET /api/events tells of the load",
    "includeAliasesInList": "aliases are always listed",
    "unloadTimeout": _KILL_GRACE,
    "apiKeys": "keys are in files: serve --api-key-file F, or [keys.NAME] with key_file",
    "matrix": "memory decides which models are resident together; group, pinned and max_resident "
    "limit that",
}
_OF_MODEL: Final = {
    "name": _NO_MEMBER,
    "description": _NO_MEMBER,
    "metadata": _NO_MEMBER,
    "capabilities": _NO_MEMBER,
    "unlisted": "every model is listed",
    "proxy": "each server has a port of its own, which nobody has to know",
    "checkEndpoint": "/health says when a server is ready",
    "cmdStop": "signals end a server, with everything that it has started",
    "unloadTimeout": _KILL_GRACE,
    "useModelName": "a server knows its model by the entry's name",
    "concurrencyLimit": "a server gets as many requests as it has slots (n_parallel); others wait",
    "sendLoadingState": _OF_FILE["sendLoadingState"],
    "timeouts": "a stream may take as long as it takes",
}
_SILENT: Final = {"startPort", "macros", "$schema"}
_DEFAULTS: Final = {"checkEndpoint": "/health", "sendLoadingState": False, "unlisted": False}


@dataclass(slots=True)
class Converted:
    """A catalogue, and what is not in it.

    Attributes:
        pool: The keys of `[pool]`.
        drafts: The entries by name.
        names: Of entries, by the name in the configuration.
        remarks: What was not carried over: its place in the file, and why.
        programs: The llama-servers that the commands start.
    """

    pool: dict[str, Any] = field(default_factory=dict)
    drafts: dict[str, Draft] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    remarks: list[tuple[KeyPath, str]] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)


def convert(
    config: Mapping[str, Any], environ: Mapping[str, str], folder: Path | None
) -> Converted:
    """Return the catalogue of a configuration.

    Args:
        folder: Where its relative paths start; None leaves them as they are.
    """
    conversion = _Conversion(config, environ, folder)
    conversion.run()
    return conversion.made


class _Conversion:
    def __init__(
        self, config: Mapping[str, Any], environ: Mapping[str, str], folder: Path | None
    ) -> None:
        self._config, self._environ, self._folder = config, environ, folder
        self.made = Converted()

    def run(self) -> None:
        for name, model in _items(self._config.get("models")):
            self._model(name, _mapping(model))
        for name, peer in _items(self._config.get("peers")):
            self._peer(name, _mapping(peer))
        self._set_idle_times()
        for name in list(self.made.names):
            self._check(name)
        self._set_groups()
        self._set_preload()
        read = {"models", "groups", "hooks", "peers", "globalTTL", *_SILENT}
        self._leave_out((), self._config, read, _OF_FILE)

    # ------------------------------------------------------------------------------------- models

    def _model(self, name: str, model: Mapping[str, Any]) -> None:
        path = ("models", name)
        macros = self._macros(model, MODEL_ID=name)
        try:
            members = self._command(path, macros.expanded(model.get("cmd")))
        except LookupError as error:
            self._remark((*path, "cmd"), f"{error}, so the model is not in the catalogue")
            return
        draft = self._draft(name, members)
        aliases = [
            one.get("id") if isinstance(one, Mapping) else one for one in _list(model, "aliases")
        ]
        self._add_aliases(draft, aliases)
        self._filters(path, draft, _mapping(model.get("filters")), macros)
        if env := _list(model, "env"):
            names = ", ".join(str(one).partition("=")[0] for one in env)
            self._remark((*path, "env"), f"set {names} where you serve: for all models")
        proxy = str(model.get("proxy", PORT))
        read = {"cmd", "aliases", "filters", "env", "ttl", *(["proxy"] if PORT in proxy else [])}
        self._leave_out(path, model, read | _SILENT, _OF_MODEL)

    def _draft(self, name: str, members: dict[str, Any]) -> Draft:
        """Return a new entry; a name that an entry cannot have becomes an alias."""
        made = unique_name(name, self.made.drafts)
        draft = Draft(made, members)
        self.made.names.setdefault(name, made)
        self.made.drafts[made] = draft
        if made != name:
            self._add_aliases(draft, [name])
        return draft

    def _add_aliases(self, draft: Draft, aliases: list[Any]) -> None:
        if aliases:
            draft.members.setdefault("aliases", []).extend(map(str, aliases))

    def _command(self, path: KeyPath, command: Any) -> dict[str, Any]:
        """Return the fields of a load that a command means. Raises LookupError."""
        lines = str(command or "").replace("\\\r\n", " ").replace("\\\n", " ").splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise LookupError(f"the command cannot be read ({error})") from error
        read = read_command(words)
        if read is None:
            remedy = "start it yourself, and give an entry its base_url"
            raise LookupError(f"this starts no llama-server of this machine: {remedy}")
        self._remark_of(path, read)
        if any(PORT in word for word in read.fields.get("llama_extra_args", ())):
            raise LookupError("the command uses ${PORT} for more than its --port")
        if "model_path" not in read.fields:
            raise LookupError("the command names no model")
        return self._located(read.fields)

    def _remark_of(self, path: KeyPath, read: ServerCommand) -> None:
        for why in read.left_out:
            self._remark((*path, "cmd"), why)
        if read.wrapper:
            shown = shlex.join(read.wrapper)
            remedy = "serve --llama-server takes a script that does it, for all models"
            self._remark((*path, "cmd"), f"{shown} in front of the server: {remedy}")
        if read.program not in self.made.programs:
            self.made.programs.append(read.program)

    def _located(self, fields: dict[str, Any]) -> dict[str, Any]:
        first = {key: fields[key] for key in ("model_path", "gguf_variant") if key in fields}
        members = first | fields
        if self._folder is not None:
            for key in ("model_path", "mmproj_path"):
                if str(members.get(key, "")).endswith(".gguf"):
                    members[key] = str(self._folder / members[key])
        return members

    def _filters(
        self, path: KeyPath, draft: Draft, filters: Mapping[str, Any], macros: Macros
    ) -> None:
        why = {
            "stripParams": "a request keeps its members",
            "setParams": "a preset gives defaults, and a request overrides them",
        }
        self._leave_out((*path, "filters"), filters, {"setParamsByID"}, why)
        for key, given in _items(filters.get("setParamsByID")):
            place = (*path, "filters", "setParamsByID", key)
            try:
                wanted, values = str(macros.expanded(key)), _mapping(macros.expanded(given))
            except LookupError as error:
                self._remark(place, str(error))
                continue
            base, _, preset = wanted.rpartition(":")
            is_preset = base == path[1] and unique_name(preset, ()) == preset
            if not is_preset or NOT_IN_PRESETS.keys() & values.keys() or _has_null(values):
                self._remark(place, "only NAME:PRESET, with defaults of a request, can be a preset")
                continue
            draft.members.setdefault("presets", {})[preset] = dict(values)
            self._remark(place, "as a preset it gives defaults, and a request overrides them")

    # -------------------------------------------------------------------------- what concerns many

    def _set_idle_times(self) -> None:
        """Here 0 seconds of the pool are never, and an entry cannot say never by itself."""
        models = _mapping(self._config.get("models"))
        whole = _count(self._config.get("globalTTL"), 0)
        own = {name: _count(_mapping(one).get("ttl"), -1) for name, one in _items(models)}
        of_pool = 0 if 0 in own.values() else whole
        self.made.pool["idle_ttl_s"] = of_pool
        for name, ttl in own.items():
            idle_ttl_s = whole if ttl < 0 else ttl
            if name in self.made.names and idle_ttl_s != of_pool:
                self.made.drafts[self.made.names[name]].members["idle_ttl_s"] = idle_ttl_s

    def _set_groups(self) -> None:
        groups = dict(_items(self._config.get("groups")))
        if not groups and "matrix" not in self._config:
            why = "without groups llama-swap runs one model at a time; here as many as fit, unless "
            self._remark(("groups",), why + "max_resident = 1 in [pool]")
        for name, given in groups.items():
            path, group = ("groups", name), _mapping(given)
            for member in map(str, _list(group, "members")):
                if member not in self.made.names:
                    self._remark((*path, "members"), f"{member} is not in the catalogue")
                    continue
                members = self.made.drafts[self.made.names[member]].members
                if group.get("swap", True):
                    members["group"] = name
                elif group.get("persistent"):
                    members["pinned"] = True
            if group.get("swap", True) and group.get("persistent"):
                self._remark((*path, "persistent"), "of a group one model can be pinned: choose it")
            if group.get("exclusive", True):
                why = "models of other groups stay as long as there is room for them"
                self._remark((*path, "exclusive") if "exclusive" in group else path, why)
            self._leave_out(path, group, {"swap", "exclusive", "persistent", "members"}, {})

    def _set_preload(self) -> None:
        path = ("hooks", "on_startup", "preload")
        hooks = _mapping(self._config.get("hooks"))
        preload = list(map(str, _list(_mapping(hooks.get("on_startup")), "preload")))
        for name in preload:
            if name not in self.made.names:
                self._remark(path, f"{name} is not in the catalogue")
        if found := [self.made.names[name] for name in preload if name in self.made.names]:
            self.made.pool["preload"] = found

    def _peer(self, name: str, peer: Mapping[str, Any]) -> None:
        path = ("peers", name)
        try:
            proxy = str(self._macros(peer).expanded(peer.get("proxy", ""))).rstrip("/")
        except LookupError as error:
            self._remark((*path, "proxy"), f"{error}, so its models are not in the catalogue")
            return
        base_url = proxy if proxy.endswith("/v1") else f"{proxy}/v1"
        for model in map(str, _list(peer, "models")):
            if model in self.made.names:
                self._remark((*path, "models"), f"{model} is already the name of a model")
                continue
            draft = self._draft(model, {"base_url": base_url})
            if draft.name != model:
                draft.members["upstream_model"] = model
        why = {
            "apiKey": "a key is in a file: api_key_file of its entries",
            "filters": "requests are passed on as they are",
            "timeouts": _OF_MODEL["timeouts"],
        }
        self._leave_out(path, peer, {"proxy", "models"}, why)

    def _check(self, name: str) -> None:
        """Leave out what a catalogue does not accept, and the entry if there is no other way."""
        path, draft = ("models", name), self.made.drafts[self.made.names[name]]
        path_here = ("models", draft.name)
        while (error := _mistake_of(draft)) is not None:
            key = (error.field or "").removeprefix(f"{dotted(path_here)}.").partition(".")[0]
            if key not in draft.members or key in {"model_path", "base_url"}:
                del self.made.drafts[self.made.names.pop(name)]
                self._remark(path, f"{_words(error, draft)}: it is not in the catalogue")
                return
            del draft.members[key]
            self._remark(path, _words(error, draft))

    # ------------------------------------------------------------------------------------- helpers

    def _macros(self, members: Mapping[str, Any], **more: Any) -> Macros:
        both = (_mapping(self._config.get("macros")), _mapping(members.get("macros")))
        return Macros({**both[0], **both[1], **more}, self._environ)

    def _remark(self, path: KeyPath, why: str) -> None:
        self.made.remarks.append((path, why))

    def _leave_out(
        self, path: KeyPath, members: Mapping[str, Any], read: set[str], why: Mapping[str, str]
    ) -> None:
        """Remark every key that is not read, unless it says what holds anyway."""
        for key, value in _items(members):
            if key not in read and (key not in _DEFAULTS or value != _DEFAULTS[key]):
                self._remark((*path, key), why.get(key, _NOTHING))


def _mistake_of(draft: Draft) -> InvalidCatalogue | None:
    try:
        catalogue_of({"models": {draft.name: draft.members}})
    except InvalidCatalogue as error:
        return error
    return None


def _has_null(value: Any) -> bool:
    """Whether there is a null in a value, which TOML does not have."""
    if isinstance(value, Mapping | list):
        return any(map(_has_null, value.values() if isinstance(value, Mapping) else value))
    return value is None


def _words(error: InvalidCatalogue, draft: Draft) -> str:
    return error.message.removeprefix(f"{dotted(('models', draft.name))}: ")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    for key, one in _mapping(value).items():
        yield str(key), one


def _list(members: Mapping[str, Any], key: str) -> list[Any]:
    value = members.get(key)
    return value if isinstance(value, list) else []


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
