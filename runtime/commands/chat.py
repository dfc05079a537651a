"""A conversation in a terminal: lines in, answers out as they come, a dial that turns meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.console import Console, say
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.hold import held_budget

if TYPE_CHECKING:
    from alloc_moe.runtime.execution.calls import Output
    from alloc_moe.runtime.text.model import TextModel

_HELP = """\
/budget B   run fewer or more experts from now on: a fraction as 0.3, or a whole number
/stats      the experts that ran, by layer
/clear      begin a new conversation
/help       show this
/quit       end, as Ctrl-D does; Ctrl-C ends an answer"""


class Chat:
    """A conversation with a model.

    Args:
        model: One that can chat.
        console: Answers go to its stdout, all else to stderr.
        system: What the model is told before the conversation.
        budget: The budget to begin with; None is what was compiled in.
        settings: What else every call of `TextModel.generate` gets.
    """

    def __init__(
        self,
        model: TextModel,
        console: Console,
        *,
        max_new_tokens: int,
        system: str | None = None,
        budget: str | None = None,
        settings: dict[str, Any],
    ) -> None:
        self._model, self._console, self._settings = model, console, settings
        self._max_new_tokens = max_new_tokens
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)
        self._budget = budget
        self._tokens = 0  # of the last answer and what it was asked with
        self._executed = self._no_experts()

    def run(self, lines: Iterator[str]) -> None:
        """Answer every line until there are no more, or one ends the conversation."""
        commands: dict[str, Callable[[str], None]] = {
            "/budget": self._turn,
            "/stats": self._tell_stats,
            "/clear": self._clear,
            "/help": lambda _: self._console.note(_HELP),
        }
        # What can't be is said before anything is asked.
        self._model.chat_prompt([*self._start, {"role": "user", "content": "?"}])
        if self._settings.get("hold"):
            held_budget(self._model.session, self._budget)
        elif self._budget is not None:
            price_of(self._model.session.plan, self._budget)
        self._console.note("Talk with the model; /help says what else you can do.")
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            try:
                if word in commands:
                    commands[word](rest.strip())
                elif word.startswith("/"):
                    self._console.warn(f"There is no command {word}.\n{_HELP}")
                elif word:
                    self._answer(line.strip())
            except GenerationError as error:
                self._console.warn(str(error))

    def _answer(self, text: str) -> None:
        """Answer one message; one that can't be answered is forgotten."""
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []

        def on_token(_row: int, piece: str) -> None:
            pieces.append(piece)
            self._console.stream(piece)

        room = self._room(messages)
        self._tokens, self._executed = 0, self._no_experts()
        try:
            self._model.generate(
                messages=messages,
                max_new_tokens=room,
                budget=self._budget,
                on_token=on_token,
                on_output=self._count,
                **self._settings,
            )
        except KeyboardInterrupt:
            self._console.note("\nInterrupted.")
            if not pieces:
                return
        self._console.stream("\n")
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _room(self, messages: list[dict[str, str]]) -> int:
        """Return how many tokens an answer may have in what the context leaves."""
        limit = self._model.session.context_length
        if limit is None:
            return self._max_new_tokens
        room = limit - len(self._model.encode_prompt(self._model.chat_prompt(messages)))
        if room < 1:
            raise GenerationError(
                f"The conversation fills the model's context of {limit} tokens. "
                "Begin a new one (/clear), or say less."
            )
        return min(self._max_new_tokens, room)

    def _count(self, output: Output) -> None:
        self._tokens = output.cache.length
        if output.activations is not None:
            self._executed += output.activations

    def _no_experts(self) -> NDArray[np.int64]:
        return np.zeros(len(self._model.session.plan.layers), np.int64)

    def _turn(self, budget: str) -> None:
        if not budget:
            self._console.note(f"The budget is {self._budget or 'as compiled'}. Set it: /budget B")
            return
        price_of(self._model.session.plan, budget)
        self._budget = budget
        self._console.note(f"From now on the budget is {budget}.")

    def _clear(self, _rest: str) -> None:
        self._messages = list(self._start)
        self._console.note("This is a new conversation.")

    def _tell_stats(self, _rest: str) -> None:
        plan = self._model.session.plan
        if not self._model.session.counts_activations:
            self._console.note("Experts aren't counted on a GPU: our kernels don't tell them.")
        elif not self._tokens:
            self._console.note("There is no answer yet whose experts could be told.")
        else:
            mean = self._executed / self._tokens
            self._console.note(
                f"Experts executed per token: {mean.sum():.4g} of {plan.budget.original}, over "
                f"{self._tokens} tokens of the last answer and what came before it\n"
                f"By layer: {_listed(mean)}\n"
                f"Plan:     {_listed(layer.k for layer in plan.layers)}"
            )


def typed_lines() -> Iterator[str]:
    """Yield lines from stdin, as UTF-8 whatever the locale says.

    At a terminal they can be edited, and Ctrl-C drops one.
    """
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
        return
    with contextlib.suppress(ImportError):  # not on Windows, which edits lines itself
        import readline  # noqa: F401
    while True:
        say("> ", newline=False)
        try:
            yield os.fsencode(input()).decode("utf-8", "replace")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")


def _listed(experts: Iterable[float]) -> str:
    return " ".join(f"{each:.3f}" for each in experts)
