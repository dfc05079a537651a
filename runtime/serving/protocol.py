"""Bodies of requests -> what is to be computed: OpenAI's fields, checked one by one.

Whoever sends them may be anyone. Every field has bounds, and what would be ignored is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.artifact.shapes import (
    Shape,
    ShapeError,
    anything,
    boolean,
    either,
    number,
    one_of,
    optional,
    parse_json,
    record,
    rows,
    string,
    whole,
)
from alloc_moe.runtime.errors import AllocMoeError, GenerationError
from alloc_moe.runtime.serving.batch import Row
from alloc_moe.runtime.serving.scheduler import Choice
from alloc_moe.runtime.text.answers import MOST_STOP_STRINGS, Answer, checked_stop_strings
from alloc_moe.runtime.text.generation import check_prompts
from alloc_moe.runtime.text.hold import held_budget
from alloc_moe.runtime.text.model import TextModel
from alloc_moe.runtime.text.sampling import Sampling

MOST_BYTES = 4 << 20
"""No body of a request may be larger."""
MOST_CHOICES = 16
_MOST_MESSAGES = 4096
_MOST_SEED = 2**63 - 1
_DRAWN_SEEDS = 2**32  # JavaScript has no whole numbers of 64 bits
_COMPLETION_TOKENS = 16  # OpenAI's default for completions


class RequestError(AllocMoeError):
    """A request that can't be answered, whoever tries; ``status`` is HTTP's."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def nothing(value: Any, where: str) -> Any:
    """Take what asks for nothing: null, false, zero, or what is empty."""
    if value not in (None, False, 0, "", [], {}):
        raise ShapeError(f"{where} isn't supported here; leave it out")
    return None


_TEXT = string(MOST_BYTES)
_IDS = rows(whole(0, 2**31), least=1, most=1 << 20)
_PART = record({"type": one_of("text"), "text": _TEXT}, closed=True)
_MESSAGE = record(
    {"role": string(32), "content": either(rows(_PART, least=1, most=256), _TEXT)},
    {"name": anything},
    closed=True,
)
_COMMON: dict[str, Shape] = {
    "max_tokens": optional(whole(1, 1 << 20)),
    "temperature": optional(number(0, 100)),
    "top_p": optional(number(0, 1)),
    "min_p": optional(number(0, 1)),
    "repetition_penalty": optional(number(0, 1000)),
    "seed": optional(whole(0, _MOST_SEED)),
    "stop": optional(either(rows(string(), most=MOST_STOP_STRINGS), string())),
    "stream": optional(boolean),
    "stream_options": optional(
        record({}, {"include_usage": boolean, "include_obfuscation": boolean}, closed=True)
    ),
    "n": optional(whole(1, MOST_CHOICES)),
    "budget": optional(either(number(0, 1e9), string(64))),
    "hold": optional(boolean),
    "experts": optional(boolean),
    # These say nothing of the answer.
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier"), anything),
    # These would change it, in ways that aren't here.
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "logit_bias", "logprobs"), nothing),
}
_COMPLETION = record(
    {
        "model": string(),
        "prompt": either(
            _IDS,
            rows(_IDS, least=1, most=MOST_CHOICES),
            rows(_TEXT, least=1, most=MOST_CHOICES),
            _TEXT,
        ),
    },
    {**_COMMON, "best_of": optional(whole(1, 1)), "echo": nothing, "suffix": nothing},
    closed=True,
)
_CHAT = record(
    {"model": string(), "messages": rows(_MESSAGE, least=1, most=_MOST_MESSAGES)},
    {
        **_COMMON,
        "max_completion_tokens": optional(whole(1, 1 << 20)),
        "response_format": optional(record({"type": one_of("text")}, closed=True)),
        "tool_choice": optional(one_of("none", "auto")),
        **dict.fromkeys(("tools", "top_logprobs", "functions"), nothing),
    },
    closed=True,
)


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    ``experts`` is whether each piece says how many experts ran for it, ``hold`` whether the budget
    is held.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    stream: bool
    usage: bool
    experts: bool
    budget: str | float | None
    hold: bool
    seed: int


