"""Errors that are nobody's bug: of the system, of streams, of onnxruntime, of the tokenizer."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from alloc_moe.runtime.console import mute, say


class Command(click.Command):
    """A command that ends in one sentence, whatever its streams lead to."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command, as click does."""
        _keep_streams_free()
        try:
            return super().main(*args, **options)
        except OSError as error:  # of printing: what a command does tells its own errors
            mute(sys.stdout)
            say(f"Error: {foreign(error) or error}")
            sys.exit(1)


def foreign(error: BaseException) -> str | None:
    """Return what to tell of an error that another library or the system raised.

    None if it may be a bug, whose traceback is wanted, or is no error at all.
    """
    kind = type(error)
    if isinstance(error, OSError):
        return None if error.errno == errno.EPIPE else _of_system(error)
    if isinstance(error, MemoryError):
        return "There isn't enough memory. Ask for less at once, or use a machine with more."
    if kind.__module__.startswith("onnxruntime"):
        return f"onnxruntime failed: {' '.join(str(error).split())}"
    if kind.__name__ == "PanicException":  # of a library in Rust; no Exception
        return f"The tokenizer failed: {' '.join(str(error).split())}"
    return None


def _of_system(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None and not _in_a_folder():
        return "The working folder doesn't exist any more. Change to another."
    if error.filename is None:
        return f"The system reports: {reason}."
    return f"{os.fsdecode(str(error.filename))} can't be used: {reason}. Give another path."


def _in_a_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _keep_streams_free() -> None:
    """Have closed streams lead nowhere: the next file opened would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
