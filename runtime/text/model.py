"""An artifact and its tokenizer: text in, text out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.calls import Output, Session
from alloc_moe.runtime.execution.providers import Provider
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.answers import Answer, Stopped, checked_stop_strings
from alloc_moe.runtime.text.chat import ChatTemplate, Message, checked_messages, load_chat_template
from alloc_moe.runtime.text.generation import GREEDY, generate
from alloc_moe.runtime.text.hold import held_budget
from alloc_moe.runtime.text.sampling import Sampling
from alloc_moe.runtime.text.tokenizer import encode, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    ``ids`` include the tokens that ended the text, if ``stopped`` is "eos" or "stop_string";
    ``text`` leaves them out. ``experts_per_token`` is the mean that ran for prompt and text, if the
    budget was held.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    stopped: Stopped
    experts_per_token: float | None = None


class TextModel:
    """Completes texts with an artifact. Get one from `load`."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        find_template: Callable[[], ChatTemplate | None] = lambda: None,
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.eos_ids = session.files.eos_ids()
        self._find_template = find_template

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None if it has none."""
        return self._find_template()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the start token if the tokenizer adds one."""
        return encode(self.tokenizer, text)

    def chat_prompt(self, messages: Iterable[Message]) -> str:
        """Return the text that asks the model for the next answer of a conversation.

        It holds the start token if the model wants one: encode it with `encode_prompt`.

        Raises:
            GenerationError: The model has no chat template, or none for such messages.
        """
        if self.chat_template is None:
            raise GenerationError(
                f"{self.session.files.graph} has no chat template: as far as it says, the model "
                "continues texts and wasn't trained to chat. Give it a text (--prompt), or the "
                "template it was trained with (--chat-template)."
            )
        return self.chat_template.render(checked_messages(messages))

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of a text from `chat_prompt`."""
        return encode(self.tokenizer, prompt, special=False)

    def generate(
        self,
        prompts: Iterable[str] | None = None,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop_strings: str | Sequence[str] | None = None,
        budget: str | float | None = None,
        hold: bool = False,
        on_token: Callable[[int, str], None] | None = None,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[Completion]:
        """Return a completion of every prompt, or an answer to every conversation.

        All are worked on together.

        Args:
            prompts: Texts to continue.
            messages: In their place, a conversation or a list of them; each is a list of messages
                ``{"role": ..., "content": ...}``, put into words by the model's chat template.
            max_new_tokens: The most tokens a completion gets.
            sampling: How tokens are chosen; greedy by default.
            stop_strings: Texts that end a completion. They are no part of it.
            budget: For artifacts with a dial: activations per token in the mean, a fraction of the
                full model's (0.4 or "0.4") or a whole number; by default what was compiled in.
            hold: Hold the budget on any text: for each prompt by itself the price is steered so
                that the mean over `WINDOW` tokens (in `text.hold`) stays near it. The model must
                have been loaded with ``count_activations=True``; for several prompts the artifact
                must have been compiled with ``--price-per sequence``.
            on_token: Called as ``on_token(row, piece)`` for every token as soon as it is known,
                with the text that it adds: none for the token that ends the text, or within a
                character, or while it may begin a stop string. What is left then comes in a last
                call. The pieces make up the text.
            on_output: Called with what every call of the model gave.

        Raises:
            GenerationError: A prompt is empty or too long, the budget is not on the dial or can't
                be held, or the model can't chat.
        """
        texts, prompt_ids = self._encoded(prompts, messages)
        holds, price = None, None
        if hold:
            held = held_budget(self.session, budget)
            holds = [held.begin() for _ in prompt_ids]
        elif budget is not None:
            price = price_of(self.session.plan, budget)
        stops = checked_stop_strings(stop_strings)
        answers = [
            Answer(self.tokenizer, ids, eos_ids=self.eos_ids, stop_strings=stops)
            for ids in prompt_ids
        ]
        pieces: list[list[str]] = [[] for _ in texts]

        def tell(row: int, piece: str) -> None:
            pieces[row].append(piece)
            if on_token is not None:
                on_token(row, piece)

        def push(row: int, token: int) -> bool:
            tell(row, answers[row].push(token))
            return answers[row].stopped is not None

        rows = generate(
            self.session,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=self.eos_ids,
            price=price,
            holds=holds,
            on_token=push,
            on_output=on_output,
        )
        for row, answer in enumerate(answers):
            if rest := answer.flush():
                tell(row, rest)
        return [
            Completion(
                prompt=text,
                text="".join(pieces[row]),
                prompt_ids=tuple(prompt_ids[row]),
                ids=tuple(rows[row]),
                stopped=answers[row].stopped or "length",
                experts_per_token=holds[row].mean if holds else None,
            )
            for row, text in enumerate(texts)
        ]

    def _encoded(
        self,
        prompts: Iterable[str] | None,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None,
    ) -> tuple[list[str], list[list[int]]]:
        """Return the texts to continue and their token ids."""
        if (prompts is None) == (messages is None):
            raise GenerationError("Give either prompts or messages.")
        if messages is None:
            assert prompts is not None
            texts = _texts(prompts)
            return texts, [self.encode(text) for text in texts]
        texts = [self.chat_prompt(conversation) for conversation in _conversations(messages)]
        return texts, [self.encode_prompt(text) for text in texts]


def _conversations(messages: Any) -> Sequence[Sequence[Message]]:  # whatever was given
    """Return a list of conversations; one may be given alone."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise GenerationError(
            f"The messages are of type {type(messages).__name__}. Give a list of messages."
        )
    alone = not messages or isinstance(messages[0], Mapping)
    return [messages] if alone else messages


def _texts(prompts: Iterable[str]) -> list[str]:
    """Return prompts as a list; arrays of texts have their own kind of text."""
    if isinstance(prompts, str | bytes):
        raise GenerationError("The prompts are one text. Give a list of prompts.")
    texts = list(prompts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise GenerationError(f"Prompt {number} is of type {type(text).__name__}. Give text.")
    return list(map(str, texts))


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
    ep: Provider = "auto",
    threads: int | None = None,
    count_activations: bool = False,
    more_options: Mapping[str, str] | None = None,
) -> TextModel:
    """Load a compiled artifact, ready to complete texts.

    Args:
        path: A bundle folder, or an .onnx, .pt or .pt2 file that alloc-compile wrote.
        tokenizer: A tokenizer.json or a folder with one; found by itself as a rule, see
            `load_tokenizer`.
        chat_template: A jinja2 file; by default the one in the bundle, or in the tokenizer's
            folder if that is given.
        ep: Execution provider; ``auto`` is CUDA if it can be used, else the CPU.
        threads: Threads that share the work; by default one per physical core.
        count_activations: Have every call say how many experts each layer executed.
        more_options: What else onnxruntime can be told: see `execution.providers.session_options`.

    Raises:
        ArtifactError: Something is missing, damaged, or was not compiled by alloc-moe.
        DeviceError: ``ep="cuda"``, but CUDA can't be used.
        GenerationError: onnxruntime has no such option.
    """
    session = open_session(
        path,
        ep=ep,
        threads=threads,
        count_activations=count_activations,
        more_options=more_options,
    )
    model = TextModel(
        session,
        load_tokenizer(session.files, tokenizer),
        find_template=lambda: load_chat_template(
            session.files, path=chat_template, tokenizer=tokenizer
        ),
    )
    if not model.eos_ids:
        logger.warning(
            "Neither %s nor a configuration beside it names the token that ends a text, so texts "
            "go on to the most tokens asked for.",
            session.files.graph,
        )
    return model
