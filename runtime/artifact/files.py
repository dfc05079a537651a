"""Where an artifact's files are: the graph, its data, and what lies beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloc_moe.runtime.artifact.digest import DataDigest, difference, read_digests
from alloc_moe.runtime.artifact.onnx_file import OnnxFile, read_onnx_file
from alloc_moe.runtime.artifact.plan import (
    CHECKPOINT_PLAN_FILE,
    GENERATION_KEY,
    MODEL_FILE,
    PLAN_FILE,
    PLAN_KEY,
    TOKENIZER_KEY,
    AllocationPlan,
)
from alloc_moe.runtime.artifact.shapes import (
    Shape,
    ShapeError,
    either,
    optional,
    parse_json,
    read_json,
    record,
    rows,
    string,
    whole,
)
from alloc_moe.runtime.artifact.torch_file import EXPORT, SCRIPT, read_metadata
from alloc_moe.runtime.errors import ArtifactError

_TOKEN = whole(0, 2**31)
_LENGTH = optional(whole(1, 2**40))
_EOS = {"eos_token_id": optional(either(_TOKEN, rows(_TOKEN)))}
_GENAI = record({}, {"model": record({}, _EOS | {"context_length": _LENGTH})})
_GENERATION = record({}, _EOS | {"context_length": _LENGTH})
_CONFIG = record({}, _EOS | {"max_position_embeddings": _LENGTH})
_TOKENIZER = record(
    {"sha256": string(64), "files": rows(string(64))},
    {"bos_token": optional(string()), "eos_token": optional(string())},
)


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer an artifact was compiled with, by hashes of it and of files that hold it."""

    sha256: str
    files: tuple[str, ...]
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True)
class ArtifactFiles:
    """An artifact on disk: the graph's file, what was read of it, and the plan in its metadata.

    Of an artifact of torch, ``onnx`` has the metadata only: weights and code are in the one file.

    Nothing outside of the graph's own folder is looked at: the plan says where the model came from,
    but an artifact of strangers may say anything.
    """

    graph: Path
    onnx: OnnxFile
    plan: AllocationPlan

    @property
    def is_torch(self) -> bool:
        """Whether it is one of TorchScript or torch.export."""
        return self.graph.suffix in (SCRIPT, EXPORT)

    @property
    def is_bundle(self) -> bool:
        """Whether what lies beside the graph belongs to the artifact."""
        return self.graph.name == MODEL_FILE and (self.graph.parent / PLAN_FILE).is_file()

    def digests(self) -> dict[str, DataDigest]:
        """Return what the data files must hold, by name; nothing if that wasn't recorded.

        Raises:
            ArtifactError: It can't be read.
        """
        digests = read_digests(self.onnx.metadata, graph=self.graph)
        if len(digests) == len(self.onnx.data_files) == 1:
            # While an artifact is replaced, its old graph names its data otherwise.
            return dict(zip(self.onnx.data_files, digests.values(), strict=True))
        return digests

    def data_paths(self) -> dict[str, Path]:
        """Return where the external data files are, by the name that the graph has for them.

        Raises:
            ArtifactError: One is missing, or outside of the artifact's folder.
        """
        return {name: self._data_path(name) for name in self.onnx.data_files}

    def check_data(self) -> dict[str, Path]:
        """Return `data_paths`, whose files are complete and, as a glance shows, the right ones.

        Raises:
            ArtifactError: One is missing, cut off, or not what the graph was compiled with.
        """
        digests, paths = self.digests(), self.data_paths()
        for name, size in self.onnx.data_files.items():
            path = paths[name]
            if path.stat().st_size < size:
                raise ArtifactError(
                    f"{path} has {path.stat().st_size} bytes, {self.graph.name} needs {size}. "
                    "The file was cut off, or belongs to another artifact: copy both again."
                )
            if name in digests and (problem := difference(path, digests[name])):
                raise ArtifactError(
                    f"{path} isn't what {self.graph.name} was compiled with: {problem}. Copy both "
                    "again, they belong together; alloc-inspect --check says where they differ."
                )
        return paths

    def _data_path(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(
                f"{self.graph} wants its weights from {name}, outside of its folder. "
                "Don't run it; alloc-compile writes no such artifact."
            )
        # A link to the graph may stand alone, and a pair may have been renamed.
        beside = self.graph.with_name(f"{self.graph.name}.data")
        places = [self.graph.parent / name, self.graph.resolve().parent / name]
        if len(self.onnx.data_files) == 1 and name in self.digests():
            places.append(beside)
        for place in places:
            if place.is_file():
                return place
        raise ArtifactError(
            f"{self.graph} needs its weights in {places[0]}, which is missing. "
            "Copy it beside the artifact; the two belong together."
        )

    def find(self, name: str) -> Path | None:
        """Return the file of that name beside the artifact, if there is one."""
        path = self.graph.parent / name
        return path if path.is_file() else None

    def find_json(self, name: str, shape: Shape) -> dict[str, Any]:
        """Return the content of a JSON file found like `find`; an empty object if there is none.

        Raises:
            ArtifactError: The file is no JSON object of this shape.
        """
        path = self.find(name)
        return {} if path is None else read_settings(path, shape)

    def eos_ids(self) -> frozenset[int]:
        """Return the token ids that end a text; empty if nothing says so."""
        ids = self._first(
            lambda: self.find_json("generation_config.json", _CONFIG).get("eos_token_id"),
            lambda: self.find_json("config.json", _CONFIG).get("eos_token_id"),
            lambda: self._genai().get("eos_token_id"),
            key="eos_token_id",
        )
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, tuple) else [ids])

    def context_length(self) -> int | None:
        """Return the most tokens the model takes, prompt and answer together, if that is known."""
        length: int | None = self._first(
            lambda: self.find_json("config.json", _CONFIG).get("max_position_embeddings"),
            lambda: self._genai().get("context_length"),
            key="context_length",
        )
        return length

    def tokenizer_identity(self) -> TokenizerIdentity | None:
        """Return which tokenizer the artifact was compiled with, if that was recorded."""
        found = self._recorded(TOKENIZER_KEY, _TOKENIZER)
        return TokenizerIdentity(**found) if found else None

    def _genai(self) -> dict[str, Any]:
        model: dict[str, Any] = self.find_json("genai_config.json", _GENAI).get("model", {})
        return model

    def _first(self, *beside: Callable[[], Any], key: str) -> Any:  # any JSON value
        """Return the first setting there is; files beside a bare graph may be another model's."""

        def recorded() -> Any:  # any JSON value
            return self._recorded(GENERATION_KEY, _GENERATION).get(key)

        order = (*beside, recorded) if self.is_bundle else (recorded, *beside)
        return next((found for look in order if (found := look()) is not None), None)

    def _recorded(self, key: str, shape: Shape) -> dict[str, Any]:
        """Return what the metadata say, for a graph that stands alone."""
        try:
            found: dict[str, Any] = parse_json(self.onnx.metadata.get(key, "null"), optional(shape))
        except ShapeError as error:
            raise ArtifactError(
                f"{key} in the metadata of {self.graph} can't be read: {error}. "
                "Copy the artifact again, or compile the model again."
            ) from error
        return found or {}


