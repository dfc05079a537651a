"""Where an artifact's files are: the graph, its data, and what lies beside it or at its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloc_moe.runtime.artifact.onnx_file import OnnxFile, read_onnx_file
from alloc_moe.runtime.artifact.plan import GENERATION_KEY, MODEL_FILE, PLAN_KEY, AllocationPlan
from alloc_moe.runtime.errors import ArtifactError

# Where the end of text is looked up, in this order, and in which section of the file.
_CONFIGURATIONS = (
    ("generation_config.json", None),
    ("config.json", None),
    ("genai_config.json", "model"),
)


@dataclass(frozen=True)
class ArtifactFiles:
    """An artifact on disk: the graph's file, what was read of it, and the plan in its metadata."""

    graph: Path
    onnx: OnnxFile
    plan: AllocationPlan

    def check_data(self) -> None:
        """Raise ArtifactError unless all external data files are there and complete."""
        for name, size in self.onnx.data_files.items():
            path = self.graph.parent / name
            if not path.is_file():
                raise ArtifactError(
                    f"{self.graph} needs its weights in {path}, which is missing. "
                    "Copy it beside the artifact; the two belong together."
                )
            if path.stat().st_size < size:
                raise ArtifactError(
                    f"{path} has {path.stat().st_size} bytes, {self.graph.name} needs {size}. "
                    "The file was cut off, or belongs to another artifact: copy both again."
                )

    def find(self, name: str) -> Path | None:
        """Return the file of that name beside the artifact, else in its source folder, if any."""
        for folder in (self.graph.parent, Path(self.plan.source)):
            if (folder / name).is_file():
                return folder / name
        return None

    def find_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file found like `find`; an empty object if there is none.

        Raises:
            ArtifactError: The file is no JSON object.
        """
        path = self.find(name)
        if path is None:
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} can't be read as JSON: {error}.") from error
        if not isinstance(data, dict):
            raise ArtifactError(f"{path} holds no JSON object.")
        return data

    def eos_ids(self) -> frozenset[int]:
        """Return the token ids that end a text; empty if no configuration file says so."""
        for name, section in _CONFIGURATIONS:
            ids = self._setting(name, section, "eos_token_id")
            if ids is not None:
                return _ids(ids)
        return _ids(self._recorded("eos_token_id"))

    def context_length(self) -> int | None:
        """Return the most tokens the model takes, prompt and answer together, if that is known."""
        length = self._setting("config.json", None, "max_position_embeddings")
        if length is None:
            length = self._setting("genai_config.json", "model", "context_length")
        if length is None:
            length = self._recorded("context_length")
        return length if isinstance(length, int) else None

    def _recorded(self, key: str) -> Any:  # any JSON value
        """Return what the metadata say of the model, for a graph that stands alone."""
        return json.loads(self.onnx.metadata.get(GENERATION_KEY, "{}")).get(key)

    def _setting(self, name: str, section: str | None, key: str) -> Any:  # any JSON value
        settings = self.find_json(name)
        return (settings.get(section, {}) if section else settings).get(key)


def _ids(ids: int | list[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def find_artifact(path: str | Path) -> ArtifactFiles:
    """Return the artifact at a path: an .onnx file, or a bundle folder with a model.onnx in it.

    Raises:
        ArtifactError: Nothing is there, it is no ONNX file, or alloc-moe did not compile it.
    """
    graph = Path(path)
    if graph.is_dir():
        graph = graph / MODEL_FILE
        if not graph.is_file():
            raise ArtifactError(
                f"The folder {path} has no {MODEL_FILE}, so it is no bundle. "
                "Give a bundle folder or an .onnx file that alloc-compile wrote."
            )
    onnx = read_onnx_file(graph)
    if PLAN_KEY not in onnx.metadata:
        raise ArtifactError(
            f"{graph} was not compiled by alloc-moe: its metadata has no {PLAN_KEY}. "
            "Make an artifact of the original model with alloc-compile."
        )
    return ArtifactFiles(graph, onnx, AllocationPlan.from_json(onnx.metadata[PLAN_KEY]))
