"""`diagram`: the state machine as text or a picture, generated from the transition table."""

from __future__ import annotations

from typing import Final

import click

from orchestrator.cli import options
from orchestrator.cli.output import say_json
from orchestrator.machine.diagram import dot, markdown, mermaid, svg

_RENDERERS: Final = {"mermaid": mermaid, "dot": dot, "svg": svg, "md": markdown}


@click.command(params=[options.JSON])
@click.option(
    *("--format", "form"),
    type=click.Choice(list(_RENDERERS)),
    default="mermaid",
    show_default=True,
    help="Format of the diagram.",
)
def diagram(*, form: str, as_json: bool) -> None:
    """Print the state machine as a diagram."""
    text = _RENDERERS[form]()
    if as_json:
        say_json({"format": form, "text": text})
    else:
        click.echo(text, nl=not text.endswith("\n"))
