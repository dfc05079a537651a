"""Loaded models of the random checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from alloc_moe.compiler.records import MoeModel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread, and much faster beside other work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def moe_model(checkpoint: Callable[[str], Path]) -> Callable[[str], MoeModel]:
    """Return a function from a family's name to its loaded checkpoint."""
    from alloc_moe.compiler.load import load_model

    loaded: dict[str, MoeModel] = {}

    def load(family: str) -> MoeModel:
        if family not in loaded:
            loaded[family] = load_model(str(checkpoint(family)))
        return loaded[family]

    return load
