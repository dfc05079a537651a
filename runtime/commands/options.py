"""What commands share: options, the console they talk to, errors and exit codes."""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import click

from alloc_moe.runtime.commands.failures import foreign
from alloc_moe.runtime.commands.numeric import BudgetText, Threads
from alloc_moe.runtime.console import Console, printable, say
from alloc_moe.runtime.errors import AllocMoeError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""

ep_option = click.option(
    "--ep",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Execution provider; auto is CUDA if it can be used, else the CPU.",
)
threads_option = click.option(
    "--threads",
    type=Threads(),
    help="Threads that share the work; by default one per physical core.",
)
session_option = click.option(
    "--session",
    "session_entries",
    metavar="NAME=VALUE",
    multiple=True,
    callback=lambda _context, _option, entries: dict(map(_named_value, entries)),
    help="What else to tell onnxruntime: an option of its sessions, as enable_cpu_mem_arena=0, or "
    "an entry of their configuration, as session.intra_op.allow_spinning=0. Repeatable.",
)
budget_option = click.option(
    "--budget",
    type=BudgetText(),
    help="Activations per token, for artifacts compiled with --redistribute price: a fraction of "
    "the full model's with a decimal point, or a whole number. Default: as compiled.",
)
hold_option = click.option(
    "--hold",
    is_flag=True,
    help="Hold the budget on any text: the price is steered so that the mean over 256 tokens stays "
    "near it. For artifacts with a price, on the CPU.",
)
tokenizer_option = click.option(
    "--tokenizer", type=click.Path(), help="tokenizer.json, or its folder, if it isn't found."
)
chat_template_option = click.option(
    "--chat-template", type=click.Path(), help="A jinja2 file, if the model has none of its own."
)


def _named_value(entry: str) -> tuple[str, str]:
    name, separator, value = entry.partition("=")
    if not (name and separator):
        raise click.BadParameter(f"{entry!r} is not NAME=VALUE.")
    return name, value


def common_options(function: Callable[Concatenate[Console, P], R]) -> Callable[P, R]:
    """Give a command --json, --quiet and --debug, a `Console` as first argument, and exit codes.

    Place it right above the function, below click's decorators::

        @click.command(epilog=examples("alloc-run out.onnx --prompt 'The committee'"))
        @click.argument("artifact")
        @common_options
        def run_command(console: Console, artifact: str) -> None: ...

    An `AllocMoeError` becomes one paragraph on stderr and exit code 1 (with --debug: a traceback),
    and so do errors of the system, of onnxruntime and of the tokenizer that nobody foresaw. Ctrl-C
    becomes one line and 130. Any other exception is a bug and keeps its traceback.
    """

    @click.option(
        "--json", "json_output", is_flag=True, help="Print one JSON object on stdout, nothing else."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but warnings, errors.")
    @click.option("--debug", is_flag=True, help="Log details; show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.pop("debug"))
        console = Console(
            json_output=bool(kwargs.pop("json_output")), quiet=bool(kwargs.pop("quiet"))
        )
        with _logging(console, debug=debug):
            try:
                return function(console, *args, **kwargs)
            except AllocMoeError as error:
                if debug:
                    raise
                raise click.ClickException(printable(str(error))) from error
            except KeyboardInterrupt:
                say("Interrupted.")
                sys.exit(INTERRUPTED)
            except BaseException as error:
                message = foreign(error)
                if message is None:
                    raise
                if debug:
                    traceback.print_exc()
                raise click.ClickException(printable(message)) from error

    return command


def examples(*commands: str) -> str:
    """Return an epilog for click that shows command lines as they are typed."""
    heading = "Example:" if len(commands) == 1 else "Examples:"
    return "\n".join(["\b", heading, *(f"  {command}" for command in commands)])


class _ConsoleHandler(logging.Handler):
    """Logs through the console, so that lines don't tear a progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            self._console.warn(line)
        else:
            self._console.note(line)


@contextmanager
def _logging(console: Console, *, debug: bool) -> Iterator[None]:
    """Show this package's log on stderr while a command runs, then leave logging as it was."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")  # a model may say what the terminal's encoding lacks
    logger = logging.getLogger("alloc_moe")
    handler, level = _ConsoleHandler(console), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
