"""Keep what libraries print off the user's terminal, where only the command itself speaks."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

LIBRARY_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError),
    *(RuntimeError, AssertionError, ImportError, StrictDataclassError),
)
"""What transformers and torch raise for files whose content they can't use."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop prints, warnings, progress bars and log lines below errors while the block lasts.

    For calls of transformers and torch that succeed or raise: their notes are about their own code.
    """
    disabled = logging.root.manager.disable
    bars = transformers_logging.is_progress_bar_enabled()
    # Not by level: torch and transformers give many of their loggers a level and a handler each.
    logging.disable(max(disabled, logging.WARNING))
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        logging.disable(disabled)


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
