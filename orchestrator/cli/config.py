"""The settings of `serve` and `run`: flag before environment before file before default.

Each is a field of `Settings`, and its name is all there is to know: with dashes it is the flag, as
it is the key in the TOML file, behind LLAMA_ORCHESTRATOR_ the environment variable. The model says
what a file may hold, its schema what the flags take. click takes the word that counts (the file is
its `default_map`) and knows where it came from.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import click
from click.core import ParameterSource
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.cli import options
from orchestrator.cli.output import say_json
from orchestrator.settings.checks import MAX_SECONDS

PREFIX: Final = "LLAMA_ORCHESTRATOR_"
FILE_VARIABLE: Final = PREFIX + "CONFIG"
_FILE: Final = "config_file"
_SERVER_WORDS: Final = ("auto", "embedded")
_SOURCES: Final = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


@dataclass(frozen=True, slots=True)
class _Flag:
    """What the command line has to know of a setting beside its field.

    Attributes:
        name: Of the parameter; None = that of the field.
        is_path: Relative ones in a file are of the file's folder.
        more: Further attributes of the option.
    """

    name: str | None = None
    is_path: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def _of(name: str | None = None, *, is_path: bool = False, **more: Any) -> _Flag:
    return _Flag(name, is_path, more)


def _key_of_environment(ctx: click.Context, option: click.Parameter, path: Any) -> Any:
    """A key in the environment goes before a file of keys that the environment does not name."""
    name = str(option.name)
    is_named = ctx.get_parameter_source(name) in (
        ParameterSource.COMMANDLINE,
        ParameterSource.ENVIRONMENT,
    )
    if is_named or not os.environ.get(options.API_KEY_VARIABLE):
        return path
    ctx.set_parameter_source(name, ParameterSource.ENVIRONMENT)
    return None


_NONE: Final[Any] = None
_Text = Annotated[str, Field(min_length=1)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Settings(BaseModel):
    """What a file may say. A setting without a default is one that need not be there."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    llama_server: Annotated[_Text, _of(is_path=True, metavar="auto|embedded|PATH")] = Field(
        "auto",
        description="Which server to start; auto = LLAMA_SERVER_PATH, then PATH, then embedded.",
    )
    host: _Text = Field("127.0.0.1", description="Where the API listens.")
    port: int = Field(options.DEFAULT_PORT, ge=0, le=65535, description="0 = any free one.")
    slot: Annotated[_Text, _of(metavar="NAME")] = Field("default", description="One server a slot.")
    state_dir: Annotated[_Text, _of(is_path=True, metavar="DIR")] = Field(
        _NONE, description="Folder of the slots."
    )
    drain_timeout: Annotated[_Seconds, _of("drain_timeout_s", metavar="S")] = Field(
        30.0, description="Seconds a swap waits for leases."
    )
    drain_policy: Literal["wait", "cut"] = Field(
        "wait", description="Wait for leases so long, or cut what uses the server at once."
    )
    kill_grace: Annotated[_Seconds, _of("kill_grace_s", metavar="S")] = Field(
        5.0, description="Seconds between SIGTERM and SIGKILL; 0 = SIGKILL at once."
    )
    restart: Literal["never", "on-crash"] = Field(
        "never", description="What to do about a server that ends by itself."
    )
    api_key_file: Annotated[_Text, _of(is_path=True, metavar="F", callback=_key_of_environment)] = (
        Field(
            _NONE,
            description="Keys, one a line; requests need one; default: "
            f"${options.API_KEY_VARIABLE}, if set.",
        )
    )
    allowed_host: Annotated[list[_Text], _of("allowed_hosts", metavar="H")] = Field(
        _NONE,
        description="A name the service goes by beside localhost and its addresses; repeatable.",
    )
    models_dir: Annotated[list[_Text], _of(is_path=True, metavar="DIR")] = Field(
        _NONE,
        description="Local models must be inside, and are named from here; repeatable.",
    )
    idle_ttl: Annotated[float, _of("idle_ttl_s", metavar="S")] = Field(
        _NONE, gt=0, le=MAX_SECONDS, description="Unload a model after this long without use."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Of the log lines on stderr."
    )


