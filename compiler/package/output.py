"""Where an artifact may go, and its graph -> files.

`staging` makes the folder in which those are written, and lets them take the output's place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.package.contents import (
    genai_config,
    write_bundle_files,
    write_model_files,
)
from alloc_moe.compiler.package.folder import written_here
from alloc_moe.compiler.package.pair import check_pair
from alloc_moe.compiler.package.paths import Output, data_path
from alloc_moe.compiler.package.staging import FILES, alone, left_bytes, publish, restore, staging
from alloc_moe.compiler.package.weights import save_with_weights, weights_key, written_bytes
from alloc_moe.compiler.workspace.files import explained
from alloc_moe.runtime.artifact.plan import PLAN_KEY
from alloc_moe.runtime.artifact.torch_file import EXPORT, SCRIPT, add_metadata

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Form
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.console import Console

_ENDS = {"onnx": ".onnx", "torchscript": SCRIPT, "export": EXPORT}

__all__ = [
    "FILES",
    "Output",
    "alone",
    "check_space",
    "data_path",
    "genai_config",
    "parse_output",
    "publish",
    "save_graph",
    "staging",
    "stamp",
    "stamp_program",
    "write_bundle_files",
    "write_graph",
    "write_model_files",
]


def parse_output(text: str, *, force: bool, form: Form | None = None) -> Output:
    """Return where `-o text` means: ``DIR/`` or an existing folder a bundle, else a file.

    A file's end says what it is: .onnx; .pt, TorchScript; .pt2, torch.export. A folder is a bundle
    unless `form` says that it is a checkpoint.

    What a compile left there that was killed while it replaced an artifact is undone first.

    Raises:
        OutputError: It exists and `force` is not given, nothing can be written there, or it is
            none of that form.
    """
    path = Path(text)
    with explained("The artifact", path), contextlib.suppress(FileNotFoundError):
        path.stat()  # fails for a loop of links, too long a name, and what is below a file
    if path.name in ("", ".."):  # a folder named by its place, such as `.`
        path = path.resolve()
    bundle = text.endswith(("/", os.sep)) or path.is_dir()
    if not bundle and path.suffix not in (".onnx", SCRIPT, EXPORT):
        raise OutputError(
            f"The output {text!r} is neither a file that ends in .onnx (or {SCRIPT}, {EXPORT}) "
            f"nor a folder. Write {path.with_suffix('.onnx')}, or {text}/ for a bundle."
        )
    _check_form(text, path, form, bundle=bundle)
    output = Output(path, bundle, is_checkpoint=form == "checkpoint")
    if not output.place.name:
        raise OutputError(
            f"{text} is the root of the file system, which is not replaced. Choose another output."
        )
    parent = output.place.parent
    if not parent.is_dir():
        raise OutputError(f"The folder {parent} for the output doesn't exist. Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"The folder {parent} can't be written to. Choose another output.")
    restore(output)
    if bundle and path.exists() and not written_here(path):
        raise OutputError(
            f"{path} is not a bundle that alloc-compile wrote, so it is not replaced. "
            "Choose another output."
        )
    if not bundle:
        check_pair(output)
    taken = [p for p in ([path] if bundle else [path, data_path(path)]) if p.exists()]
    empty = bundle and path.is_dir() and not any(path.iterdir())
    if taken and not (force or empty):
        raise OutputError(f"{taken[0]} exists. Give --force to replace it, or another output.")
    return output


def _check_form(text: str, path: Path, form: Form | None, *, bundle: bool) -> None:
    """Raise OutputError unless the path is one of the form that was asked for."""
    end = _ENDS.get(form or "", path.suffix)
    if form == "checkpoint" and not bundle:
        then = f"a folder, not the file {path.name}. Write {path.with_suffix('')}/"
    elif bundle and form in _ENDS and form != "onnx":
        then = f"one file, tokenizer included, not a folder. Write {path / 'model'}{end}"
    elif not bundle and path.suffix != end:
        then = f"a file that ends in {end}, not {path.name}. Write {path.with_suffix(end)}"
    else:
        return
    raise OutputError(f"--target {form} writes {then}, or leave out --target.")


def check_space(output: Output, needed: int) -> None:
    """Raise OutputError unless the disk has `needed` bytes for the artifact, old one included.

    The new artifact is written beside the old, which goes when the new one is complete. What a
    killed compile left counts as free: it is used or removed.
    """
    parent = output.path.absolute().parent
    free = shutil.disk_usage(parent).free + left_bytes(output)
    if free < needed:
        raise OutputError(
            f"Writing {output.path} needs {_gib(needed)} GiB, but {parent} has {_gib(free)} GiB "
            "free. Free some space, or choose an output on another disk."
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def save_graph(
    graph: ir.Model,
    path: Path,
    *,
    advance: Callable[[int], None] | None = None,
    key: str | None = None,
) -> None:
    """Write an .onnx file and its data, to the same name with .data; see `save_with_weights`."""
    save_with_weights(graph, path, data_path(path), advance=advance, key=key)


def write_graph(
    graph: ir.Model, path: Path, moe: MoeModel, inputs: Sequence[object], console: Console
) -> None:
    """Write as `save_graph` does, from where a killed compile stopped, and tell the progress.

    Args:
        graph: The graph.
        path: The .onnx file.
        moe: The model it was made of.
        inputs: What its passes were given besides; see `weights_key`.
        console: Where progress is told.
    """
    weights = [value.const_value for value in graph.graph.initializers.values()]
    nbytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    key = weights_key(graph, moe, inputs)
    done = written_bytes(data_path(path), key)
    with console.progress("Writing weights", nbytes, unit="bytes", done=done) as progress:
        save_graph(graph, path, advance=progress.advance, key=key)


def stamp_program(path: Path, metadata: Mapping[str, str]) -> None:
    """Put the metadata into a saved program of torch; its weights stay as they are.

    Raises:
        OutputError: They can't be written.
    """
    with explained("The artifact", path, then="choose an output on another disk"):
        add_metadata(path, metadata)


def stamp(path: Path, plan: AllocationPlan, metadata: Mapping[str, str] | None = None) -> None:
    """Put the final plan into the metadata of a saved graph; its data stay as they are.

    Args:
        path: The graph's file.
        plan: What was compiled in.
        metadata: What else the metadata say of the artifact.

    Raises:
        OutputError: It can't be written.
    """
    model = ir.load(path)
    model.metadata_props.update({PLAN_KEY: plan.to_json(), **(metadata or {})})
    with explained("The graph", path, then="choose an output on another disk"):
        ir.save(model, path)
