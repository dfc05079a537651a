"""Graph, tokenizer and plan -> files: a bare out.onnx with its data, or a bundle folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from alloc_moe.compiler.errors import OutputError, VerificationError
from alloc_moe.compiler.package.weights import drop_journals, resumable_files, save_with_weights
from alloc_moe.compiler.workspace.files import sync
from alloc_moe.compiler.workspace.results import results_path
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE, PLAN_KEY, SHARED_CACHE_KEY

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.artifact.plan import AllocationPlan


@dataclass(frozen=True)
class Output:
    """Where an artifact goes: `path` is a folder if `bundle`, else an .onnx file."""

    path: Path
    bundle: bool

    @property
    def graph_name(self) -> str:
        """The graph's file name inside its folder."""
        return MODEL_FILE if self.bundle else self.path.name

    @property
    def profile_path(self) -> Path:
        """Where the sensitivity profile of a compile is kept unless the user says."""
        return self.path.with_name(f"{self.path.name}.profile.json")

    @property
    def results_path(self) -> Path:
        """Where a compile keeps what its passes found, until there is the artifact."""
        return results_path(self.path)


def parse_output(text: str, *, force: bool) -> Output:
    """Return where `-o text` means: ``out.onnx`` a file, ``DIR/`` or an existing folder a bundle.

    Raises:
        OutputError: It exists and `force` is not given, or nothing can be written there.
    """
    path = Path(text)
    if path.name in ("", ".."):  # a folder named by its place, such as `.`
        path = path.resolve()
    bundle = text.endswith(("/", os.sep)) or path.is_dir()
    if not bundle and path.suffix != ".onnx":
        raise OutputError(
            f"The output {text!r} is neither a file that ends in .onnx nor a folder. "
            f"Write {path.with_suffix('.onnx')}, or {text}/ for a bundle."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"The folder {parent} for the output doesn't exist. Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"The folder {parent} can't be written to. Choose another output.")
    if bundle and path.exists() and not _replaceable(path):
        raise OutputError(
            f"{path} is not a bundle that alloc-compile wrote, so it is not replaced. "
            "Choose another output."
        )
    taken = [p for p in ([path] if bundle else [path, data_path(path)]) if p.exists()]
    if taken and not force:
        raise OutputError(f"{taken[0]} exists. Give --force to replace it, or another output.")
    return Output(path, bundle)


def check_space(output: Output, needed: int) -> None:
    """Raise OutputError unless the disk has `needed` bytes for the artifact, old one included.

    The new artifact is written beside the old, which goes when the new one is complete. What a
    killed compile left counts as free: it is used or removed.
    """
    parent = output.path.absolute().parent
    left = [file.stat().st_size for file in _staging_path(output).rglob("*") if file.is_file()]
    free = shutil.disk_usage(parent).free + sum(left)
    if free < needed:
        raise OutputError(
            f"Writing {output.path} needs {_gib(needed)} GiB, but {parent} has {_gib(free)} GiB "
            "free. Free some space, or choose an output on another disk."
        )


def _staging_path(output: Output) -> Path:
    return output.path.absolute().with_name(f".{output.path.name}.partial")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def data_path(graph: Path) -> Path:
    """Return the external data file of an .onnx file."""
    return graph.with_name(f"{graph.name}.data")


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / PLAN_FILE).is_file() or not any(path.iterdir()))


