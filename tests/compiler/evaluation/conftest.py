"""An artifact that models of the harness are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from alloc_moe.compiler import compile
from alloc_moe.compiler.records import Redistribution

if TYPE_CHECKING:
    import onnx_ir as ir


@pytest.fixture(scope="session")
def compile_with(
    checkpoint: Callable[[str], Path],
    exported: Callable[[str], ir.Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Redistribution], Path]:
    """Return a function from a redistribution to a bundle at half the budget."""

    def run(redistribution: Redistribution) -> Path:
        output = tmp_path_factory.mktemp("artifact") / "half"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "alloc_moe.compiler.artifact.export_model", lambda *_, **__: exported("olmoe")
            )
            compile(
                checkpoint("olmoe"),
                output=output,
                tokens=256,
                allocation="uniform" if redistribution == "none" else "sensitivity",
                redistribute=redistribution,
                correct="none",
            )
        return output

    return run


@pytest.fixture(scope="session")
def artifact(compile_with: Callable[[Redistribution], Path]) -> Path:
    """A bundle whose tokens share nothing, so that all ways to run it must agree."""
    return compile_with("none")
