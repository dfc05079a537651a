"""Messages -> the prompt that a model was trained to answer, by its chat template.

Templates are jinja2, rendered as transformers does (`utils/chat_template_utils.py`), in a sandbox:
they come with an artifact, and messages come from anyone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from alloc_moe.runtime.artifact.files import ArtifactFiles, read_settings
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    either,
    optional,
    read_file,
    record,
    rows,
    string,
)
from alloc_moe.runtime.errors import ArtifactError, GenerationError

if TYPE_CHECKING:
    import jinja2

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_MOST_BYTES = 1 << 20
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_TOKEN = optional(either(record({"content": string()}), string()))
_NAMED = rows(record({"name": string(), "template": string(_MOST_BYTES)}))
_CONFIG = record(
    {},
    {
        "chat_template": optional(either(_NAMED, string(_MOST_BYTES))),
        **dict.fromkeys(_TOKENS, _TOKEN),
    },
)
# What a template may run into with messages that it isn't made for.
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # as transformers looks for it
_DAY = datetime(2026, 1, 1, tzinfo=UTC)

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, two texts; roles are those of the template, user and assistant
mostly. Templates may know other fields."""


class ChatTemplate:
    """A model's chat template and the special tokens it may name.

    Args:
        source: The template.
        name: Where it came from, for messages.
        tokens: Special tokens by name, such as ``{"bos_token": "<s>"}``.
        advice: What to do if it can't be read, as a sentence.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | Path,
        tokens: Mapping[str, str],
        advice: str = "Put the model's own there, or give one (--chat-template).",
    ) -> None:
        self._source, self._name, self._tokens = source, name, dict(tokens)
        self._advice = advice

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for the next answer of a conversation.

        Raises:
            ArtifactError: The template is no valid one.
            GenerationError: It refuses the messages, or jinja2 is missing.
        """
        return self._rendered(messages, add_generation_prompt=True)

    def transcript(self, messages: Sequence[Message]) -> str:
        """Return a whole conversation as the text that the model was trained on.

        It is the same on every day, also if the template tells the date.

        Raises:
            ArtifactError, GenerationError: As `render`.
        """
        return self._rendered(messages, add_generation_prompt=False, strftime_now=_DAY.strftime)

    def _rendered(self, messages: Sequence[Message], **settings: Any) -> str:  # of the template
        plain = [_with_reasoning(message) for message in messages]
        # Transformers' own names for what isn't given: templates ask whether they are none.
        names = {"tools": None, "documents": None, **self._tokens, **settings}
        template = self._template
        from jinja2 import TemplateError

        try:
            return template.render(messages=plain, **names)
        except (TemplateError, *_FAILURES) as error:
            raise GenerationError(
                f"The model's chat template can't take these messages: {_reason(error)}. "
                "Give roles in the order that it expects, mostly user and assistant in turns."
            ) from error

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        environment = _environment()
        from jinja2 import TemplateError

        try:
            return environment.from_string(self._source)
        except (TemplateError, SyntaxError, *_FAILURES) as error:  # of the Python made of it too
            raise ArtifactError(
                f"The chat template of {self._name} can't be read: {_reason(error)}. {self._advice}"
            ) from error


def load_chat_template(
    files: ArtifactFiles,
    *,
    path: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> ChatTemplate | None:
    """Return an artifact's chat template, None if it has none.

    Args:
        files: The artifact. Only a bundle's neighbours belong to it.
        path: A template to use instead.
        tokenizer: What was given in place of the artifact's tokenizer; a folder may have one too.

    Raises:
        ArtifactError: A file can't be read.
    """
    folder = Path(tokenizer) if tokenizer is not None and Path(tokenizer).is_dir() else None
    place = folder or (files.graph.parent if files.is_bundle else None)
    config = {}
    if place is not None and (place / _CONFIG_FILE).is_file():
        config = read_settings(place / _CONFIG_FILE, _CONFIG)
    identity = files.tokenizer_identity()
    tokens = {} if identity is None else {"bos": identity.bos_token, "eos": identity.eos_token}
    named = {f"{name}_token": token for name, token in tokens.items() if token is not None}
    for name in _TOKENS:
        if (token := config.get(name)) is not None:
            named[name] = token if isinstance(token, str) else token["content"]
    beside = None if place is None else place / TEMPLATE_FILE
    if path is None and beside is not None and beside.is_file():
        path = beside
    if path is not None:
        return ChatTemplate(_read(Path(path)), name=path, tokens=named)
    source = _default(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, name=_CONFIG_FILE, tokens=named)


def checked_messages(messages: Iterable[Any]) -> tuple[Message, ...]:
    """Return the messages of one conversation, which are texts with a role.

    Raises:
        GenerationError: There are none, or one is something else.
    """
    found = tuple(messages)
    if not found:
        raise GenerationError("The conversation has no messages. Give one or more.")
    for number, message in enumerate(found, 1):
        texts = isinstance(message, Mapping) and [message.get(k) for k in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise GenerationError(
                f"Message {number} isn't one. Give objects with two texts, role and content."
            )
    return found


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates use, if it has any."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


def _reason(error: Exception) -> str:
    return str(error)[:200].rstrip(".")


def _default(template: str | Sequence[Mapping[str, str]] | None) -> str | None:
    """Return the template among named ones that is for chats without tools."""
    if template is None or isinstance(template, str):
        return template
    return {each["name"]: each["template"] for each in template}.get("default")


def _read(path: Path) -> str:
    try:
        return str(read_file(path, most=_MOST_BYTES), "utf-8")
    except (OSError, ShapeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"The chat template {path} can't be read: {error}. Give a jinja2 file in UTF-8."
        ) from error


def _environment() -> jinja2.Environment:
    """Return what transformers renders templates in, down to how blank lines are trimmed."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise GenerationError(
            "Chat templates need jinja2, which isn't installed. Install alloc-moe[chat]."
        ) from error

    class Generation(Extension):
        """``{% generation %}`` marks what training looks at; here it only stands around text."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


def _to_json(
    value: Any,  # any JSON value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
