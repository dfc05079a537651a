"""Checkpoints to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))


@pytest.fixture
def sharded(moe_model: Callable[[str], MoeModel], copy: Path) -> Path:
    """A checkpoint in several files."""
    (copy / "model.safetensors").unlink()
    moe_model("olmoe").model.save_pretrained(copy, max_shard_size="200KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    return copy
