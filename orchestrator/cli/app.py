"""The commands, and the exit code of each error.

A command returns its exit code or raises: a usage error ends with 2, a failure with 1, an
interrupt with 130.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

import orchestrator
from orchestrator.cli import INTERRUPTED
from orchestrator.cli.output import Failure
from orchestrator.errors import OrchestratorError

PROGRAM: Final = "llama-orchestrator"
_COMMANDS: Final = {
    "cli.serving": "run serve",
    "cli.client": "load unload cancel status plan logs events",
    "cli.pull": "pull",
    "demo.command": "demo",
    "cli.doctor": "doctor",
    "cli.picture": "diagram",
}
_MODULE_OF: Final = {name: module for module, names in _COMMANDS.items() for name in names.split()}


class LazyGroup(click.Group):
    """Imports a command when it is named, so that `status` does not pay for `serve`."""

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
    """Run one command line and return its exit code."""
    try:
        code = commands.main(args, prog_name=PROGRAM, standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OrchestratorError as error:
        Failure(error.problem.as_dict()).show()
        return 1
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
