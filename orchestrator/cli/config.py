"""The settings of `serve` and `run`: flag before environment before file before default.

A field of `Settings` is one setting, under one name: with dashes it is the flag, with underscores
the key in the TOML file, after LLAMA_ORCHESTRATOR_ the environment variable. pydantic validates the
file and makes its schema, and the flags are made from the schema. click applies the precedence (the
file is its `default_map`) and remembers the source of each value.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Flag:
    """What the option of a setting needs beside the field."""

    name: str | None = None  # None = that of the field
    is_path: bool = False  # in a file, a relative path starts at the file's folder
    metavar: str | None = None


_UNSET: Final[Any] = None
_Text = Annotated[str, Field(min_length=1)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
_Duration = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


class Settings(BaseModel):
    """Settings of llama-orchestrator serve and run; each may be left out."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True
    )

    models: Annotated[_Text, _Flag(is_path=True, metavar="FILE")] = _UNSET
    """Catalogue of a pool: serve its models by name, each loaded when it is needed."""
    watch: bool = False
    """Read the catalogue again when its file has changed."""
    llama_server: Annotated[_Text, _Flag(is_path=True, metavar="auto|embedded|PATH")] = "auto"
    """Server to start; auto = $LLAMA_SERVER_PATH, then PATH, then embedded."""
    host: _Text = "127.0.0.1"
    """Address the API listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = options.DEFAULT_PORT
    """Port of the API; 0 = any free one."""
    slot: Annotated[_Text, _Flag(metavar="NAME")] = "default"
    """Name of the slot: one server at a time in each."""
    state_dir: Annotated[_Text, _Flag(is_path=True, metavar="DIR")] = _UNSET
    """Folder for the state of the slots."""
    drain_timeout: Annotated[_Seconds, _Flag("drain_timeout_s", metavar="S")] = 30.0
    """How long a swap waits for leases, seconds."""
    drain_policy: Literal["wait", "cut"] = "wait"
    """Wait for leases before a swap, or cut their requests at once."""
    kill_grace: Annotated[_Seconds, _Flag("kill_grace_s", metavar="S")] = 5.0
    """Time between SIGTERM and SIGKILL, seconds; 0 = SIGKILL at once."""
    restart: Literal["never", "on-crash"] = "never"
    """When to restart a server that exits by itself, or hangs."""
    hang_timeout: Annotated[_Seconds, _Flag("hang_timeout_s", metavar="S")] = 60.0
    """End a server that neither answers nor works for this long, seconds; 0 = never."""
    on_host_exit: Literal["stop", "keep"] = "stop"
    """At the end of this process: stop the server, or keep it for the next one."""
    keep: Annotated[_Duration, _Flag("keep_s", metavar="S")] = 60.0
    """How long it is kept, seconds."""
    warm: bool = True
    """Read the next model into the page cache while the running server drains and ends."""
    keep_prompts: bool = False
    """Save the prompts of a chat server that is stopped for another model, and restore them."""
    keep_prompts_mib: Annotated[int, Field(ge=1, le=1 << 20), _Flag(metavar="N")] = 1024
    """Size of all that is saved, MiB; the oldest goes first."""
    api_key_file: Annotated[_Text, _Flag(is_path=True, metavar="F")] = _UNSET
    """File with API keys, one a line; default: the key in $LLAMA_ORCHESTRATOR_API_KEY, if set."""
    allowed_host: Annotated[list[_Text], _Flag("allowed_hosts", metavar="H")] = _UNSET
    """Host name of the service, beside localhost and its addresses; repeatable."""
    models_dir: Annotated[list[_Text], _Flag(is_path=True, metavar="DIR")] = _UNSET
    """Allow local models only in this folder; relative paths start there; repeatable."""
    protect_server: bool = True
    """Give every server a random key, so that its own port is of no use to other programs."""
    idle_ttl: Annotated[_Duration, _Flag("idle_ttl_s", metavar="S")] = _UNSET
    """Unload a model unused for this long, seconds."""
    log_format: Literal["console", "json"] = "console"
    """Format of the log lines on stderr."""
    log_level: Literal["debug", "info", "warning", "error"] = _UNSET
    """Least level of the log lines; default: info for serve, warning for run, error with quiet."""
    quiet: bool = False
    """Print no progress and no address, and log errors only."""


@cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    made = Settings.model_json_schema()
    for one in made["properties"].values():
        if one.get("default", one) is None:
            del one["default"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def allowed(schema: Mapping[str, Any]) -> str:
    """Describe the values that a schema allows."""
    match schema:
        case {"enum": choices}:
            return " or ".join(f'"{choice}"' for choice in choices)
        case {"type": "array"}:
            return "a list of strings"
        case {"type": "string"}:
            return "a non-empty string"
        case {"type": "boolean"}:
            return "true or false"
        case {"minimum": least, "maximum": most}:
            kind = "an integer" if schema["type"] == "integer" else "a number"
            return f"{kind} from {least:g} to {most:.0f}"
        case {"exclusiveMinimum": least, "maximum": most}:
            return f"a number above {least:g}, at most {most:.0f}"
    raise AssertionError(schema)


_FLAGS: Final = {
    key: next((one for one in field.metadata if isinstance(one, _Flag)), _Flag())
    for key, field in Settings.model_fields.items()
}
PARAMETERS: Final = {key: flag.name or key for key, flag in _FLAGS.items()}
"""Names of the commands' parameters, by key."""


