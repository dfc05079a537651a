"""The training loop: steps on the wall clock, continued from a checkpoint, and their batches."""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from evaluation import QUICK_TOKENS, evaluate
from model import SEQUENCE_LENGTH, LinearCrossEntropy, load_balancing_loss
from muon import Muon
from tokenizer import Tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
WARMUP_STEPS = 100
DECAY_FRACTION = 0.6  # a short run gains more from the decay than from time at the peak
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
LOG_STEPS = 10
CHECKPOINT_SECONDS = 120
EVALUATE_SECONDS = 300


@dataclass
class Progress:
    """How far the run is; written into each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    heldout_losses: list[tuple[int, float]] = field(default_factory=list)


def build_optimizers(model: PreTrainedModel, pool: Executor) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for everything else."""
    matrices, stacked, tables, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.endswith("gate_up_proj"):
            stacked.append(parameter)
        elif name.endswith(("proj", "proj.weight")):
            matrices.append(parameter)
        else:  # embeddings, head and routers: each row is a word or an expert of its own
            tables.append(parameter)
    groups = [
        {"params": tables, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    muon = Muon(matrices, stacked, pool=pool, lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return [muon, adamw]


def training_batch(tokens: Tokens, step: int, seed: int) -> Tensor:
    """Return a batch that depends on nothing but the step, so that a resumed run sees each once.

    Each epoch cuts the text at other places and shuffles the pieces.

    Returns:
        Token ids [sequences, SEQUENCE_LENGTH + 1]; the last column is only a target.
    """
    pieces = (len(tokens) - 1) // SEQUENCE_LENGTH - 1
    batch_size = min(BATCH_SIZE, pieces)
    epoch, position = divmod(step, pieces // batch_size)
    rng = np.random.default_rng((seed, epoch))
    shift = int(rng.integers(SEQUENCE_LENGTH))
    chosen = rng.permutation(pieces)[position * batch_size : (position + 1) * batch_size]
    starts = shift + chosen * SEQUENCE_LENGTH
    window = np.arange(SEQUENCE_LENGTH + 1)
    return torch.from_numpy(tokens[starts[:, None] + window].astype(np.int64))


def learning_rate(step: int, elapsed_fraction: float) -> float:
    """Warm up over steps, stay constant, then fall to zero over the last part of the time."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, max(0.0, 1.0 - elapsed_fraction) / DECAY_FRACTION)
    return PEAK_LEARNING_RATE * min(warmup, decay)


def train_step(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    pool: Executor,
    batch: Tensor,
    rate: float,
) -> tuple[float, float]:
    """Update the model once and return the cross entropy and the load-balancing loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    share = 1 / len(batch)
    results = list(pool.map(lambda sequence: add_gradients(model, sequence, share), batch.split(1)))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    loss, balance = (share * sum(values) for values in zip(*results, strict=True))
    return loss, balance


def add_gradients(model: PreTrainedModel, sequence: Tensor, share: float) -> tuple[float, float]:
    """Add the gradients of one sequence; torch locks each parameter while it adds.

    Threads that take a sequence at a time keep two cores busier than two threads within each
    operation: those wait for one another thousands of times a step, and an expert is small.
    """
    outputs = model.model(sequence[:, :-1], use_cache=False, output_router_logits=True)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    loss = LinearCrossEntropy.apply(hidden, model.lm_head.weight, sequence[:, 1:].flatten())
    balance = load_balancing_loss(outputs.router_logits, model.config.num_experts_per_tok)
    (share * (loss + model.config.router_aux_loss_coef * balance)).backward()
    return float(loss.detach()), float(balance.detach())


def set_up_thread() -> None:
    """Give this thread one core, and no denormals: rare words leave many, and they are slow."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], progress: Progress
) -> None:
    """Replace the checkpoint in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Progress:
    """Continue from the checkpoint if there is one."""
    if not path.is_file():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return Progress(**state["progress"])


def train(
    model: PreTrainedModel,
    train_ids: Tokens,
    heldout_ids: Tokens,
    checkpoint: Path,
    *,
    minutes: float,
    threads: int,
    seed: int,
) -> Progress:
    """Train until the time is used up, the time of earlier runs included."""
    pool = ThreadPoolExecutor(threads, initializer=set_up_thread)
    optimizers = build_optimizers(model, pool)
    progress = load_checkpoint(checkpoint, model, optimizers)
    if (budget := minutes * 60) <= progress.seconds:
        return progress
    start = time.monotonic() - progress.seconds
    saved = evaluated = progress.seconds
    recent: list[tuple[float, float]] = []
    while (elapsed := time.monotonic() - start) < budget:
        rate = learning_rate(progress.step, elapsed / budget)
        batch = training_batch(train_ids, progress.step, seed)
        recent.append(train_step(model, optimizers, pool, batch, rate))
        progress.step += 1
        progress.seconds = time.monotonic() - start
        if progress.step % LOG_STEPS == 0:
            log_progress(progress, recent, rate, budget, batch.shape[0] * SEQUENCE_LENGTH)
            recent.clear()
        if progress.seconds - evaluated > EVALUATE_SECONDS:
            evaluated = progress.seconds
            loss = evaluate(model, heldout_ids, max_tokens=QUICK_TOKENS)
            progress.heldout_losses.append((progress.step, round(loss, 4)))
            logger.info("step %d, held-out loss %.4f", progress.step, loss)
        if progress.seconds - saved > CHECKPOINT_SECONDS:
            saved = progress.seconds
            save_checkpoint(checkpoint, model, optimizers, progress)
    pool.shutdown()
    save_checkpoint(checkpoint, model, optimizers, progress)
    return progress


def log_progress(
    progress: Progress,
    recent: list[tuple[float, float]],
    rate: float,
    budget: float,
    tokens_per_step: int,
) -> None:
    """Log the means of the last steps and remember the loss."""
    loss, balance = (sum(values) / len(recent) for values in zip(*recent, strict=True))
    progress.losses.append((progress.step, round(loss, 4)))
    tokens = progress.step * tokens_per_step
    logger.info(
        "step %d, %.2f M tokens, loss %.4f, balance %.3f, lr %.2e, %.0f tokens/s, %.1f min left",
        progress.step,
        tokens / 1e6,
        loss,
        balance,
        rate,
        tokens / progress.seconds,
        (budget - progress.seconds) / 60,
    )
