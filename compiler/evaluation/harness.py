"""The model ``alloc-moe`` of lm-evaluation-harness: artifacts, and plans in PyTorch.

    from alloc_moe.compiler.evaluation.harness import AllocMoeLM
    from lm_eval import simple_evaluate

    simple_evaluate(AllocMoeLM(artifact="out.onnx"), tasks=["lambada_openai"])

From the command line it is ``alloc-lm-eval --model alloc-moe --model_args artifact=out.onnx``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from alloc_moe.compiler.evaluation.backends import Backend, open_artifact, open_model
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.measure.evaluate import token_losses
from alloc_moe.runtime.text.answers import Answer
from alloc_moe.runtime.text.generation import decode
from alloc_moe.runtime.text.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from numpy.typing import NDArray

    from alloc_moe.runtime.execution.providers import Provider

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What results are cached under, the context's tokens, the continuation's tokens."""

_AUTOMATIC_BATCH = 8
_DEFAULT_CONTEXT = 2048  # the harness's own default
_UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class AllocMoeLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """Answers the harness's requests with an artifact, or a model under a plan in PyTorch.

    Args:
        artifact: A bundle folder, or an .onnx, .pt or .pt2 file; this or ``pretrained`` is needed.
        pretrained: A checkpoint folder or hub id, to run in PyTorch on the CPU.
        plan: For ``pretrained``: an allocation.json or artifact; without it, all experts run.
        budget: For plans with a dial: experts per token, as a fraction or a number, in place of
            the plan's own budget.
        batch_size: Sequences per call. "auto" is 8, or 1 where results depend on batch mates.
        max_batch_size: The most that "auto" may take.
        device: What the harness's --device says; "cpu" is taken as ``ep=cpu``.
        max_length: Tokens of context; by default the model's own.
        max_gen_toks: The most tokens of an answer, for tasks that don't say.
        tokenizer: For ``artifact``: a tokenizer.json or its folder, if it isn't found.
        ep: For ``artifact``: auto, cpu or cuda.
        threads: For ``artifact``: threads that share the work.
        seed: Of answers drawn at a temperature.
        trust_remote_code: For ``pretrained``: run Python code of the checkpoint.

    Raises:
        AllocMoeError: The arguments don't fit together, or a file can't be used.
    """

    def __init__(
        self,
        artifact: str | None = None,
        pretrained: str | None = None,
        plan: str | None = None,
        budget: str | float | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        tokenizer: str | None = None,
        ep: Provider = "auto",
        threads: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if (artifact is None) == (pretrained is None):
            raise GenerationError(
                "Give one of artifact=out.onnx and pretrained=MODEL in --model_args."
            )
        if artifact is not None:
            if plan is not None:
                raise GenerationError("plan= is for pretrained=; an artifact has its own plan.")
            provider: Provider = "cpu" if device == "cpu" and ep == "auto" else ep
            self.backend = open_artifact(
                artifact, budget=budget, tokenizer=tokenizer, ep=provider, threads=threads
            )
        else:
            assert pretrained is not None
            self.backend = open_model(
                pretrained, plan_file=plan, budget=budget, trust_remote_code=trust_remote_code
            )
        self.max_length = max_length or self.backend.context_length or _DEFAULT_CONTEXT
        self.max_gen_toks = max_gen_toks
        self.batch_size = choose_batch_size(self.backend, batch_size, most=max_batch_size)
        self._seeds = itertools.count(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self.backend.eos_ids, default=self.backend.prefix_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that texts without context are scored after."""
        return self.backend.prefix_id

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results: the plan, and the price if set."""
        plan = self.backend.plan
        return {
            "alloc_moe": {
                "source": plan.source,
                "redistribution": plan.redistribution,
                "weights": plan.weights,
                "activations_per_token": plan.budget.activations,
                "activations_per_token_original": plan.budget.original,
                "experts_per_layer": [layer.k for layer in plan.layers],
                "price": self.backend.price,
            }
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return a text's tokens, with the start token if the tokenizer adds one.

        Never twice: a text that begins with it gets no other.
        """
        if add_special_tokens is None:
            start = self.backend.tokenizer.id_to_token(self.prefix_token_id)
            add_special_tokens = not (start and string.startswith(start))
        encoding = self.backend.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood in nats of whole texts, each scored after the start token."""
        texts = [request.args[0] for request in requests]
        windows = [
            (row, (None, *make_disjoint_window(window)))
            for row, text in enumerate(texts)
            for window in get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        totals = [0.0] * len(texts)
        for (row, _), (score, _) in zip(windows, scores, strict=True):
            totals[row] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether it is the greedy one."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sharing: dict[tuple[int, ...], list[int]] = {}  # one-token options share their input
        for index, (_, context, continuation) in enumerate(requests):
            if continuation:
                sharing.setdefault(self._input(context, continuation), []).append(index)
        bar = tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm)
        for inputs in _batches(sorted(sharing, key=lambda ids: (-len(ids), ids)), self.batch_size):
            logits = self._prefill(inputs)
            for row, index in ((row, i) for row, ids in enumerate(inputs) for i in sharing[ids]):
                key, _, continuation = requests[index]
                answers[index] = _score(logits[row], continuation)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[index])
                bar.update(1)
        bar.close()
        return answers

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return what is fed to score a continuation: all but its last token, cut on the left."""
        if len(continuation) > self.max_length:
            raise GenerationError(
                f"A continuation has {len(continuation)} tokens; the context of "
                f"{self.backend.source} holds {self.max_length}. Leave this task out."
            )
        whole = [*context, *continuation]
        if len(whole) > self.max_length + 1:
            logger.warning(
                "Cutting a context on the left: %d tokens, %d fit.", len(whole), self.max_length
            )
        return tuple(whole[-self.max_length - 1 : -1])

    def _prefill(self, inputs: Sequence[tuple[int, ...]]) -> NDArray[np.floating]:
        """Return logits [batch, longest, vocabulary], padded on the left."""
        longest = max(map(len, inputs))
        ids = np.zeros((len(inputs), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, longest - len(tokens) :] = tokens
            mask[row, longest - len(tokens) :] = 1
        return self.backend.step(ids, mask, None)[0]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first stop string."""
        bar = tqdm(
            total=len(requests), desc="Running generate_until requests", disable=disable_tqdm
        )
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: args[1],
            group_by="gen_kwargs",
        )
        texts: list[str] = []
        for batch in order.get_batched(n=self.batch_size):
            settings = batch[0][1]
            for (context, _), text in zip(
                batch, self._answer([context for context, _ in batch], settings), strict=True
            ):
                self.cache_hook.add_partial("generate_until", (context, settings), text)
                texts.append(text)
            bar.update(len(batch))
        bar.close()
        original: list[str] = order.get_original(texts)
        return original

    def _answer(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        if known["do_sample"] and (unknown := sorted(known.keys() - _UNDERSTOOD)):
            logger.warning("These generation settings have no effect here: %s.", unknown)
        room = self.max_length - known["max_gen_toks"]
        if room < 1:
            raise GenerationError(
                f"Answers of {known['max_gen_toks']} tokens leave no room for a prompt in the "
                f"context of {self.max_length}. Give --gen_kwargs max_gen_toks=N."
            )
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in contexts]
        stops = [stop for stop in known["until"] if stop]
        ends = self.backend.eos_ids | {self.eot_token_id}
        answers = [
            Answer(self.backend.tokenizer, ids, eos_ids=ends, stop_strings=stops) for ids in prompts
        ]
        texts = ["" for _ in prompts]

        def is_last(row: int, token: int) -> bool:
            texts[row] += answers[row].push(token)
            return answers[row].stopped is not None

        for _ in decode(
            self.backend.step,
            prompts,
            max_new_tokens=known["max_gen_toks"],
            sampling=self._sampling(known),
            is_last=is_last,
        ):
            pass
        return [text + answer.flush() for text, answer in zip(texts, answers, strict=True)]

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        temperature = float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0
        if temperature == 0:
            return Sampling()
        # A seed of its own for every batch, or repeated requests would get equal answers.
        return Sampling(temperature, float(settings.get("top_p", 1.0)), next(self._seeds))


def choose_batch_size(backend: Backend, asked: int | str | None, *, most: int | None = None) -> int:
    """Return how many sequences a call gets.

    Args:
        backend: The model.
        asked: A number; None or "auto" is 8, or 1 where results depend on batch mates.
        most: Limit of the automatic choice.

    Raises:
        GenerationError: What was asked for is neither.
    """
    automatic = asked is None or str(asked).startswith("auto")
    if not automatic and not (str(asked).isdecimal() and int(str(asked)) > 0):
        raise GenerationError(f"The batch size is {asked!r}. Give a number from 1, or auto.")
    if not backend.plan.tokens_compete:
        return min(_AUTOMATIC_BATCH, most or _AUTOMATIC_BATCH) if automatic else int(str(asked))
    reason = "sequences of one call compete for experts under this plan"
    if automatic:
        logger.info("Batch size 1: %s.", reason)
        return 1
    if int(str(asked)) > 1:
        logger.warning("Results depend on the batch size %s: %s.", asked, reason)
    return int(str(asked))


def _batches(inputs: Sequence[tuple[int, ...]], size: int) -> Iterator[Sequence[tuple[int, ...]]]:
    for first in range(0, len(inputs), size):
        yield inputs[first : first + size]


def _score(logits: NDArray[np.floating], continuation: list[int]) -> tuple[float, bool]:
    """Score a continuation by the last of its sequence's logits [sequence, vocabulary]."""
    targets = np.asarray(continuation, np.int64)
    rows = logits[-len(targets) :]
    greedy = bool((rows.argmax(axis=-1) == targets).all())
    return -float(token_losses(rows, targets).sum()), greedy