def completion_asked(
    body: bytes, model: TextModel, name: str, *, most_new: int, hold: bool = False
) -> Asked:
    """Return what a body for ``/v1/completions`` asks for.

    Args:
        body: JSON.
        model: That is to answer.
        name: The model's.
        most_new: The most new tokens for each choice.
        hold: Whether budgets are held where the request doesn't say.

    Raises:
        RequestError: It can't be answered.
    """
    fields = _parsed(body, _COMPLETION, name)
    prompt = fields["prompt"]
    several = not isinstance(prompt, str) and not isinstance(prompt[0], int)
    prompts = prompt if several else (prompt,)
    try:
        ids = [model.encode(each) if isinstance(each, str) else list(each) for each in prompts]
    except GenerationError as error:
        raise RequestError(str(error)) from error
    wanted = fields.get("max_tokens") or _COMPLETION_TOKENS
    return _asked(fields, model, ids, wanted, most_new=most_new, hold=hold)


def chat_asked(
    body: bytes, model: TextModel, name: str, *, most_new: int, hold: bool = False
) -> Asked:
    """Return what a body for ``/v1/chat/completions`` asks for; see `completion_asked`."""
    fields = _parsed(body, _CHAT, name)
    if model.chat_template is None:
        raise RequestError(
            f"The model {name!r} has no chat template: as far as it says, it continues texts and "
            "wasn't trained to chat. Ask /v1/completions."
        )
    messages = [
        {"role": message["role"], "content": _joined(message["content"])}
        for message in fields["messages"]
    ]
    try:
        ids = model.encode_prompt(model.chat_prompt(messages))
    except GenerationError as error:
        raise RequestError(str(error)) from error
    wanted = fields.get("max_completion_tokens") or fields.get("max_tokens")
    if wanted is None:  # as much as there is room for
        limit = model.session.context_length
        wanted = most_new if limit is None else max(1, min(most_new, limit - len(ids)))
    return _asked(fields, model, [ids], wanted, most_new=most_new, hold=hold)


def _parsed(body: bytes, shape: Shape, name: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = parse_json(body, shape)
    except ShapeError as error:
        raise RequestError(f"The request can't be read: {error}.") from error
    if fields["model"] != name:
        raise RequestError(
            f"There is no model {fields['model'][:80]!r} here. Ask for {name!r}.",
            status=404,
            code="model_not_found",
        )
    return fields


def _asked(
    fields: dict[str, Any],
    model: TextModel,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    most_new: int,
    hold: bool,
) -> Asked:
    """Return what is to be computed for some prompts, each answered ``n`` times."""
    if new_tokens > most_new:
        raise RequestError(f"{new_tokens} new tokens were asked for; here {most_new} are the most.")
    count = fields.get("n") or 1
    if len(prompts) * count > MOST_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts with {count} answers each were asked for; "
            f"{MOST_CHOICES} answers are the most. Ask several times."
        )
    seed = fields.get("seed")
    seed = secrets.randbelow(_DRAWN_SEEDS) if seed is None else seed
    wanted = fields.get("hold")
    hold = hold if wanted is None else wanted
    budget = fields.get("budget")
    try:
        check_prompts(model.session, prompts, max_new_tokens=new_tokens)
        held = held_budget(model.session, budget) if hold else None
        price = None if hold else _price(model, budget)
        sampling, stops = _sampling(fields, seed), checked_stop_strings(fields.get("stop"))
    except GenerationError as error:
        raise RequestError(str(error)) from error
    choices = tuple(
        Choice(
            Row(
                tuple(ids),
                sampling,
                price=price,
                hold=None if held is None else held.begin(),
                stream=place * count + again,
            ),
            Answer(model.tokenizer, ids, eos_ids=model.eos_ids, stop_strings=stops),
            new_tokens,
        )
        for place, ids in enumerate(prompts)
        for again in range(count)
    )
    return Asked(
        choices,
        prompt_tokens=sum(map(len, prompts)),
        stream=bool(fields.get("stream")),
        usage=bool((fields.get("stream_options") or {}).get("include_usage")),
        experts=bool(fields.get("experts")),
        budget=budget,
        hold=hold,
        seed=seed,
    )


def _price(model: TextModel, budget: str | float | None) -> float | None:
    return None if budget is None else price_of(model.session.plan, budget)


def _sampling(fields: dict[str, Any], seed: int) -> Sampling:
    """Return how tokens are drawn; a greedy choice is the same whatever would be kept."""
    given = {
        name: fields[name]
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        if fields.get(name) is not None
    }
    settings = {"temperature": 1.0, **given}
    if settings["temperature"] == 0:
        for name in ("top_p", "min_p"):
            settings.pop(name, None)
    return Sampling(seed=seed, **settings)


def _joined(content: str | Sequence[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
