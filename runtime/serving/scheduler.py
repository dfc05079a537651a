"""Requests -> rows of batches: who waits, who joins, who is told what, and when it is over."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from alloc_moe.runtime.errors import AllocMoeError
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.providers import ORT_ERRORS, ort_message
from alloc_moe.runtime.execution.rows import moves_rows
from alloc_moe.runtime.serving.batch import Batch, Row, batch_of
from alloc_moe.runtime.serving.metrics import Metrics
from alloc_moe.runtime.text.answers import Answer, Stopped

logger = logging.getLogger(__name__)

_UNABLE: tuple[type[Exception], ...] = (AllocMoeError, MemoryError, *ORT_ERRORS)
"""What a call of the model, or making room for one, may end in: that for want of memory too."""

Failure = Literal["timeout", "error", "closing"]
MESSAGES: dict[Failure, str] = {
    "timeout": "The request took longer than the server allows. Ask for less, or later.",
    "error": "The server can't run the model. Its log says why.",
    "closing": "The server is shutting down. Ask another one.",
}
"""What clients are told of a failure."""


class OverloadedError(AllocMoeError):
    """The queue is full; try again later."""


class ClosingError(AllocMoeError):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """Text that one more token of a choice gives; ``stopped`` is set with its last one.

    ``experts`` are those executed per token and MoE layer in the call before, if they are counted.
    """

    choice: int
    text: str
    experts: tuple[float, ...] | None = None
    stopped: Stopped | None = None


@dataclass(frozen=True)
class Failed:
    """Why there is no more of a request."""

    kind: Failure
    message: str


@dataclass(eq=False)
class Choice:
    """One of a request's answers, and the row that computes it."""

    row: Row
    answer: Answer
    max_new_tokens: int


@dataclass(eq=False)
class Request:
    """What a client asked for.

    ``tell`` is called in the scheduler's thread and must not wait. After the last piece of each
    choice, or a `Failed`, it isn't called any more.
    """

    choices: Sequence[Choice]
    tell: Callable[[Piece | Failed], None]
    deadline: float  # of time.monotonic()
    cancelled: bool = False


