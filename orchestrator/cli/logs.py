"""Configures structlog and `logging` for the process, which the library itself never does.

Log lines go to stderr, one for each event, as text or JSON, including those of other libraries
such as uvicorn. Results go to stdout and are not logs.
"""

from __future__ import annotations

import logging
import sys
from typing import Final, Literal

import structlog

Format = Literal["console", "json"]

_SHARED: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure(level: int, form: Format) -> None:
    """Send every log line of at least this level to stderr."""
    renderers: list[structlog.typing.Processor]
    renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    if form == "console":
        plain = structlog.dev.plain_traceback  # rich's shows locals: secrets
        colors = sys.stderr.isatty()
        renderers = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    structlog.configure(
        processors=[*_SHARED, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
