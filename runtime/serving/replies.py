"""What was computed -> OpenAI's objects."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.serving.protocol import Asked
from alloc_moe.runtime.serving.scheduler import Piece
from alloc_moe.runtime.text.answers import Stopped

Reply = dict[str, Any]
"""A JSON object."""

_REASONS: dict[Stopped, str] = {"eos": "stop", "stop_string": "stop", "length": "length"}


class Writer:
    """Writes the replies to one request.

    Args:
        asked: The request.
        model: The model's name.
        plan: The model's.
        chat: Whether they answer messages, or continue texts.
    """

    def __init__(self, asked: Asked, model: str, plan: AllocationPlan, *, chat: bool) -> None:
        self._asked, self._plan, self._chat = asked, plan, chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._started: set[int] = set()

    def whole(self, pieces: Sequence[Piece]) -> Reply:
        """Return the reply that has everything."""
        texts = ["" for _ in self._asked.choices]
        reasons: list[str | None] = [None for _ in texts]
        for piece in pieces:
            texts[piece.choice] += piece.text
            if piece.stopped is not None:
                reasons[piece.choice] = _REASONS[piece.stopped]
        choices = []
        for place, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self._chat else {"text": text}
            choices.append({"index": place, **said, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": self._usage(),
            "alloc_moe": self._report(),
        }

    def part(self, piece: Piece) -> Reply | None:
        """Return one reply of a stream, None if there is nothing to say."""
        experts = piece.experts if self._asked.experts else None
        if not piece.text and piece.stopped is None and experts is None:
            return None
        if self._chat:
            first = {} if piece.choice in self._started else {"role": "assistant"}
            said: Reply = {"delta": {**first, "content": piece.text}}
        else:
            said = {"text": piece.text}
        self._started.add(piece.choice)
        reason = None if piece.stopped is None else _REASONS[piece.stopped]
        reply = self._chunk(
            [{"index": piece.choice, **said, "logprobs": None, "finish_reason": reason}]
        )
        if experts is not None:
            reply["alloc_moe"] = {"experts_per_layer": experts}
        return reply

    def last(self) -> Reply | None:
        """Return the reply that ends a stream, if it was asked for: what it took."""
        if not self._asked.usage:
            return None
        return {**self._chunk([]), "usage": self._usage(), "alloc_moe": self._report()}

    def _chunk(self, choices: list[Reply]) -> Reply:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _usage(self) -> Reply:
        given = self._asked.prompt_tokens
        new = sum(len(choice.row.ids) for choice in self._asked.choices)
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}

    def _report(self) -> Reply:
        """Return what only this server says: the experts that ran, and how tokens were drawn."""
        rows = [choice.row for choice in self._asked.choices]
        counted = [row.executed for row in rows if row.executed is not None]
        report: Reply = {
            "budget": self._asked.budget,
            "hold": self._asked.hold,
            "activations": self._plan.budget.original,
            "seed": self._asked.seed,
        }
        if counted:
            means = np.sum(counted, axis=0) / sum(row.computed for row in rows)
            report["experts_per_layer"] = [round(float(mean), 4) for mean in means]
            report["experts_per_token"] = round(float(means.sum()), 4)
        return report


def error_reply(message: str, *, status: int, code: str | None = None) -> Reply:
    """Return what tells a client why there is no answer."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def event(reply: Mapping[str, Any] | str) -> str:
    """Return a server-sent event."""
    data = reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False)
    return f"data: {data}\n\n"
