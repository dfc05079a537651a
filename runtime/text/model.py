"""An artifact and its tokenizer: text in, text out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.providers import Provider
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.text.generation import GREEDY, generate
from alloc_moe.runtime.text.sampling import Sampling
from alloc_moe.runtime.text.tokenizer import TextStream, encode, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    ``ids`` include the token that ended the text, if ``stopped`` is "eos"; ``text`` leaves it out.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    stopped: Literal["eos", "length"]


class TextModel:
    """Completes texts with an artifact. Get one from `load`."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.eos_ids = session.files.eos_ids()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the start token if the tokenizer adds one."""
        return encode(self.tokenizer, text)

    def generate(
        self,
        prompts: Iterable[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        budget: str | float | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Return a completion of every prompt; all are worked on together.

        Args:
            prompts: Texts to continue.
            max_new_tokens: The most tokens a completion gets.
            sampling: How tokens are chosen; greedy by default.
            budget: For artifacts with a dial: activations per token in the mean, a fraction of the
                full model's (0.4 or "0.4") or a whole number; by default what was compiled in.
            on_token: Called as ``on_token(row, piece)`` for every token as soon as it is known,
                with the text that it adds: none for the token that ends the text, or within a
                character. What is left then comes in a last call. The pieces make up the text.

        Raises:
            GenerationError: A prompt is empty or too long, or the budget is not on the dial.
        """
        prompts = _texts(prompts)
        price = None if budget is None else price_of(self.session.plan, budget)
        prompt_ids = [self.encode(prompt) for prompt in prompts]
        streams = [TextStream(self.tokenizer, ids) for ids in prompt_ids]
        pieces: list[list[str]] = [[] for _ in prompts]

        def tell(row: int, piece: str) -> None:
            pieces[row].append(piece)
            if on_token is not None:
                on_token(row, piece)

        def push(row: int, token: int) -> None:
            tell(row, "" if token in self.eos_ids else streams[row].push(token))

        rows = generate(
            self.session,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=self.eos_ids,
            price=price,
            on_token=push,
        )
        for row, stream in enumerate(streams):
            if rest := stream.flush():
                tell(row, rest)
        return [
            Completion(
                prompt=prompt,
                text="".join(pieces[row]),
                prompt_ids=tuple(prompt_ids[row]),
                ids=tuple(rows[row]),
                stopped="eos" if rows[row][-1] in self.eos_ids else "length",
            )
            for row, prompt in enumerate(prompts)
        ]


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
    ep: Provider = "auto",
    threads: int | None = None,
    more_options: Mapping[str, str] | None = None,
) -> TextModel:
    """Load a compiled artifact, ready to complete texts.

    Args:
        path: A bundle folder, or an .onnx, .pt or .pt2 file that alloc-compile wrote.
        tokenizer: A tokenizer.json or a folder with one; found by itself as a rule, see
            `load_tokenizer`.
        ep: Execution provider; ``auto`` is CUDA if it can be used, else the CPU.
        threads: Threads that share the work; by default one per physical core.
        more_options: What else onnxruntime can be told: see `execution.providers.session_options`.

    Raises:
        ArtifactError: Something is missing, damaged, or was not compiled by alloc-moe.
        DeviceError: ``ep="cuda"``, but CUDA can't be used.
        GenerationError: onnxruntime has no such option.
    """
    session = open_session(path, ep=ep, threads=threads, more_options=more_options)
    model = TextModel(session, load_tokenizer(session.files, tokenizer))
    if not model.eos_ids:
        logger.warning(
            "Neither %s nor a configuration beside it names the token that ends a text, so texts "
            "go on to the most tokens asked for.",
            session.files.graph,
        )
    return model
