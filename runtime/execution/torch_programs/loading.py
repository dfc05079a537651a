"""Files of torch -> functions on tensors. torch is imported when the first is loaded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloc_moe.runtime.artifact.plan import PROGRAM_KEY
from alloc_moe.runtime.artifact.shapes import (
    ShapeError,
    boolean,
    mapping,
    one_of,
    optional,
    parse_json,
    record,
    rows,
    whole,
)
from alloc_moe.runtime.artifact.torch_file import SCRIPT, opened_archive, read_entry
from alloc_moe.runtime.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from alloc_moe.runtime.artifact.files import ArtifactFiles

Run = Callable[..., tuple["torch.Tensor", list["torch.Tensor"], "torch.Tensor"]]
"""``run(input_ids, attention_mask, position_ids, cache, price, keep)`` -> logits, cache, counts.

A price of None is the plan's; ``keep`` is how many last positions there are logits of, 0 for all;
counts are the experts executed [layers, tokens].
"""

_LOAD_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What torch raises for files that it can't use."""
_EXAMPLE = "data/sample_inputs/model.pt"
_PAYLOADS = "_config.json"
_RAW = re.compile(
    r"(data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id|alignment)|version|extra/[^/]+)"
)
"""What torch.export reads without unpickling, as long as the configurations say so."""
_STORED = record({"config": mapping(record({"use_pickle": boolean}))})
_MOST = 1 << 31
_RANK = 16
_PROGRAM = record(
    {
        "vocabulary": whole(1, _MOST),
        "dial": boolean,
        "dtype": one_of("float32", "bfloat16"),
        "cache": rows(
            record(
                {
                    "sizes": rows(optional(whole(1, _MOST)), least=2, most=_RANK),
                    "past_axis": whole(1, _RANK),
                }
            )
        ),
    }
)


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of the cache: its sizes, None where they are the batch's and the past's."""

    sizes: tuple[int | None, ...]
    past_axis: int


@dataclass(frozen=True)
class Interface:
    """What a program takes besides tokens; the cache's ``dtype`` is that of its weights too."""

    vocabulary: int
    has_dial: bool
    dtype: str
    cache: tuple[CacheTensor, ...]

    def to_json(self) -> str:
        """Return what `read` reads."""
        return json.dumps(
            {
                "vocabulary": self.vocabulary,
                "dial": self.has_dial,
                "dtype": self.dtype,
                "cache": [vars(tensor) for tensor in self.cache],
            }
        )

    @classmethod
    def read(cls, files: ArtifactFiles) -> Interface:
        """Return what an artifact's metadata say.

        Raises:
            ArtifactError: They don't.
        """
        try:
            found = parse_json(files.onnx.metadata.get(PROGRAM_KEY, "null"), _PROGRAM)
            cache = tuple(map(_cache_tensor, found["cache"]))
        except ShapeError as error:
            raise ArtifactError(
                f"{PROGRAM_KEY} in {files.graph} can't be read: {error}. "
                "Copy the artifact again, or compile the model again."
            ) from error
        return cls(found["vocabulary"], found["dial"], found["dtype"], cache)


def _cache_tensor(found: dict[str, Any]) -> CacheTensor:
    tensor = CacheTensor(**found)
    free = [axis for axis, size in enumerate(tensor.sizes) if size is None]
    if free != [0, tensor.past_axis]:
        raise ShapeError(f"of a cache the axes {free} are free, not those of batch and past")
    return tensor


def load_program(path: Path, *, has_dial: bool) -> Run:
    """Load a file of TorchScript or torch.export.

    Raises:
        ArtifactError: torch is missing, or can't load it.
    """
    try:
        import torch
    except ImportError as error:
        raise ArtifactError(
            f"{path} runs in torch, which isn't installed. Install it with pip install torch, or "
            "compile the model to an .onnx file."
        ) from error
    try:
        if path.suffix == SCRIPT:
            load: Callable[..., Any] = torch.jit.load
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
                return _scripted(load(str(path), map_location="cpu"), has_dial)
        check_no_pickle(path)
        return _exported(torch.export.load(str(path)).module(), has_dial)
    except _LOAD_ERRORS as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"torch {torch.__version__} can't load {path}: {reason} "
            "Copy it again, or compile the model again."
        ) from error


def check_no_pickle(path: Path) -> None:
    """Raise ArtifactError if torch.export would unpickle anything of an archive.

    Pickles run code of whoever wrote them. What alloc-compile writes has none: weights are raw
    bytes, and example inputs are left out.
    """
    with opened_archive(path) as archive:
        for info in archive.infolist():
            _, _, name = info.filename.partition("/")
            if name == _EXAMPLE and not info.file_size:
                continue
            if not _RAW.fullmatch(name):
                raise _pickled(path, name)
            if name.endswith(_PAYLOADS):
                _check_payloads(path, name, read_entry(path, archive, info))


def _check_payloads(path: Path, name: str, content: bytes) -> None:
    try:
        entries = parse_json(content, _STORED)["config"].values()
    except ShapeError as error:
        raise ArtifactError(
            f"{name} in {path} can't be read: {error}. Copy it again, or compile the model again."
        ) from error
    if any(entry["use_pickle"] for entry in entries):
        raise _pickled(path, name)


def _pickled(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        f"{path} has {name}, which may be a pickle: those run code of whoever wrote them. "
        "Don't load it; alloc-compile writes no such artifact."
    )


def _scripted(module: Any, has_dial: bool) -> Run:
    def run(ids: Any, mask: Any, positions: Any, cache: Any, price: float | None, keep: int) -> Any:
        dial = (price,) if has_dial else ()
        return module(ids, mask, positions, cache, *dial, keep)

    return run


def _exported(module: Any, has_dial: bool) -> Run:
    import torch

    def run(ids: Any, mask: Any, positions: Any, cache: Any, price: float | None, keep: int) -> Any:
        length = ids.shape[1]
        columns = torch.arange(max(length - keep, 0) if keep else 0, length)
        dial = {"price": torch.tensor(-1.0 if price is None else price)} if has_dial else {}
        return module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            cache=list(cache),
            columns=columns,
            **dial,
        )

    return run
