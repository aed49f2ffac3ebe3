"""The commands as one, and what becomes of their errors.

A command returns its exit code or raises: a usage error ends with 2, a failure with 1 and the
problem in the form that was asked for, an interrupt with 130. A command's module is imported when
it is named, so that `status` does not pay for `serve`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, cast

import click

import orchestrator
from orchestrator.cli import INTERRUPTED
from orchestrator.cli.output import Failure
from orchestrator.errors import OrchestratorError

PROGRAM: Final = "llama-orchestrator"
_HOMES: Final = {
    "cli.serving": "run serve",
    "cli.client": "load unload cancel status plan logs events",
    "cli.pull": "pull",
    "demo.command": "demo",
    "cli.doctor": "doctor",
    "cli.picture": "diagram",
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names.split()}


class Commands(click.Group):
    """Knows the names; finds a command in its module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOME_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOME_OF:
            return None
        module = importlib.import_module(f"orchestrator.{_HOME_OF[cmd_name]}")
        return cast("click.Command", getattr(module, cmd_name))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(orchestrator.__version__, prog_name=PROGRAM)
def commands() -> None:
    """Owns one llama-server process: load, swap and unload models, never two at once."""


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
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
