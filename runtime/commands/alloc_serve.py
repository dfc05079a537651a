"""alloc-serve: an artifact as a server that OpenAI's clients can talk to."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from typing import TYPE_CHECKING

import click

from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.numeric import FiniteRange, WholeFrom, tokens_type
from alloc_moe.runtime.commands.options import (
    chat_template_option,
    common_options,
    ep_option,
    examples,
    hold_option,
    session_option,
    threads_option,
    tokenizer_option,
)
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.errors import AllocMoeError

# numpy, onnxruntime, starlette and uvicorn load inside the functions, to keep --help quick.
if TYPE_CHECKING:
    from alloc_moe.runtime.artifact.files import ArtifactFiles
    from alloc_moe.runtime.execution.providers import Provider

_MOST_ROWS = 256
_MOST_WAITING = 65536
_MOST_SECONDS = 86400.0
_SPARE_CONNECTIONS = 64
_KEEP_ALIVE_SECONDS = 30
_BACKLOG = 1024
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


@click.command(
    cls=Command,
    epilog=examples("alloc-serve bundle/", "alloc-serve out.onnx --port 8080 --max-batch 8"),
)
@click.argument("artifact", type=click.Path())
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. The default is for this machine alone.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--api-key",
    envvar="ALLOC_MOE_API_KEY",
    show_envvar=True,
    help="What clients must send. Others on this machine may see command lines, so set the "
    "variable.",
)
@click.option("--name", help="What the model is called; by default as the artifact's file.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, _MOST_ROWS),
    default=16,
    show_default=True,
    help="Most answers written at a time.",
)
@click.option(
    "--queue",
    type=WholeFrom(0, _MOST_WAITING),
    default=64,
    show_default=True,
    help="Most answers that wait; further requests are told to come back (429).",
)
@click.option(
    "--max-new-tokens",
    type=tokens_type(),
    default=1024,
    show_default=True,
    help="Most tokens of an answer.",
)
@click.option(
    "--timeout",
    type=FiniteRange(0, _MOST_SECONDS, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds that a request may take, waiting included.",
)
@click.option(
    "--grace",
    type=click.IntRange(0, 3600),
    default=20,
    show_default=True,
    help="Seconds that requests have to end when the server is stopped.",
)
@hold_option
@chat_template_option
@ep_option
@threads_option
@session_option
@tokenizer_option
@common_options
def serve_command(
    console: Console,
    artifact: str,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    max_batch: int,
    queue: int,
    max_new_tokens: int,
    timeout: float,
    grace: int,
    hold: bool,
    chat_template: str | None,
    ep: Provider,
    threads: int | None,
    session_entries: dict[str, str],
    tokenizer: str | None,
) -> None:
    """Serve ARTIFACT over HTTP until it is interrupted.

    ARTIFACT is an .onnx, .pt or .pt2 file, or a bundle folder. Routes are OpenAI's:
    /v1/completions, /v1/chat/completions and /v1/models, also /health and /metrics. At / is a page
    to talk to the model. Needs the extra [serve].
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise AllocMoeError(
            "Serving needs starlette and uvicorn. Install alloc-moe[serve]."
        ) from error
    from alloc_moe.runtime.execution.providers import tries_cuda
    from alloc_moe.runtime.serving.app import application
    from alloc_moe.runtime.serving.server import Limits, Server
    from alloc_moe.runtime.text.hold import held_budget
    from alloc_moe.runtime.text.model import load

    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise click.UsageError("The key must be ASCII text without spaces around it.")
    local = _is_loopback(host)
    if not local and api_key is None:
        console.warn(f"No key is asked for (ALLOC_MOE_API_KEY), so all who reach {host} may ask.")
    with _listener(host, port) as listener:
        model = load(
            artifact,
            tokenizer=tokenizer,
            chat_template=chat_template,
            ep=ep,
            threads=threads,
            # On a GPU counting would leave our kernels out.
            count_activations=hold or not tries_cuda(ep),
            more_options=session_entries,
        )
        if hold:
            held_budget(model.session)  # what can't be is said before anybody asks
            if not model.session.takes_prices:
                console.note(
                    "Each answer is written by calls of its own: compiled with --price-per "
                    "sequence, the artifact could hold the budgets of several in one."
                )
        limits = Limits(rows=max_batch, waiting=queue, new_tokens=max_new_tokens, seconds=timeout)
        server = Server(
            model,
            name=name or _name(model.session.files),
            limits=limits,
            key=api_key,
            hold=hold,
        )
        app = application(server, hosts=[*_LOCAL_NAMES, host] if local else None)
        if model.chat_template is None:
            console.note("The model has no chat template, so it only continues texts.")
        if server.scheduler.most_rows < max_batch:
            compete = model.session.plan.tokens_compete
            reason = "tokens compete" if compete else "sequences of a batch can't be moved"
            console.note(f"Answers are written one at a time: in this artifact, {reason}.")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            limit_concurrency=max_batch + queue + _SPARE_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=grace,
        )
        # Once requests have ended, uvicorn raises the signal again that it was stopped by.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            console.result(f"Serving {server.name} at {_url(listener)}", {"url": _url(listener)})
            uvicorn.Server(config).run(sockets=[listener])
        console.note("Stopped.")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that nobody waits for a model that can't be reached.

    Raises:
        AllocMoeError: Nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise AllocMoeError(
            f"Nothing can listen at {host} port {port}: {error}. Give another --host or --port."
        ) from error


def _name(files: ArtifactFiles) -> str:
    path = files.graph.resolve()
    return path.parent.name if files.is_bundle else path.stem


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
