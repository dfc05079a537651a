"""Train the tiny mixture-of-experts model that this repository bundles in tiny-moe/.

An OLMoE of 6.2 M parameters, trained on two CPU cores in 100 minutes on public-domain English
(corpus.py names the sources and the command that fetches them). To repeat it::

    python examples/training/train.py --archives archives --work work --out examples/tiny-moe

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
import corpus
import torch
import trigram
from evaluation import bits_per_byte, evaluate, expert_use, sample
from loop import BATCH_SIZE, Progress, set_up_thread, train
from model import FAMILIES, SEQUENCE_LENGTH, build_model
from tokenizer import encode, train_tokenizer, wrap_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

logger = logging.getLogger(__name__)

EXCERPT_CHARS = 32_000
EVALUATION_CHARS = 400_000


@dataclass(frozen=True)
class Texts:
    """The three splits as text, END_OF_TEXT after each document."""

    train: str
    heldout: str
    calibration: str


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
