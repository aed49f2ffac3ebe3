"""`diagram`: the state machine as text or picture, straight from the table."""

from __future__ import annotations

from typing import Literal

import click

from orchestrator.cli.output import say_json


@click.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "dot", "svg", "md"]),
    default="mermaid",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print it inside a JSON document.")
def diagram(form: Literal["mermaid", "dot", "svg", "md"], *, as_json: bool) -> None:
    """Print the state machine."""
    from orchestrator.machine import diagram as drawing

    draw = {
        "mermaid": drawing.mermaid,
        "dot": drawing.dot,
        "svg": drawing.svg,
        "md": drawing.markdown,
    }
    text = draw[form]()
    if as_json:
        say_json({"format": form, "text": text})
    else:
        click.echo(text, nl=not text.endswith("\n"))
