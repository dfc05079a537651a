"""Where a command's words go: output channels, progress."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from alloc_moe.runtime.errors import AllocMoeError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

_SECONDS_BETWEEN_LINES = 5.0
_WIDTH_OF_FILES = 120
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Console:
    """Where a command's words go: the result to stdout, all else to stderr.

    Args:
        json_output: The result is one JSON object instead of text.
        quiet: Nothing but warnings and errors goes to stderr.
    """

    def __init__(self, *, json_output: bool = False, quiet: bool = False) -> None:
        self.json_output = json_output
        self.quiet = quiet
        self._live: RichConsole | None = None

    def note(self, line: str) -> None:
        """Tell the user something on stderr, unless --quiet."""
        if not self.quiet:
            self._write(line)

    def warn(self, line: str) -> None:
        """Tell the user on stderr what they should not miss, --quiet or not."""
        self._write(f"Warning: {line}")

    def result(self, result: RenderableType, data: Mapping[str, Any]) -> None:
        """Print what the user asked for on stdout.

        Args:
            result: Text or a rich renderable, printed as it is unless --json.
            data: The same as one JSON object. Numbers that JSON lacks (NaN, infinity) become null.
        """
        if self.json_output:
            _print(json.dumps(_without_nan(data), allow_nan=False) + "\n")
        elif isinstance(result, str):
            _print(result + "\n")
        else:
            from rich.console import Console as RichConsole

            with _written():
                width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
                RichConsole(file=sys.stdout, width=width).print(result)
                sys.stdout.flush()

    def stream(self, piece: str) -> None:
        """Print a piece of the result on stdout at once, unless --json."""
        if not self.json_output:
            _print(piece)

    @contextmanager
    def progress(
        self, description: str, total: int | None, *, unit: str = "steps", done: int = 0
    ) -> Iterator[Progress]:
        """Report work, its rate and the time left on stderr while the block runs.

        A bar where stderr is a terminal, else a line every few seconds and one at the end.

        Args:
            description: What is being done, such as ``"Profiling"``.
            total: Units of work in all; None if unknown.
            unit: What is counted, in the plural.
            done: Units done before, by a run that is now resumed. The rate leaves them out.
        """
        if self.quiet:
            yield Progress(description, total, unit=unit, done=done)
        elif sys.stderr.isatty() and self._live is None:
            with self._bar(description, total, unit=unit, done=done) as progress:
                yield progress
        else:
            progress = Progress(description, total, unit=unit, done=done, report=self._write)
            yield progress
            self._write(progress.summary())

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Report work that can't be counted while the block runs."""
        with self.progress(description, 1, unit="step") as progress:
            yield
            progress.advance(1)

    @contextmanager
    def _bar(
        self, description: str, total: int | None, *, unit: str, done: int
    ) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._live = RichConsole(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
        )
        try:
            with RichProgress(*columns, console=self._live) as bar:
                task = bar.add_task(description, total=total, completed=done, state="")

                def report(_: str) -> None:
                    bar.update(
                        task,
                        completed=progress.done,
                        total=progress.total,
                        state=progress.state(),
                    )

                progress = Progress(
                    description, total, unit=unit, done=done, report=report, every_seconds=0.1
                )
                yield progress
                report("")
        finally:
            self._live = None

    def _write(self, line: str) -> None:
        line = printable(line)
        if self._live is None:
            say(line)
        else:  # above the bar, which click.echo would tear
            self._live.print(line, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Counts units of work and reports them, no more often than ``every_seconds``."""

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str,
        done: int = 0,
        report: Callable[[str], None] | None = None,
        every_seconds: float = _SECONDS_BETWEEN_LINES,
    ) -> None:
        self.done = done
        self.total = total
        self._description = description
        self._unit = unit
        self._report = report
        self._every_seconds = every_seconds
        self._done_before = done
        self._start = self._last_report = time.monotonic()

    def expect_more(self, n: int) -> None:
        """Add n units to a total that is all done: there turned out to be more work."""
        if self.total is not None and self.done >= self.total:
            self.total += n

    def advance(self, n: int = 1) -> None:
        """Count n more units as done."""
        self.done += n
        now = time.monotonic()
        due = now - self._last_report >= self._every_seconds and self.done != self.total
        if self._report and due:  # what is complete is told by the summary
            self._last_report = now
            self._report(f"{self._description}: {self.state()}")

    def state(self) -> str:
        """Return count, rate and time left, such as ``12/48 layers, 2.5/s, 14 s left``."""
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        rate = (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{count} {self._unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """Return one line on all the work done."""
        count = self.done - self._done_before
        seconds = time.monotonic() - self._start
        return f"{self._description}: {count} {self._unit} in {duration(seconds)}"


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return a text whose control characters are spelled out: a terminal would obey them.

    That is of words that come from an artifact, a file or a command line; what turns the direction
    of writing is among them.
    """
    if text.isascii() and text.isprintable():  # almost always
        return text
    return "".join(_spelled(c) if c not in keep and _controls(c) else c for c in text)


def say(line: str, *, newline: bool = True) -> None:
    """Print a line on stderr; where that is closed or full, the work matters more."""
    try:
        click.echo(line, err=True, nl=newline)
    except (OSError, ValueError):
        mute(sys.stderr)


def mute(stream: IO[str] | None) -> None:
    """Let a stream that can't be written lead nowhere, so that it doesn't fail again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's has no descriptor
        assert stream is not None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _print(text: str) -> None:
    """Print a piece of the result."""
    with _written():
        if sys.stdout.isatty():  # also the model's own text: a terminal must not obey it
            text = "".join(_spelled(c) if _steers(c) else c for c in text)
        click.echo(text, nl=False)


@contextmanager
def _written() -> Iterator[None]:
    if sys.stdout is None:
        raise AllocMoeError("The result can't be printed: stdout is closed.")
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has enough: no error of anyone
            raise
        mute(sys.stdout)
        raise AllocMoeError(
            f"The result can't be printed: {error.strerror or error}. Send stdout elsewhere."
        ) from error


def _steers(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in _DIRECTIONS


def _spelled(character: str) -> str:
    return repr(character)[1:-1]


def duration(seconds: float) -> str:
    """Return a length of time for people: ``0.3 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def _without_nan(data: Any) -> Any:  # any JSON value
    if isinstance(data, Mapping):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
