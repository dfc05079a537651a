"""What a request is told of a call that fails, and what happens where nobody listens."""

from __future__ import annotations

import asyncio
import queue
import time
from typing import Any

import pytest

from alloc_moe.runtime.serving import batch
from alloc_moe.runtime.serving.metrics import Metrics
from alloc_moe.runtime.serving.scheduler import MESSAGES, Choice, Failed, Request, Scheduler
from alloc_moe.runtime.serving.server import request_of
from alloc_moe.runtime.text.answers import Answer
from alloc_moe.runtime.text.model import TextModel
from alloc_moe.runtime.text.sampling import Sampling


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no room\nfor it"), "no room for it"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "MemoryError"),
    ],
    ids=str,
)
def test_an_error_without_a_sentence_is_told_in_one_and_the_server_goes_on(
    model: TextModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    words: str,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    scheduler = Scheduler(model.session, Metrics(), most_rows=1, most_waiting=1)
    told: queue.Queue[Any] = queue.Queue()

    def ask_once() -> Any:
        ids = (5, 6, 7)
        answer = Answer(model.tokenizer, ids, eos_ids=model.eos_ids, stop_strings=())
        choice = Choice(batch.Row(ids, Sampling()), answer, 1)
        scheduler.submit(Request([choice], told.put, time.monotonic() + 60))
        return told.get(timeout=60)

    with monkeypatch.context() as patch:
        patch.setattr(model.session, "run", broken)
        assert ask_once() == Failed("error", MESSAGES["error"])
    assert caplog.messages == [f"A prompt of 3 tokens has failed: {words}"]
    assert ask_once().stopped == "length"
    scheduler.close()


def test_a_request_whose_loop_has_ended_is_given_up_in_silence() -> None:
    loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
    events: asyncio.Queue[Any] = asyncio.Queue()
    request = request_of([], loop, events, 0)
    request.tell(Failed("error", "first"))
    loop.run_until_complete(asyncio.sleep(0))
    assert events.qsize() == 1
    assert not request.cancelled
    loop.close()
    request.tell(Failed("error", "second"))
    assert request.cancelled
    assert events.qsize() == 1