def _or_key_of_environment(ctx: click.Context, option: click.Parameter, path: Any) -> Any:
    """A key in the environment wins over a key file that only the config file names."""
    name, explicit = str(option.name), (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    if ctx.get_parameter_source(name) in explicit or not os.environ.get(options.API_KEY_VARIABLE):
        return path
    ctx.set_parameter_source(name, ParameterSource.ENVIRONMENT)
    return None


def _option(key: str) -> click.Option:
    field, allows, flag = Settings.model_fields[key], schema()["properties"][key], _FLAGS[key]
    type_: Any = click.Path() if flag.is_path else None
    match allows:
        case {"enum": choices}:
            type_ = click.Choice(choices)
        case {"type": "integer", "minimum": least, "maximum": most}:
            type_ = click.IntRange(least, most)
        case {"type": "number", "maximum": most}:
            least = allows.get("minimum")
            type_ = click.FloatRange(least or 0, most, min_open=least is None)
    name = key.replace("_", "-")
    return click.Option(
        [f"--{name}/--no-{name}" if field.default is True else f"--{name}", PARAMETERS[key]],
        envvar=PREFIX + key.upper(),
        show_envvar=True,
        type=type_,
        multiple=allows["type"] == "array",
        is_flag=allows["type"] == "boolean",
        default=field.default,
        show_default=field.default is not None,
        metavar=flag.metavar,
        callback=_or_key_of_environment if key == "api_key_file" else None,
        help=field.description,
    )


SERVING: Final = tuple(map(_option, Settings.model_fields))


def config_option(**attributes: Any) -> click.Option:
    """`--config`, read before any setting."""
    return click.Option(
        ["--config"],
        metavar="FILE",
        envvar=FILE_VARIABLE,
        is_eager=True,
        expose_value=False,
        callback=_use_file,
        help="TOML file with settings; default: llama-orchestrator/config.toml in "
        "$XDG_CONFIG_HOME or ~/.config, if it exists.",
        **attributes,
    )


def _print_schema(ctx: click.Context, _: click.Parameter, is_requested: bool) -> None:
    if is_requested and not ctx.resilient_parsing:
        say_json(schema())
        ctx.exit()


SCHEMA: Final = click.Option(
    ["--schema"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of the config file and exit.",
)


def default_file() -> Path:
    """Return the path that is read if it exists and no other file is given."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "llama-orchestrator" / "config.toml"


def _use_file(ctx: click.Context, _: click.Parameter, given: str | None) -> None:
    given = given or os.environ.get(FILE_VARIABLE)
    path = Path(os.path.abspath(os.path.expanduser(given))) if given else default_file()
    try:
        members = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if not given and isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        why = getattr(error, "strerror", None) or error
        raise click.UsageError(f"{path}: {why}.") from error
    ctx.meta[_FILE] = str(path)
    ctx.default_map = {PARAMETERS[key]: v for key, v in checked(path, members).items()}


def checked(path: Path, members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a file by key, with absolute paths; an error never shows a value."""
    try:
        Settings.model_validate(members)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            what = f"is not a setting. The settings are {', '.join(Settings.model_fields)}."
        else:
            what = f"must be {allowed(schema()['properties'][key])}."
        raise click.UsageError(f"{path}: {key} {what}") from None
    return {key: _resolved(key, value, path.parent) for key, value in members.items()}


def _resolved(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolved(key, one, folder) for one in value]
    if not _FLAGS[key].is_path or (key == "llama_server" and value in ("auto", "embedded")):
        return value
    return os.path.join(folder, os.path.expanduser(value))


def explain(ctx: click.Context) -> dict[str, Any]:
    """Return the file that was read, and the value and the source of every setting.

    `unknown_variables` start with our prefix but name no setting: a misspelling, or a variable
    that Kubernetes sets for a service of this name.
    """
    known = {FILE_VARIABLE, options.API_KEY_VARIABLE, *(PREFIX + k.upper() for k in PARAMETERS)}
    ours = {name for name in os.environ if name.startswith(PREFIX)}
    return {
        "file": ctx.meta.get(_FILE),
        "settings": [_explained(ctx, *setting) for setting in PARAMETERS.items()],
        "unknown_variables": sorted(ours - known),
    }


def is_named(ctx: click.Context) -> bool:
    """Return whether `--config` is on the command line."""
    return ctx.get_parameter_source("config") is ParameterSource.COMMANDLINE


def _explained(ctx: click.Context, key: str, parameter: str) -> dict[str, Any]:
    value = ctx.params[parameter]
    source, origin = "default", None
    match ctx.get_parameter_source(parameter):
        case ParameterSource.COMMANDLINE:
            is_off = value is False and Settings.model_fields[key].default is True
            source, origin = "flag", f"--{'no-' if is_off else ''}{key.replace('_', '-')}"
        case ParameterSource.DEFAULT_MAP:
            source, origin = "file", ctx.meta[_FILE]
        case ParameterSource.ENVIRONMENT:
            source = "environment"
            origin = options.API_KEY_VARIABLE if value is None else PREFIX + key.upper()
    return {"name": key, "value": value, "source": source, "origin": origin}
