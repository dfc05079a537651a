"""The web application: OpenAI's routes, a page, health and metrics."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alloc_moe.runtime.errors import AllocMoeError
from alloc_moe.runtime.serving.metrics import Metrics
from alloc_moe.runtime.serving.protocol import RequestError
from alloc_moe.runtime.serving.replies import error_reply
from alloc_moe.runtime.serving.scheduler import MESSAGES, ClosingError, OverloadedError
from alloc_moe.runtime.serving.server import Server

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1


def application(server: Server, *, hosts: list[str] | None = None) -> Starlette:
    """Return the web application of a server.

    Args:
        server: With its model.
        hosts: The names that it may be called by, all if there are none. A web page elsewhere could
            otherwise give itself a name that leads here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(server.scheduler.close)

    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/health", server.health),
            Route("/metrics", server.numbers),
            Route("/v1/models", server.models),
            Route("/v1/models/{model:path}", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        middleware=[
            Middleware(_Counting, metrics=server.metrics),
            *(
                [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
                if hosts
                else []
            ),
        ],
        exception_handlers={
            RequestError: _refused,
            OverloadedError: _overloaded,
            ClosingError: _overloaded,
            AllocMoeError: _unable,
            ClientDisconnect: _gone,
            HTTPException: _no_route,
            Exception: _bug,
        },
        lifespan=lifespan,
    )


class _Counting:
    """Counts responses by status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on."""
        started = False

        def count(status: int) -> None:
            nonlocal started
            started = True
            self._metrics.add("requests_total", label=f'status="{status}"')

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not started:
                count(500)  # `_bug` answers, outside of all middleware
            raise


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    reply = error_reply(str(error), status=error.status, code=error.code)
    return JSONResponse(reply, status_code=error.status)


async def _overloaded(_: HttpRequest, error: Exception) -> Response:
    status = 503 if isinstance(error, ClosingError) else 429
    return JSONResponse(
        error_reply(str(error), status=status),
        status_code=status,
        headers={"retry-after": str(_RETRY_SECONDS)},
    )


async def _unable(_: HttpRequest, error: Exception) -> Response:
    logger.warning("A request can't be answered: %s", error)
    return JSONResponse(error_reply(MESSAGES["error"], status=500), status_code=500)


async def _gone(_request: HttpRequest, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _no_route(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        error_reply(error.detail, status=error.status_code),
        status_code=error.status_code,
        headers=error.headers,
    )


async def _bug(_: HttpRequest, error: Exception) -> Response:
    logger.error("A request has failed: this is a bug of alloc-moe.", exc_info=error)
    return JSONResponse(error_reply(MESSAGES["error"], status=500), status_code=500)