class Setting(click.Option):
    """An option that may also come from the environment and from the file."""

    def __init__(self, param_decls: Sequence[str] | None = None, **attributes: Any) -> None:
        super().__init__(param_decls, **attributes)
        self.key: str = max(self.opts, key=len).lstrip("-").replace("-", "_")
        self.variable: str = PREFIX + self.key.upper()
        self.envvar: str | Sequence[str] | None = self.variable

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Name what holds the wrong value: the flag, or the variable."""
        source = ctx.get_parameter_source(str(self.name)) if ctx is not None else None
        if source is ParameterSource.ENVIRONMENT:
            return self.variable
        return super().get_error_hint(ctx)


@dataclass(frozen=True, slots=True)
class Explained:
    """A setting, and where its value came from: the flag, variable or file is the `origin`."""

    name: str
    value: Any
    source: str
    origin: str | None


def _flag_of(key: str) -> _Flag:
    about = Settings.model_fields[key].metadata
    return next((one for one in about if isinstance(one, _Flag)), _Flag())


def serving_options() -> options.Decorator:
    """The settings: the common options of `serve` and `run`."""
    return options.together(*map(_option, Settings.model_fields))


def _option(key: str) -> Callable[[Any], Any]:
    """Return the option that a field of the settings makes."""
    about, says = Settings.model_fields[key], schema()["properties"][key]
    flag = _flag_of(key)
    attributes: dict[str, Any] = {"help": about.description, **flag.more}
    if about.default is not None:
        attributes |= {"default": about.default, "show_default": True}
    match says:
        case {"enum": choices}:
            attributes["type"] = click.Choice(choices)
        case {"type": "array"}:
            attributes["multiple"] = True
        case {"type": "integer"}:
            attributes["type"] = click.IntRange(says["minimum"], says["maximum"])
        case {"type": "number"}:
            least = says.get("minimum", says.get("exclusiveMinimum"))
            is_open = "exclusiveMinimum" in says
            attributes["type"] = click.FloatRange(least, says["maximum"], min_open=is_open)
    if flag.is_path:
        attributes["type"] = click.Path()
    return click.option(f"--{key.replace('_', '-')}", flag.name or key, cls=Setting, **attributes)


def config_option(**attributes: Any) -> options.Decorator:
    """`--config`, read before any setting is."""
    return options.together(
        click.option(
            "--config",
            metavar="FILE",
            envvar=FILE_VARIABLE,
            is_eager=True,
            expose_value=False,
            callback=_use_file,
            help="Settings as TOML; default: llama-orchestrator/config.toml in $XDG_CONFIG_HOME or "
            "~/.config, if it is there.",
            **attributes,
        )
    )


def schema_option() -> options.Decorator:
    """`--schema`, which ends before any file is read."""

    def show(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
        if is_wanted and not ctx.resilient_parsing:
            say_json(schema())
            ctx.exit()

    return options.together(
        click.option(
            "--schema",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=show,
            help="Print the JSON schema of the file, and end.",
        )
    )


# ------------------------------------------------------------------------------------- the file


def default_file() -> Path:
    """Return where the file is looked for when nobody names one."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "llama-orchestrator" / "config.toml"


def _use_file(ctx: click.Context, _: click.Parameter, given: str | None) -> None:
    given = given or os.environ.get(FILE_VARIABLE)
    path = Path(os.path.abspath(os.path.expanduser(given))) if given else default_file()
    try:
        text = path.read_text(encoding="utf-8")
        members = tomllib.loads(text)
    except (OSError, ValueError) as error:
        if not given and isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        why = getattr(error, "strerror", None) or error
        raise click.UsageError(f"{path}: {why}.") from error
    ctx.meta[_FILE] = str(path)
    said, names = checked(path, members), settings_of(ctx.command)
    ctx.default_map = {str(names[key].name): value for key, value in said.items()}


