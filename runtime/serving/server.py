"""What the routes do: a request read, its work watched, its answer written."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.types import Receive, Scope, Send

from alloc_moe.runtime.serving.metrics import Metrics
from alloc_moe.runtime.serving.protocol import (
    MOST_BYTES,
    Asked,
    RequestError,
    chat_asked,
    completion_asked,
)
from alloc_moe.runtime.serving.replies import Reply, Writer, error_reply, event
from alloc_moe.runtime.serving.scheduler import Choice, Failed, Piece, Request, Scheduler
from alloc_moe.runtime.text.model import TextModel

_FAILURES = {"timeout": 504, "error": 500, "closing": 503}
Events = asyncio.Queue[Piece | Failed]


@dataclass(frozen=True)
class Limits:
    """What clients get at most.

    ``rows`` are decoded at a time, ``waiting`` may be in the queue, an answer has up to
    ``new_tokens``, and a request may take ``seconds``.
    """

    rows: int = 16
    waiting: int = 64
    new_tokens: int = 1024
    seconds: float = 300.0


class Server:
    """A model and those who ask it; `app.application` is that for uvicorn.

    With ``hold`` budgets are held unless a request says otherwise.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        name: str,
        limits: Limits | None = None,
        key: str | None = None,
        hold: bool = False,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits or Limits()
        self.metrics = Metrics()
        self._key, self._hold = key, hold
        self._created = int(time.time())
        self._page, self._policy = _page()
        self.scheduler = Scheduler(
            model.session,
            self.metrics,
            most_rows=self.limits.rows,
            most_waiting=self.limits.waiting,
        )

    async def completions(self, request: HttpRequest) -> Response:
        """Continue texts."""
        return await self._answer(request, completion_asked, chat=False)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer messages."""
        return await self._answer(request, chat_asked, chat=True)

    async def models(self, request: HttpRequest) -> Response:
        """Say which model there is, and what its dial can do."""
        self._check_key(request)
        plan, session = self.model.session.plan, self.model.session
        described: Reply = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "alloc-moe",
            "alloc_moe": {
                "chat": self.model.chat_template is not None,
                "context_length": session.context_length,
                "activations": plan.budget.original,
                "planned": plan.budget.activations,
                "least": plan.dial[-1].activations if session.has_dial and plan.dial else None,
                "layers": [{"name": each.name, "most": each.k_original} for each in plan.layers],
            },
        }
        wanted = request.path_params.get("model")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [described]})
        if wanted != self.name:
            raise RequestError(f"There is no such model here. Ask for {self.name!r}.", status=404)
        return JSONResponse(described)

    async def health(self, request: HttpRequest) -> Response:
        """Say whether requests are taken."""
        is_open = self.scheduler.is_open
        return JSONResponse(
            {"status": "ok" if is_open else "closing"}, status_code=200 if is_open else 503
        )

    async def numbers(self, request: HttpRequest) -> Response:
        """Return the metrics."""
        self._check_key(request)
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: HttpRequest) -> Response:
        """Return the page to talk to the model."""
        return HTMLResponse(self._page, headers={"content-security-policy": self._policy})

    async def _answer(
        self, request: HttpRequest, read: Callable[..., Asked], *, chat: bool
    ) -> Response:
        self._check_key(request)
        body = await _body(request)
        # Long texts take a while to be cut into tokens: others are served meanwhile.
        asked: Asked = await run_in_threadpool(
            read,
            body,
            self.model,
            self.name,
            most_new=self.limits.new_tokens,
            hold=self._hold,
        )
        if len(asked.choices) > self.scheduler.most:
            raise RequestError(
                f"{len(asked.choices)} answers were asked for at once; this server has room for "
                f"{self.scheduler.most}. Ask several times."
            )
        events: Events = asyncio.Queue()
        deadline = time.monotonic() + self.limits.seconds
        work = request_of(asked.choices, asyncio.get_running_loop(), events, deadline)
        self.scheduler.submit(work)
        writer = Writer(asked, self.name, self.model.session.plan, chat=chat)
        if asked.stream:
            return _Stream(_streamed(work, events, writer), end=lambda: self.scheduler.cancel(work))
        return await self._collected(request, work, events, writer)

    async def _collected(
        self, request: HttpRequest, work: Request, events: Events, writer: Writer
    ) -> Response:
        """Return the whole answer; a client that hangs up ends the work."""
        gone = asyncio.ensure_future(_hung_up(request))
        pieces = asyncio.ensure_future(_all(work, events))
        try:
            await asyncio.wait({gone, pieces}, return_when=asyncio.FIRST_COMPLETED)
            if not pieces.done():
                return Response(status_code=499)  # nobody reads it
            found = pieces.result()
        finally:
            gone.cancel()
            pieces.cancel()
            self.scheduler.cancel(work)
        if isinstance(found, Failed):
            status = _FAILURES[found.kind]
            return JSONResponse(error_reply(found.message, status=status), status_code=status)
        return JSONResponse(writer.whole(found))

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                "The key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
            )


def request_of(
    choices: Sequence[Choice], loop: asyncio.AbstractEventLoop, events: Events, deadline: float
) -> Request:
    """Return a request that tells its news to a loop; where that has ended, nobody wants more."""

    def tell(news: Piece | Failed) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, news)
        except RuntimeError:
            request.cancelled = True

    request = Request(choices, tell, deadline)
    return request


class _Stream(StreamingResponse):
    """Server-sent events, and what to do at their end, be it that the client hangs up."""

    def __init__(self, events: AsyncIterator[str], *, end: Callable[[], None]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. The end comes also where the first isn't even asked for."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _streamed(work: Request, events: Events, writer: Writer) -> AsyncIterator[str]:
    """Yield server-sent events as tokens come."""
    async for news in _news(work, events):
        if isinstance(news, Failed):
            yield event(error_reply(news.message, status=_FAILURES[news.kind]))
            return
        if (part := writer.part(news)) is not None:
            yield event(part)
    if (last := writer.last()) is not None:
        yield event(last)
    yield event("[DONE]")


async def _body(request: HttpRequest) -> bytes:
    """Return the body of a request, if it is JSON and not too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form or a script of another page could send
        raise RequestError("Send JSON, with 'Content-Type: application/json'.", status=415)
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MOST_BYTES:
            raise RequestError(f"The request is larger than {MOST_BYTES} bytes.", status=413)
    return bytes(parts)


async def _news(work: Request, events: Events) -> AsyncIterator[Piece | Failed]:
    """Yield what happens to a request until all its choices have ended, or it has failed."""
    left = len(work.choices)
    while left:
        news = await events.get()
        yield news
        if isinstance(news, Failed):
            return
        left -= news.stopped is not None


async def _all(work: Request, events: Events) -> list[Piece] | Failed:
    pieces = []
    async for news in _news(work, events):
        if isinstance(news, Failed):
            return news
        pieces.append(news)
    return pieces


async def _hung_up(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _page() -> tuple[str, str]:
    """Return the page, and the policy by which a browser runs its own script and no other."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    digests = {}
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = "; ".join(
        [
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'",
            "frame-ancestors 'none'; form-action 'none'",
            *(f"{tag}-src 'sha256-{digest}'" for tag, digest in digests.items()),
        ]
    )
    return page, policy
