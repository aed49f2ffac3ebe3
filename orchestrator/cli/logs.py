"""Log lines of the process: structlog is configured here and nowhere else (a library never does).

They go to stderr, one line an event, as text or JSON; what the standard library's loggers say
(uvicorn's, for one) takes the same way. Results go to stdout and are not logs.
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


def configure(level: Literal["info", "warning"], form: Format) -> None:
    """Send every log line of at least this level to stderr."""
    number = getattr(logging, level.upper())
    renderer: tuple[structlog.typing.Processor, ...] = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,  # rich's shows locals: secrets
        ),
    )
    if form == "json":
        renderer = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
    structlog.configure(
        processors=[*_SHARED, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