def checked(path: Path, members: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says, by its keys.

    Relative paths are of the file's folder, because a service is started from anywhere.

    Raises:
        click.UsageError: a key that is no setting, a value that is not allowed; never shows it.
    """
    try:
        Settings.model_validate(members)
    except ValidationError as error:
        wrong = error.errors(include_input=False)[0]
        key = str(wrong["loc"][0])
        if wrong["type"] == "extra_forbidden":
            known = ", ".join(Settings.model_fields)
            raise click.UsageError(
                f"{path}: {key} is not a setting. The settings are {known}."
            ) from None
        may_be = allowed(schema()["properties"][key])
        raise click.UsageError(f"{path}: {key} has to be {may_be}.") from None
    return {key: _placed(key, value, path.parent) for key, value in members.items()}


def settings_of(command: click.Command) -> dict[str, Setting]:
    """Return the settings of a command by their keys."""
    return {option.key: option for option in command.params if isinstance(option, Setting)}


def _placed(key: str, value: Any, folder: Path) -> Any:
    if not _flag_of(key).is_path or (key == "llama_server" and value in _SERVER_WORDS):
        return value
    if isinstance(value, list):
        return [os.path.join(folder, os.path.expanduser(one)) for one in value]
    return os.path.join(folder, os.path.expanduser(value))


@cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    made = Settings.model_json_schema()
    properties = made["properties"]
    for one in properties.values():
        del one["title"]
        if one.get("default", one) is None:
            del one["default"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of llama-orchestrator serve and run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def allowed(schema: Mapping[str, Any]) -> str:
    """Say what a schema allows."""
    match schema:
        case {"enum": choices}:
            return " or ".join(f'"{choice}"' for choice in choices)
        case {"type": "array"}:
            return "a list of strings"
        case {"type": "string"}:
            return "a string that is not empty"
        case {"type": kind, "maximum": most}:
            more = f"more than {schema.get('exclusiveMinimum', 0):g}"
            least = f"{schema['minimum']:g}" if "minimum" in schema else more
            return f"{'an integer' if kind == 'integer' else 'a number'}, {least} to {most:.0f}"
    raise AssertionError(schema)


# ------------------------------------------------------------------------------- the explanation


def explain(ctx: click.Context) -> dict[str, Any]:
    """Return the file that was read, and of every setting its value and where that came from.

    `unknown_variables` begin like ours and are nobody's: a misspelling, or what Kubernetes makes
    of a service of this name.
    """
    settings = settings_of(ctx.command)
    known = {FILE_VARIABLE, options.API_KEY_VARIABLE, *(one.variable for one in settings.values())}
    ours = {name for name in os.environ if name.startswith(PREFIX)}
    return {
        "file": ctx.meta.get(_FILE),
        "settings": [asdict(_explained(ctx, setting)) for setting in settings.values()],
        "unknown_variables": sorted(ours - known),
    }


def is_named(ctx: click.Context) -> bool:
    """Is `--config` on the command line?"""
    return ctx.get_parameter_source("config") is ParameterSource.COMMANDLINE


def _explained(ctx: click.Context, setting: Setting) -> Explained:
    value = ctx.params[str(setting.name)]
    source = ctx.get_parameter_source(str(setting.name))
    origin = None
    if source is ParameterSource.COMMANDLINE:
        origin = f"--{setting.key.replace('_', '-')}"
    elif source is ParameterSource.DEFAULT_MAP:
        origin = ctx.meta[_FILE]
    elif source is ParameterSource.ENVIRONMENT:
        origin = setting.variable if value is not None else options.API_KEY_VARIABLE
    name = _SOURCES.get(source, "default") if source is not None else "default"
    return Explained(setting.key, value, name, origin)
