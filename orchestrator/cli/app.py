"""The commands, and the exit code of each error.

A command returns its exit code or raises: a usage error ends with 2, a failure with 1, an
interrupt with 130.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, TextIO

import click

import orchestrator
from orchestrator.cli import INTERRUPTED
from orchestrator.cli.output import Failure, prepare_streams
from orchestrator.errors import OrchestratorError

PROGRAM: Final = "llama-orchestrator"
_COMMANDS: Final = {
    "cli.serving": "run serve",
    "cli.client": "load unload cancel status plan logs events",
    "cli.chat": "chat",
    "cli.pull": "pull",
    "cli.models": "models",
    "demo.command": "demo",
    "cli.doctor": "doctor",
    "cli.picture": "diagram",
}
_UNWRITABLE: Final = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG}
_MODULE_OF: Final = {name: module for module, names in _COMMANDS.items() for name in names.split()}


class LazyGroup(click.Group):
    """Imports a command when it is named, so that `status` does not pay for `serve`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _MODULE_OF and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], _MODULE_OF, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULE_OF:
            return None
        module = importlib.import_module(f"orchestrator.{_MODULE_OF[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(orchestrator.__version__, prog_name=PROGRAM)
def commands() -> None:
    """Load, swap and unload models of llama.cpp, never with two llama-servers at once."""


def run(args: Sequence[str] | None) -> int:
    """Run one command line and return its exit code, whatever becomes of its output."""
    prepare_streams()
    try:
        code = commands.main(args, prog_name=PROGRAM, standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        return _shown(error)
    except OrchestratorError as error:
        return _shown(Failure(error.problem.as_dict()))
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _discard(sys.stdout)
        if error.errno != errno.EPIPE:  # its reader has seen enough
            _shown(click.ClickException(f"the output cannot be written: {error.strerror}"))
        return 1
    return code if isinstance(code, int) else 0


def _shown(error: click.ClickException) -> int:
    try:
        error.show()
    except (OSError, SystemExit):  # rich makes the second of a broken pipe
        _discard(sys.stdout, sys.stderr)
    return error.exit_code


def _discard(*streams: TextIO) -> None:
    """Have what is flushed at the exit go nowhere; it would end the process with 120."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