@contextlib.contextmanager
def staging(output: Output, *, note: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield a folder beside the output, on the same file system, that is gone afterwards.

    Its name is fixed: a compile that was killed, interrupted or failed leaves there what the next
    can go on from, which is all that the folder holds at first. Only after a VerificationError
    nothing is left, as the same weights would fail again.

    Args:
        output: Where the artifact goes.
        note: Called with a line that says what is left.

    Raises:
        OutputError: Another compile is writing the same output.
    """
    folder = _staging_path(output)
    folder.mkdir(exist_ok=True)
    with _locked(folder, output):
        _clear(folder)
        try:
            yield folder
            drop_journals(folder)
        except VerificationError:
            drop_journals(folder)
            raise
        finally:
            _remove_or_tell(folder, note)


def _remove_or_tell(folder: Path, note: Callable[[str], None] | None) -> None:
    if not resumable_files(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    _clear(folder)
    if note is not None:
        note(
            f"The weights written so far stay in {folder}: the same command goes on from there. "
            "To give them up, delete the folder."
        )


@contextlib.contextmanager
def _locked(folder: Path, output: Output) -> Iterator[None]:
    """Hold a lock that the system releases if the process is killed."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"Another compile is writing {output.path}. Wait for it, or choose another output."
        ) from error
    else:
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Remove all that no compile can go on from."""
    for entry in set(folder.iterdir()) - resumable_files(folder):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def save_graph(
    graph: ir.Model,
    path: Path,
    *,
    advance: Callable[[int], None] | None = None,
    key: str | None = None,
) -> None:
    """Write an .onnx file and its data, to the same name with .data; see `save_with_weights`."""
    save_with_weights(graph, path, data_path(path), advance=advance, key=key)


def stamp(path: Path, plan: AllocationPlan, metadata: Mapping[str, str] | None = None) -> None:
    """Put the final plan into the metadata of a saved graph; its data stay as they are.

    Args:
        path: The graph's file.
        plan: What was compiled in.
        metadata: What else the metadata say of the artifact.
    """
    model = ir.load(path)
    model.metadata_props.update({PLAN_KEY: plan.to_json(), **(metadata or {})})
    ir.save(model, path)


def write_bundle_files(folder: Path, moe: MoeModel, graph: ir.Model, plan: AllocationPlan) -> None:
    """Write what a bundle has besides the graph: configurations, tokenizer, plan."""
    moe.config.save_pretrained(folder)
    moe.model.generation_config.save_pretrained(folder)
    moe.checkpoint.tokenizer.save_pretrained(folder)
    (folder / PLAN_FILE).write_text(plan.to_json() + "\n", "utf-8")
    genai = genai_config(moe, graph)
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", "utf-8")


def genai_config(moe: MoeModel, graph: ir.Model) -> dict[str, Any]:
    """Return the configuration with which onnxruntime-genai runs the graph.

    ``past_present_share_buffer`` is on if the graph appends to its cache in place.
    """
    config = moe.config.get_text_config()
    generation = moe.model.generation_config
    eos = moe.eos_token_id
    bos = generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = moe.checkpoint.tokenizer.pad_token_id
    inputs = {value.name: value for value in graph.graph.inputs}
    cache = inputs["past_key_values.0.key"].shape
    assert cache is not None
    names = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in inputs}
    heads = config.num_attention_heads
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": bos if bos is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else first_eos,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "hidden_size": config.hidden_size,
                "head_size": int(cache[3]) if isinstance(cache[3], int) else config.head_dim,
                "num_attention_heads": heads,
                "num_key_value_heads": int(cache[1]) if isinstance(cache[1], int) else heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **names,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": SHARED_CACHE_KEY in graph.metadata_props,
        },
    }


def publish(staged: Path, output: Output) -> None:
    """Move the finished files from `staged` to the output.

    Whenever the process is killed, the output is the old artifact, none, or the new one: never a
    graph with another's data.
    """
    drop_journals(staged)  # no part of an artifact
    for file in staged.iterdir():
        sync(file)
    sync(staged)
    if output.bundle:
        _replace_folder(staged, output.path)
    else:
        # An old graph must not meet the new data, so for a moment there is none.
        data = data_path(output.path)
        if (staged / data.name).exists():
            output.path.unlink(missing_ok=True)
            os.replace(staged / data.name, data)
        os.replace(staged / output.path.name, output.path)
    sync(output.path.absolute().parent)


def _replace_folder(staged: Path, target: Path) -> None:
    finished = staged / "new"
    finished.mkdir()
    for file in list(staged.iterdir()):
        if file != finished:
            os.replace(file, finished / file.name)
    if not target.exists():
        os.replace(finished, target)
        return
    old = staged / "old"
    os.replace(target, old)
    try:
        os.replace(finished, target)
    except OSError:
        os.replace(old, target)
        raise
