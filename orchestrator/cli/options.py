"""Options shared by the commands, and the split between our options and llama-server's flags.

A command that takes a model passes every unknown flag on to llama-server, unread and in order.
click never sees those, because its prefix rules would read `-mg 0` as `-m g`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from orchestrator.base.key_file import keys_in_text
from orchestrator.errors import OrchestratorError
from orchestrator.settings.fields import SETTINGS, type_of
from orchestrator.settings.request import LoadRequest

DEFAULT_PORT: Final = 8642
DEFAULT_URL: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
API_KEY_VARIABLE: Final = "LLAMA_ORCHESTRATOR_API_KEY"
_FLAGS: Final = "llama_server_flags"
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


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

    MODEL must come before any llama-server flag, because after one a bare word may be the flag's
    value. Everything after `--` is llama-server's. `takes_value` has every spelling of our options.
    """
    ours: list[str] = []
    theirs: list[str] = []
    tokens = iter(args)
    for token in tokens:
        name = token.partition("=")[0] if token.startswith("--") else token
        if token == "--":  # noqa: S105 (not a secret)
            theirs += tokens
        elif name in takes_value:
            ours.append(token)
            if takes_value[name] and name == token:
                ours += islice(tokens, 1)
        elif theirs or token.startswith("-"):
            theirs.append(token)
        else:
            ours.append(token)
    return ours, theirs


def _read(path: str, hint: str | None = None) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise click.BadParameter(f"{path}: {why}.", param_hint=hint) from error


def setting(name: str, *spellings: str, metavar: str | None = None) -> click.Option:
    """Return the option of a setting; its value is checked when the request is built."""
    row, type_ = SETTINGS[name], type_of(name)
    names = [*(spellings or row.option or (f"--{name.replace('_', '-')}",)), name]
    help_ = f"{row.help[0].upper()}{row.help[1:]}.".replace("null = ", "default: ")
    if type_ is bool:
        return click.Option(names, is_flag=True, help=help_)
    return click.Option(
        names,
        type=type_,
        metavar=metavar or row.metavar or "|".join(row.choices),
        help=help_,
        shell_complete=lambda _ctx, _param, begun: [c for c in row.choices if c.startswith(begun)],
    )


_OPTIONAL: Final = [n for n, row in SETTINGS.items() if row.option != () and n != "revision"]

JSON: Final = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.")
HUB: Final = (
    setting("revision"),
    click.Option(
        ["--hf-token-file", "hf_token"],
        type=_read,
        metavar="F",
        help="File with a Hub token; default: HF_TOKEN, then `hf auth login`.",
    ),
)


def complete_model(
    _ctx: click.Context, _param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Complete a repo of the cache, or a file."""
    from orchestrator.models.on_disk import cached_repos

    repos = [CompletionItem(name) for name in cached_repos() if name.startswith(begun)]
    return [*repos, CompletionItem(begun, type="file")]


def model_options(complete: Complete) -> tuple[click.Parameter, ...]:
    """Return MODEL and the settings of a load; MODEL comes first."""
    return (
        click.Argument(["model"], required=False, shell_complete=complete),
        click.Option(
            ["-m", "--model", "model_option"],
            metavar="MODEL",
            shell_complete=complete,
            help="A .gguf file, a folder, or owner/name[:VARIANT] on the Hub.",
        ),
        *(setting(name) for name in _OPTIONAL if type_of(name) is not bool),
        click.Option(
            ["--chat-template-file", "chat_template_override"],
            type=_read,
            metavar="F",
            help="File with a Jinja template; default: the model's own.",
        ),
        *HUB,
    )


MODEL: Final = model_options(complete_model)
MODEL_ARGUMENT: Final = MODEL[0]
START: Final = tuple(setting(name) for name in _OPTIONAL if type_of(name) is bool)


def one_of(model: str | None, model_option: str | None) -> str | None:
    """Return the MODEL of a command line, which may be a word or an option."""
    if model and model_option:
        raise click.UsageError("MODEL is given twice: give it as a word or with -m.")
    return model or model_option


def flags_given() -> list[str]:
    """Return the flags of llama-server on the command line."""
    return list(click.get_current_context().meta.get(_FLAGS, ()))


def load_request(
    model: str | None,
    model_option: str | None = None,
    **fields: Any,
) -> LoadRequest:
    """Build the request of a command line."""
    path = one_of(model, model_option)
    if not path:
        raise click.UsageError(
            "MODEL is missing: give it before any llama-server flag, or with -m MODEL."
        )
    members = {name: value for name, value in fields.items() if value is not None}
    members["model_path"] = path
    if flags := flags_given():
        members["llama_extra_args"] = tuple(flags)
    try:
        return LoadRequest.from_dict(members)
    except OrchestratorError as error:
        raise click.UsageError(error.message) from error


def keys_in(path: str | None) -> tuple[str, ...]:
    """Return the API keys in a file, one a line; without a file, those in the environment."""
    if path is not None:
        where, text = f"--api-key-file {path}", _read(path, "'--api-key-file'")
    elif text := os.environ.get(API_KEY_VARIABLE, ""):
        where = API_KEY_VARIABLE
    else:
        return ()
    try:
        return keys_in_text(text)
    except ValueError as error:
        raise click.UsageError(f"{where} {error}.") from None
