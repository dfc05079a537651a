"""Which part may import what, and how large a module may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT)
    for part in ("compiler", "passes", "runtime")
    for path in (ROOT / part).rglob("*.py")
)
FORBIDDEN = {
    "compiler": (),
    "passes": ("torch", "transformers", "alloc_moe.compiler", "alloc_moe.runtime"),
    "runtime": (
        *("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors"),
        *("alloc_moe.compiler", "alloc_moe.passes"),
    ),
}
LINES = 400


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported name, ``.``-prefixed where the import is relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_part_imports_only_what_is_below_it(path: Path) -> None:
    found = list(imports(ast.parse((ROOT / path).read_text("utf-8"))))
    # A bare import loads every class twice; a relative one says less of where it leads.
    forbidden = (*FORBIDDEN[path.parts[0]], "compiler", "passes", "runtime", "")
    assert [
        name for name in found if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ] == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_stays_short(path: Path) -> None:
    assert len((ROOT / path).read_text("utf-8").splitlines()) <= LINES


def test_no_module_is_named_after_the_standard_library() -> None:
    import sys

    assert {path.stem for path in MODULES} & sys.stdlib_module_names == set()
