"""Train the tiny mixture-of-experts model that this repository bundles in tiny-moe/.

An OLMoE of 6.2 M parameters, trained on two CPU cores in 100 minutes on public-domain English
(corpus.py names the sources and the command that fetches them). To repeat it::

    python examples/training/train.py --archives archives --work work --out tiny-moe --minutes 100

On Linux these settings raised the speed from 2700 to 3700 tokens/s (batches of 8 sequences, two
idle cores), because memory is then kept between steps instead of being returned and cleared::

    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4000000000
    export MALLOC_TOP_PAD_=268435456 THP_MEM_ALLOC_ENABLE=1

The schedule follows the wall clock: a busy machine gets fewer steps, never a longer run. Started
again with the same --work folder, a run continues from its last checkpoint; when its time is used
up, or with --minutes 0, only the export and the evaluation are repeated.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import click
import corpus
import numpy as np
import torch
import trigram
from evaluation import QUICK_TOKENS, bits_per_byte, evaluate, expert_use, sample
from model import (
    FAMILIES,
    SEQUENCE_LENGTH,
    LinearCrossEntropy,
    build_model,
    load_balancing_loss,
)
from muon import Muon
from tokenizer import Tokens, encode, train_tokenizer, wrap_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
WARMUP_STEPS = 100
DECAY_FRACTION = 0.6  # a short run gains more from the decay than from time at the peak
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
EXCERPT_CHARS = 32_000
EVALUATION_CHARS = 400_000
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


@dataclass(frozen=True)
class Texts:
    """The three splits as text, END_OF_TEXT after each document."""

    train: str
    heldout: str
    calibration: str


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


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 and the tokenizer, in the layout of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name of its own, which earlier versions do not know.
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def split_texts(documents: Sequence[corpus.Document], *, out: Path, seed: int) -> Texts:
    """Split the documents and write the two evaluation files."""
    total = sum(len(document.text) for document in documents)
    chars = min(EVALUATION_CHARS, total // 10)
    split = corpus.split_corpus(documents, chars=chars, max_excerpt=EXCERPT_CHARS, seed=seed)
    texts = Texts(
        train=corpus.join(split.train),
        heldout=corpus.join(split.heldout),
        calibration=corpus.join(split.calibration),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(texts.heldout, encoding="utf-8")
    (out / "calibration.txt").write_text(texts.calibration, encoding="utf-8")
    return texts


def load_or_train_tokenizer(text: str, work: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the run: a resumed run must not get another one."""
    path = work / "tokenizer.json"
    if not path.is_file():
        train_tokenizer(text, vocab_size).save(str(path))
    return wrap_tokenizer(Tokenizer.from_file(str(path)))


def finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Texts,
    progress: Progress,
    *,
    out: Path,
    seed: int,
) -> None:
    """Export the model, evaluate what was written, and report it."""
    export(model, tokenizer, out)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    train_ids, heldout_ids = encode(tokenizer, texts.train), encode(tokenizer, texts.heldout)
    loss = evaluate(reloaded, heldout_ids)
    use = expert_use(reloaded, heldout_ids)
    report = {
        "perplexity": {
            "model": round(math.exp(loss), 2),
            "trigram": round(trigram.perplexity(train_ids, heldout_ids, len(tokenizer)), 2),
            "uniform": len(tokenizer),
        },
        "heldout_bits_per_byte": round(bits_per_byte(loss, len(heldout_ids), texts.heldout), 4),
        "expert_use_min_max": [[round(min(row), 3), round(max(row), 3)] for row in use],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": progress.step,
        "trained_tokens": progress.step * BATCH_SIZE * SEQUENCE_LENGTH,
        "minutes": round(progress.seconds / 60, 1),
        "seed": seed,
        "bytes": {name: len(text.encode()) for name, text in asdict(texts).items()},
        "tokens": {"train": len(train_ids), "heldout": len(heldout_ids)},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "heldout_losses": progress.heldout_losses,
        "train_losses": progress.losses,
    }
    (out / "training.json").write_text(to_json(report), encoding="utf-8")
    for prompt in ("The Congress of the United States", "And the LORD said", "KING. My lord,"):
        logger.info("sample: %s", sample(reloaded, tokenizer, prompt, seed=seed))
    click.echo(json.dumps(report["perplexity"]))


def to_json(report: Mapping[str, object]) -> str:
    """Return JSON with one line per field, so that long lists of losses stay readable."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


@click.command()
@click.option("--archives", type=click.Path(path_type=Path), help="Folder with the archives.")
@click.option("--text", multiple=True, type=click.Path(path_type=Path), help="Your text instead.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="For checkpoints.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option("--family", type=click.Choice(list(FAMILIES)), default="olmoe", show_default=True)
@click.option("--minutes", default=100.0, show_default=True, help="Wall time of the training.")
@click.option("--vocab-size", default=4096, show_default=True, help="Size of the vocabulary.")
@click.option("--threads", default=2, show_default=True, help="Sequences trained on at once.")
@click.option("--seed", default=0, show_default=True, help="Seed of split, weights and order.")
def main(
    archives: Path | None,
    text: tuple[Path, ...],
    work: Path,
    out: Path,
    family: str,
    minutes: float,
    vocab_size: int,
    threads: int,
    seed: int,
) -> None:
    """Train the tiny model and write it to OUT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if (archives is None) == (not text):
        raise click.UsageError("Give either --archives or --text.")
    set_up_thread()
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    documents = corpus.read_archives(archives) if archives else corpus.read_texts(list(text))
    texts = split_texts(documents, out=out, seed=seed)
    tokenizer = load_or_train_tokenizer(texts.train, work, vocab_size)
    train_ids, heldout_ids = encode(tokenizer, texts.train), encode(tokenizer, texts.heldout)
    logger.info("%d training tokens, %d held-out tokens", len(train_ids), len(heldout_ids))
    model = build_model(len(tokenizer), family)
    progress = train(
        model,
        train_ids,
        heldout_ids,
        work / "checkpoint.pt",
        minutes=minutes,
        threads=threads,
        seed=seed,
    )
    finish(model, tokenizer, texts, progress, out=out, seed=seed)


if __name__ == "__main__":
    main()