class Scheduler:
    """Has one thread compute what many ask for.

    Args:
        session: The model.
        most_rows: The most sequences that are decoded at a time. That is one where the tokens of a
            call compete for experts, so that an answer would depend on others, and where the rows
            of caches can't be moved.
        most_waiting: The most sequences in the queue.
    """

    def __init__(
        self, session: Session, metrics: Metrics, *, most_rows: int, most_waiting: int
    ) -> None:
        self._session, self._metrics = session, metrics
        apart = session.plan.tokens_compete or not moves_rows(session)
        self.most_rows = 1 if apart else most_rows
        self.most_waiting = most_waiting
        self._waiting: deque[tuple[Request, Choice]] = deque()
        self._running: dict[Row, tuple[Request, Choice]] = {}
        self._batches: dict[Hashable, Batch] = {}
        self._changed = threading.Condition()
        self._is_open = True
        metrics.watch(
            {"running": lambda: len(self._running), "waiting": lambda: len(self._waiting)}
        )
        self._thread = threading.Thread(target=self._work, name="alloc-moe", daemon=True)
        self._thread.start()

    @property
    def most(self) -> int:
        """How many sequences there can be at all, in the queue and out of it."""
        return self.most_rows + self.most_waiting

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._is_open

    def submit(self, request: Request) -> None:
        """Put a request in the queue.

        Raises:
            OverloadedError: The queue is full.
            ClosingError: The server is about to end.
        """
        with self._changed:
            if not self._is_open:
                raise ClosingError(MESSAGES["closing"])
            there = len(self._waiting) + len(self._running)
            if there + len(request.choices) > self.most:
                raise OverloadedError(
                    f"The server is busy: {there} answers are being written or wait, of at most "
                    f"{self.most}, and {len(request.choices)} were asked for. Try again later."
                )
            self._waiting.extend((request, choice) for choice in request.choices)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Compute no more for a request; its rows are free after the step that runs."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no more requests, fail those there are, and end after the step that runs."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._wait():
                self._drop()
                self._admit()
                self._step()
        except BaseException:  # a panic of a library in Rust is no Exception
            # No request may wait forever, and nothing of it is for clients.
            logger.exception("The server stops computing: this is a bug of alloc-moe.")
            self._fail_all("error")
        else:
            self._fail_all("closing")

    def _wait(self) -> bool:
        """Wait until there is something to do; return False when it is time to end."""
        with self._changed:
            while self._is_open and not self._waiting and not self._running:
                self._changed.wait()
            return self._is_open

    def _drop(self) -> None:
        """End what nobody waits for any more."""
        now = time.monotonic()
        with self._changed:
            entries = [*self._waiting, *self._running.values()]
        for request, choice in entries:
            if now > request.deadline:
                self._fail(request, "timeout")
            if request.cancelled:
                self._metrics.add("cancelled_total")
                self._forget(request, choice)

    def _forget(self, request: Request, choice: Choice) -> None:
        with self._changed:
            if (request, choice) in self._waiting:
                self._waiting.remove((request, choice))
        if self._running.pop(choice.row, None) is not None:
            self._batches[batch_of(self._session, choice.row)].leave(choice.row)

    def _admit(self) -> None:
        """Compute the prompts of those who wait, as long as there is room."""
        while len(self._running) < self.most_rows:
            with self._changed:
                if not self._waiting:
                    return
                request, choice = self._waiting[0]  # where it stays while it is computed
            if not request.cancelled:
                self._start(request, choice)
            else:
                self._metrics.add("cancelled_total")
            with self._changed:
                self._waiting.popleft()

    def _start(self, request: Request, choice: Choice) -> None:
        """Compute a prompt, and have its row go on with others if it does."""
        row = choice.row
        key = batch_of(self._session, row)
        batch = self._batches.setdefault(key, Batch(self._session, row.price))
        try:
            cache = batch.prefill(row)
            self._metrics.add("prompt_tokens_total", len(row.prompt_ids))
            if self._told(request, choice):
                batch.join(row, cache)
                self._running[row] = (request, choice)
        except _UNABLE as error:
            told = ("A prompt of %d tokens has failed: %s", len(row.prompt_ids), _words(error))
            logger.warning(*told, exc_info=not isinstance(error, AllocMoeError))
            self._fail(request, "error")

    def _step(self) -> None:
        """Have every batch go on by one token."""
        for key, batch in list(self._batches.items()):
            rows = batch.rows
            if not rows:
                del self._batches[key]
                continue
            try:
                failed = batch.step()
            except _UNABLE as error:
                told = ("A step of %d sequences has failed: %s", len(rows), _words(error))
                logger.warning(*told, exc_info=not isinstance(error, AllocMoeError))
                del self._batches[key]  # with its cache, which may be half written
                for row in rows:
                    request, _ = self._running.pop(row)
                    self._fail(request, "error")
                continue
            self._metrics.add("steps_total")
            self._metrics.add("step_rows_total", len(rows))
            for row, problem in failed.items():
                logger.warning("A sequence has failed: %s", problem)
                request, _ = self._running.pop(row)
                self._fail(request, "error")
            for row in batch.rows:
                request, choice = self._running[row]
                if request.cancelled:
                    continue
                if not self._told(request, choice):
                    del self._running[row]
                    batch.leave(row)

    def _told(self, request: Request, choice: Choice) -> bool:
        """Tell a request of a row's newest token; return whether more follow."""
        row, answer = choice.row, choice.answer
        text = answer.push(row.ids[-1])
        experts = row.last_executed
        self._metrics.add("generated_tokens_total")
        if answer.stopped is None and len(row.ids) < choice.max_new_tokens:
            stopped = None
        else:
            text += answer.flush()
            stopped = answer.stopped or "length"
            if row.executed is not None:
                self._metrics.add("executed_experts_total", int(row.executed.sum()))
                self._metrics.add("counted_tokens_total", row.computed)
        place = request.choices.index(choice)
        request.tell(
            Piece(place, text, None if experts is None else tuple(experts.tolist()), stopped)
        )
        return stopped is None

    def _fail(self, request: Request, kind: Failure) -> None:
        if not request.cancelled:
            request.cancelled = True
            request.tell(Failed(kind, MESSAGES[kind]))

    def _fail_all(self, kind: Failure) -> None:
        with self._changed:
            self._is_open = False
            entries = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            self._running.clear()
        for request, _ in entries:
            self._fail(request, kind)


def _words(error: Exception) -> str:
    """Return what an error says, on one line; one that says nothing has a name."""
    return ort_message(error) or type(error).__name__
