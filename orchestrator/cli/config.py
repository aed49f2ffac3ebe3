"""The settings of `serve` and `run`: flag before environment before file before default.

Each is one option of click's, and its long name is all there is to know: with underscores it is
the key in the TOML file, behind LLAMA_ORCHESTRATOR_ the environment variable. click takes the word
that counts (the file is its `default_map`) and knows where it came from. What it would let pass is
refused here: a key that nobody reads, a value that is not what the schema says.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

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


def serving_options() -> options.Decorator:
    """The settings: the common options of `serve` and `run`."""
    return options.together(
        _setting(
            "--llama-server",
            type=click.Path(),
            default="auto",
            metavar="auto|embedded|PATH",
            help="Which server to start; auto = LLAMA_SERVER_PATH, then PATH, then embedded.",
        ),
        _setting("--host", default="127.0.0.1", help="Where the API listens."),
        _setting(
            "--port",
            type=click.IntRange(0, 65535),
            default=options.DEFAULT_PORT,
            help="0 = any free one.",
        ),
        _setting("--slot", default="default", metavar="NAME", help="One server a slot."),
        _setting("--state-dir", type=click.Path(), metavar="DIR", help="Folder of the slots."),
        _setting(
            *("--drain-timeout", "drain_timeout_s"),
            type=click.FloatRange(0, MAX_SECONDS),
            default=30.0,
            metavar="S",
            help="Seconds a swap waits for leases.",
        ),
        _setting(
            "--drain-policy",
            type=click.Choice(["wait", "cut"]),
            default="wait",
            help="Wait for leases so long, or cut what uses the server at once.",
        ),
        _setting(
            *("--kill-grace", "kill_grace_s"),
            type=click.FloatRange(0, MAX_SECONDS),
            default=5.0,
            metavar="S",
            help="Seconds between SIGTERM and SIGKILL; 0 = SIGKILL at once.",
        ),
        _setting(
            "--restart",
            type=click.Choice(["never", "on-crash"]),
            default="never",
            help="What to do about a server that ends by itself.",
        ),
        options.key_option(
            "Keys, one a line; requests need one", cls=Setting, callback=_key_of_environment
        ),
        _setting(
            *("--allowed-host", "allowed_hosts"),
            multiple=True,
            metavar="H",
            help="A name the service goes by beside localhost and its addresses; repeatable.",
        ),
        _setting(
            *("--models-dir", "models_dir"),
            type=click.Path(),
            multiple=True,
            metavar="DIR",
            help="Local models must be inside, and are named from here; repeatable.",
        ),
        options.idle_ttl_option("Unload a model after this long without use.", cls=Setting),
        _setting(
            "--log-format",
            type=click.Choice(["console", "json"]),
            default="console",
            help="Of the log lines on stderr.",
        ),
    )


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
            say_json(schema(ctx.command))
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


def _setting(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    has_default = "default" in attributes
    return click.option(*names, cls=Setting, show_default=has_default, **attributes)


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
    ctx.default_map = checked(path, members, settings_of(ctx.command))


def checked(
    path: Path, members: Mapping[str, Any], settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """Return what a file says, by the names of click's parameters.

    Relative paths are of the file's folder, because a service is started from anywhere.

    Raises:
        click.UsageError: a key that is no setting, a value that is not allowed; never shows it.
    """
    found = {}
    for key, value in members.items():
        if (setting := settings.get(key)) is None:
            raise click.UsageError(
                f"{path}: {key} is not a setting. The settings are {', '.join(settings)}."
            )
        schema = schema_of(setting)
        if not _fits(value, schema):
            raise click.UsageError(f"{path}: {key} has to be {allowed(schema)}.")
        found[str(setting.name)] = _placed(value, setting, path.parent)
    return found


def settings_of(command: click.Command) -> dict[str, Setting]:
    """Return the settings of a command by their keys."""
    return {option.key: option for option in command.params if isinstance(option, Setting)}


def _placed(value: Any, setting: Setting, folder: Path) -> Any:
    is_word = setting.key == "llama_server" and value in _SERVER_WORDS
    if is_word or not isinstance(setting.type, click.Path):
        return value
    if isinstance(value, list):
        return [os.path.join(folder, os.path.expanduser(one)) for one in value]
    return os.path.join(folder, os.path.expanduser(value))


# ----------------------------------------------------------------------------------- the schema


def schema(command: click.Command) -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of llama-orchestrator serve and run",
        "type": "object",
        "properties": {key: schema_of(one) for key, one in settings_of(command).items()},
        "additionalProperties": False,
    }


def schema_of(setting: Setting) -> dict[str, Any]:
    """Return what may stand behind a key."""
    kind = setting.type
    members: dict[str, Any] = {"description": setting.help}
    if setting.multiple:
        members |= {"type": "array", "items": {"type": "string", "minLength": 1}}
    elif isinstance(kind, click.Choice):
        members |= {"type": "string", "enum": list(kind.choices)}
    elif isinstance(kind, click.IntRange | click.FloatRange):
        least = "exclusiveMinimum" if kind.min_open else "minimum"
        members |= {"type": "integer" if isinstance(kind, click.IntRange) else "number"}
        members |= {least: kind.min, "maximum": kind.max}
    else:
        members |= {"type": "string", "minLength": 1}
    if isinstance(setting.default, str | float | int):
        members["default"] = setting.default
    return members


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
            more = f"more than {schema.get('exclusiveMinimum')}"
            least = f"{schema['minimum']}" if "minimum" in schema else more
            return f"{'an integer' if kind == 'integer' else 'a number'}, {least} to {most:.0f}"
    raise AssertionError(schema)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    match schema:
        case {"enum": choices}:
            return isinstance(value, str) and value in choices
        case {"type": "array", "items": item}:
            return isinstance(value, list) and all(_fits(one, item) for one in value)
        case {"type": "string"}:
            return isinstance(value, str) and value != ""
    kinds = (int,) if schema["type"] == "integer" else (int, float)
    if type(value) not in kinds:  # a bool is an int in Python
        return False
    is_enough = value >= schema["minimum"] if "minimum" in schema else value > 0
    return is_enough and bool(value <= schema["maximum"])


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
