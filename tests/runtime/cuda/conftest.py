"""Artifacts for CUDA."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WIDER = {"qk_nope_head_dim": 48, "v_head_dim": 32}  # than blocks of weights, as of real models
EXAMPLES = Path(__file__).parents[3] / "examples"


def _shortened(model: Path, folder: Path, layers: int) -> Path:
    """Copy a model with its first layers only: an emulated kernel takes long."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    kept = {}
    for name, weight in load_file(model / "model.safetensors").items():
        found = re.match(r"model\.layers\.(\d+)\.", name)
        if found is None or int(found[1]) < layers:
            kept[name] = weight
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def compiled_for_cuda(
    tmp_path_factory: pytest.TempPathFactory,
    captured_once: None,
    checkpoint: Callable[..., Path],
) -> Callable[..., Path]:
    """Return a function from a model's name to its artifact for CUDA at half its budget.

    It is a bundled model, of which only so many layers are taken if a number is given, or else a
    small one of a family.
    """
    from alloc_moe.compiler import api

    def compiled(
        name: str, layers: int | None, dtype: str, redistribute: str, **options: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = EXAMPLES / name
        if not model.is_dir():
            model = checkpoint(name, **(WIDER if (name, dtype) == ("deepseek_v2", "int4") else {}))
        if layers is not None:
            model = _shortened(model, folder / name, layers)
        path = folder / "out.onnx"
        api.compile(
            str(model),
            output=path,
            budget=0.5,
            device="cuda",
            dtype=dtype,
            redistribute=redistribute,
            correct="none",
            tokens=512,
            **options,
        )
        return path

    return compiled
