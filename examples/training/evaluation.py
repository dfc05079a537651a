"""What the tiny example model can do: losses, use of its experts, samples."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from model import SEQUENCE_LENGTH
from tokenizer import Tokens
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

QUICK_TOKENS = 32 * SEQUENCE_LENGTH  # enough to follow the run


def evaluation_batches(tokens: Tokens, max_tokens: int | None = None) -> Iterator[Tensor]:
    """Yield sequences [1, <= SEQUENCE_LENGTH + 1] whose targets are all tokens but the first."""
    for start in range(0, min(len(tokens) - 1, max_tokens or len(tokens)), SEQUENCE_LENGTH):
        piece = tokens[start : start + SEQUENCE_LENGTH + 1]
        yield torch.from_numpy(piece.astype(np.int64))[None]


@torch.inference_mode()
def evaluate(model: PreTrainedModel, tokens: Tokens, max_tokens: int | None = None) -> float:
    """Return the mean negative log-likelihood per token in nats.

    Sequences of SEQUENCE_LENGTH without overlap: the first tokens of each have little context.
    """
    total, count = 0.0, 0
    for batch in evaluation_batches(tokens, max_tokens):
        logits = model(batch[:, :-1], use_cache=False).logits[0]
        total += float(functional.cross_entropy(logits.float(), batch[0, 1:], reduction="sum"))
        count += batch.shape[1] - 1
    return total / count


@torch.inference_mode()
def expert_use(model: PreTrainedModel, tokens: Tokens) -> list[list[float]]:
    """Return for each layer the fraction of tokens that each expert receives.

    The fractions of a layer add up to the number of experts per token.
    """
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.zeros(layers, experts, dtype=torch.long)
    total = 0
    for batch in evaluation_batches(tokens, QUICK_TOKENS):
        outputs = model.model(batch[:, :-1], use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=experts)
        total += batch.shape[1] - 1
    return (counts / total).tolist()


@torch.inference_mode()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, *, seed: int
) -> str:
    """Return a continuation of the prompt, the prompt included."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    settings = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=40, max_new_tokens=80, pad_token_id=1
    )
    return str(tokenizer.decode(model.generate(**inputs, generation_config=settings)[0]))


def bits_per_byte(loss: float, tokens: int, text: str) -> float:
    """Return the loss in a unit that does not depend on the tokenizer."""
    return loss / math.log(2) * (tokens - 1) / len(text.encode())
