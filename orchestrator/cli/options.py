"""Options the commands share, and what tells our own from llama-server's.

A command that takes a model passes every flag it does not know on to llama-server, in order and
unread. So click never sees those: its prefix rules would take `-mg 0` for `-m g`.
"""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import click

from orchestrator.errors import OrchestratorError
from orchestrator.settings.checks import MAX_SECONDS
from orchestrator.settings.fields import SETTINGS, type_of
from orchestrator.settings.request import LoadRequest

DEFAULT_PORT: Final = 8642
DEFAULT_URL: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
API_KEY_VARIABLE: Final = "LLAMA_ORCHESTRATOR_API_KEY"
_FLAGS: Final = "llama_server_flags"

F = TypeVar("F", bound=Callable[..., Any])


class Decorator(Protocol):
    """Options to put on a command."""

    def __call__(self, command: F, /) -> F: ...


class ModelCommand(click.Command):
    """A command with a MODEL and any llama-server flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value = {
            spelling: not (option.is_flag or option.count)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option)
            for spelling in (*option.opts, *option.secondary_opts)
        }
        ours, ctx.meta[_FLAGS] = split(args, takes_value)
        return super().parse_args(ctx, ours)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[ANY LLAMA-SERVER FLAG]..."]


def split(args: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Return our own tokens and llama-server's, each in order.

    The model is the first bare word before any flag of llama-server's, because after one a bare
    word may be its value. Everything after `--` is llama-server's.

    Args:
        takes_value: Every spelling of our options, and whether a value follows it.
    """
    ours: list[str] = []
    theirs: list[str] = []
    tokens = deque(args)
    while tokens:
        token = tokens.popleft()
        name, has_value = token, False
        if token.startswith("--"):
            name, separator, _ = token.partition("=")
            has_value = bool(separator)
        if token == "--":  # noqa: S105 (a word of a command line, not a secret)
            theirs += tokens
            break
        if name in takes_value:
            ours.append(token)
            if takes_value[name] and not has_value and tokens:
                ours.append(tokens.popleft())
        elif theirs or token.startswith("-"):
            theirs.append(token)
        else:
            ours.append(token)
    return ours, theirs


def llama_flags() -> tuple[str, ...] | None:
    """Return the flags for llama-server of the command being run; None when there are none."""
    return tuple(click.get_current_context().meta.get(_FLAGS, ())) or None


# ------------------------------------------------------------------------------------- the options


def together(*decorators: Callable[[Any], Any]) -> Decorator:
    """Apply several decorators, the first shown first in the help."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = cast("F", decorator(command))
        return command

    return decorate


def json_option() -> Decorator:
    return together(click.option("--json", "as_json", is_flag=True, help="Print JSON."))


def hub_options() -> Decorator:
    """Of a model that comes from the Hub."""
    return together(
        _setting("revision"),
        click.option("--hf-token-file", metavar="F", help="Hub token; default: HF_TOKEN, login."),
    )


def model_options() -> Decorator:
    """What to load and how, as far as a flag of llama-server's is not the better word for it."""
    option = click.option
    return together(
        click.argument("model", required=False),
        option(
            *("-m", "--model", "model_option"),
            metavar="MODEL",
            help="A .gguf file, a folder, or owner/name[:VARIANT] on the Hub.",
        ),
        *(_setting(name) for name in SETTINGS if _is_option(name) and name != "revision"),
        option("--chat-template-file", metavar="F", help="Jinja file instead of the model's own."),
        hub_options(),
    )


def start_options() -> Decorator:
    """Of a command that loads, beside what makes one load differ from another."""
    return together(*(_setting(name) for name in SETTINGS if _is_option(name, switch=True)))


def _is_option(name: str, *, switch: bool = False) -> bool:
    row = SETTINGS[name]
    return row.option != () and (type_of(name) is bool) is switch


def _setting(name: str) -> Callable[[Any], Any]:
    """Return the option of a setting; what its value may be is said when the request is made."""
    row, type_ = SETTINGS[name], type_of(name)
    names = row.option or (f"--{name.replace('_', '-')}",)
    help_ = f"{row.help[0].upper()}{row.help[1:]}.".replace("null = ", "default: ")
    value = "|".join(row.choices) or row.metavar
    if type_ is bool:
        return click.option(*names, name, is_flag=True, help=help_)
    return click.option(*names, name, type=type_, metavar=value, help=help_)


def idle_ttl_option(help_: str, **attributes: Any) -> Decorator:
    return together(
        click.option(
            *("--idle-ttl", "idle_ttl_s"),
            type=click.FloatRange(0, MAX_SECONDS, min_open=True),
            metavar="S",
            help=help_,
            **attributes,
        )
    )


def load_request(
    model: str | None,
    model_option: str | None,
    chat_template_file: str | None = None,
    hf_token_file: str | None = None,
    *,
    url: str | None = None,
    **fields: Any,
) -> LoadRequest:
    """Build the request of a command line.

    Args:
        url: The orchestrator that will read it, if that is another process.

    Raises:
        click.UsageError: no model, two models, or a setting that is not usable.
    """
    if model and model_option:
        raise click.UsageError("Give MODEL once: as a word or with -m.")
    path = model or model_option
    if not path:
        raise click.UsageError("Give a MODEL before any llama-server flag, or -m MODEL.")
    members = {name: value for name, value in fields.items() if value is not None}
    members["model_path"] = path
    if (flags := llama_flags()) is not None:
        members["llama_extra_args"] = flags
    if chat_template_file is not None:
        members["chat_template_override"] = _read(chat_template_file, "--chat-template-file")
    if hf_token_file is not None:
        members["hf_token"] = _read(hf_token_file, "--hf-token-file").strip()
    for name in ("model_path", "mmproj_path"):
        if url is not None and name in members:
            members[name] = absolute(members[name], url)
    try:
        return LoadRequest.from_dict(members)
    except OrchestratorError as error:
        raise click.UsageError(error.message) from error


def key_option(help_: str, **attributes: Any) -> Decorator:
    """A key is in a file or in the environment, because anybody can read a command line."""
    return together(
        click.option(
            "--api-key-file",
            type=click.Path(),
            envvar=f"{API_KEY_VARIABLE}_FILE",
            metavar="F",
            help=f"{help_}; default: ${API_KEY_VARIABLE}, if set.",
            **attributes,
        )
    )


def keys_in(path: str | None) -> tuple[str, ...]:
    """Return the API keys of a file, one a line as llama-server has it; without a file, the one of
    the environment; () when there is none.
    """
    if path is not None:
        where, text = f"--api-key-file {path}", _read(path, "--api-key-file")
    elif text := os.environ.get(API_KEY_VARIABLE, ""):
        where = API_KEY_VARIABLE
    else:
        return ()
    keys = tuple(line.strip() for line in text.splitlines())
    if not (keys := tuple(filter(None, keys))):
        raise click.UsageError(f"{where} holds no key.")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise click.UsageError(f"{where}: a key may only have printable ASCII.")
    return keys


def absolute(path: str, url: str) -> str:
    """Return the path of a file here as an orchestrator in another folder would find it.

    One on another machine has files of its own, and a Hub repo is not a file.
    """
    is_here = is_loopback(urlsplit(url).hostname or "")
    return os.path.abspath(path) if is_here and os.path.exists(path) else path


def is_loopback(host: str) -> bool:
    """Does this name or address reach nobody but this machine?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise click.UsageError(f"{option} {path}: {why}.") from error
