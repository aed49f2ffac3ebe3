"""Whether a chat template can be parsed at all, asked before anything is stopped for it.

llama.cpp's engine and jinja2 differ in the tags, filters and tests they know: those are never
judged, nor is a template of more than 128 Ki characters. Without jinja2, which comes with the
extras, the server is left to judge.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from orchestrator.errors import InvalidRequest

_MAX_CHARACTERS: Final = 1 << 17  # a longer one takes jinja2 seconds; models have at most a tenth
_CLOSERS: Final = {"elif", "else"} | {
    "end" + tag for tag in ("block", "call", "filter", "for", "if", "macro", "set", "with")
}


def check_template(text: str, field: str) -> None:
    """Refuse a template with a broken delimiter or expression, or with a block left open.

    Args:
        text: A template, or the name of one that is built into the server.
        field: The setting it comes from.

    Raises:
        InvalidRequest: names the field, the line and what is wrong there.
    """
    if len(text) > _MAX_CHARACTERS:
        return
    try:
        parse = _parser()
    except ImportError:
        return
    if (problem := parse(text)) is not None:
        line, what = problem
        message = f"{field} cannot be parsed: line {line}: {what}"
        raise InvalidRequest.because(message, field=field)


@cache
def _parser() -> Any:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.parser import Parser

    class Lenient(Parser):
        """A parser that skips the tags it does not know."""

        def fail_unknown_tag(self, name: str, lineno: int | None = None) -> Any:
            if name in _CLOSERS:
                super().fail_unknown_tag(name, lineno)
            while self.stream.current.type not in {"block_end", "eof"}:
                next(self.stream)  # the caller goes on from the end of the block

    environment = Environment(  # noqa: S701 (nothing is rendered)
        extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"]
    )

    def parse(text: str) -> tuple[int, str] | None:
        try:
            Lenient(environment, text).parse()
        except TemplateSyntaxError as error:
            return error.lineno, error.message or "syntax error"
        except (RecursionError, ValueError):
            return None  # too deep, or a number too long, for Python: the server judges
        return None

    return parse
