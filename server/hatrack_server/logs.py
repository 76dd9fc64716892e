"""Structured logs on stderr: JSON lines, or colours for someone who looks at them."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging() -> None:
    """Sends structlog's and the standard library's records, and Python's warnings, through one formatter.

    For the process as a whole, front or engine's: replaces the root's handlers.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    renderers = [remove_meta, *_renderers(tty=sys.stderr.isatty())]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=renderers, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)


def _renderers(*, tty: bool) -> list[structlog.typing.Processor]:
    # Plain tracebacks in both: the prettier ones print local variables, which hold prompts and keys.
    if tty:
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