def read_settings(path: Path, shape: Shape) -> dict[str, Any]:
    """Return the fields of a JSON file that a shape names.

    Raises:
        ArtifactError: The file can't be read, or a field isn't what it must be.
    """
    try:
        found: dict[str, Any] = read_json(path, shape)
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}.") from error
    except ShapeError as error:
        raise ArtifactError(
            f"{path} can't be read as JSON: {error}. Put the model's own file there."
        ) from error
    return found


def checkpoint_plan(path: str | Path) -> AllocationPlan | None:
    """Return the plan beside a checkpoint for transformers; None if the path is no such folder.

    Raises:
        ArtifactError: The plan can't be read.
    """
    file = Path(path) / CHECKPOINT_PLAN_FILE
    if not file.is_file():
        return None
    try:
        return AllocationPlan.from_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error.strerror}.") from error


def is_nameable(path: str | Path) -> bool:
    """Whether a file can have that name: one without NUL or halves of characters."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def find_artifact(path: str | Path) -> ArtifactFiles:
    """Return the artifact at a path: a file, or a bundle folder with a model.onnx in it.

    A file whose name ends in .pt or .pt2 is one of torch, others are ONNX files.

    Raises:
        ArtifactError: Nothing is there, it is no such file, or alloc-moe did not compile it.
    """
    if not is_nameable(path):
        raise ArtifactError(f"{str(path)!r:.200} is no artifact: no file can be called so.")
    graph = Path(path)
    if graph.is_dir():
        graph = graph / MODEL_FILE
        if not graph.is_file():
            if (Path(path) / CHECKPOINT_PLAN_FILE).is_file():
                raise ArtifactError(
                    f"The folder {path} is a checkpoint for transformers, under the plan in "
                    f"{CHECKPOINT_PLAN_FILE}; examples/checkpoints/planned.py runs it. For an "
                    "artifact compile the original model without --target checkpoint."
                )
            if (Path(path) / "config.json").is_file():
                raise ArtifactError(
                    f"The folder {path} is a checkpoint. Compile it first: "
                    f"alloc-compile {path} --budget 0.5 -o out.onnx"
                )
            raise ArtifactError(
                f"The folder {path} has no {MODEL_FILE}, so it is no bundle. "
                "Give a bundle folder or an .onnx file that alloc-compile wrote."
            )
    if graph.suffix in (SCRIPT, EXPORT):
        onnx = OnnxFile(read_metadata(graph), {}, frozenset())
    else:
        onnx = read_onnx_file(graph)
    if PLAN_KEY not in onnx.metadata:
        raise ArtifactError(
            f"{graph} was not compiled by alloc-moe: its metadata has no {PLAN_KEY}. "
            "Make an artifact of the original model with alloc-compile."
        )
    return ArtifactFiles(graph, onnx, AllocationPlan.from_json(onnx.metadata[PLAN_KEY]))
