"""Which room may import what, that nothing goes in a circle, and how large rooms may grow."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("compiler", "passes", "runtime")
FORBIDDEN = {
    "compiler": (),
    "passes": ("torch", "transformers", "alloc_moe.compiler", "alloc_moe.runtime"),
    "runtime": (
        *("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors"),
        *("alloc_moe.compiler", "alloc_moe.passes"),
    ),
}
ROOMS = {
    "compiler": (
        *("errors", "records", "choices", "workspace", "model", "calibration", "reference"),
        *("rounding", "correction", "sensitivity", "planning", "export", "verify", "package"),
        *(
            "programs",
            "checkpoints",
            "sweep",
            "artifact",
            "pipeline",
            "api",
            "evaluation",
            "commands",
        ),
    ),
    "passes": (
        *("base", "blockwise", "linear", "norm", "attention", "experts", "interface", "step"),
        "default",
    ),
    "runtime": (
        "errors",
        "console",
        "artifact",
        "cuda",
        "execution",
        "text",
        "measure",
        "serving",  # texts over HTTP: on all that runs a model, below what starts it
        "commands",
    ),
}
"""Each part's rooms and single modules, in an order in which each imports earlier ones only."""

RUNS_IN_TORCH = Path("runtime", "execution", "torch_programs")
"""The one folder of the runtime that may import torch, when an artifact of torch is loaded."""

LINES = 350
MODULES_PER_FOLDER = 12


def modules_in(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


MODULES = [path for part in PARTS for path in modules_in(part)]
ALL_MODULES = [*MODULES, *modules_in("examples"), *modules_in("tests")]
ALL_MODULES = [path for path in ALL_MODULES if path.parts[:2] != ("tests", "typing")]
FOLDERS = sorted({path.parent for path in MODULES})


def dotted(path: Path) -> str:
    """Return a module's name: that of the folder for its ``__init__``."""
    parts = path.with_suffix("").parts
    return ".".join(("alloc_moe", *(parts[:-1] if parts[-1] == "__init__" else parts)))


NAMES = {dotted(path): path for path in MODULES}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported name, ``.``-prefixed where the import is relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Return the modules of this project that a module imports, for types alone too."""
    found = set()
    for name in imports(parsed(path)):
        module = name if name in NAMES else name.rpartition(".")[0]
        if module in NAMES:
            found.add(module)
    return found - {dotted(path)}


def room_of(module: str) -> int:
    """Return the place of a module's room in its part's order."""
    _, part, *rest = module.split(".")
    return ROOMS[part].index(rest[0])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of some cycle in their order, none if there is no cycle."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for neighbour in sorted(graph.get(node, ())):
            if found := visit(neighbour):
                return found
        path.pop()
        done.add(node)
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_part_imports_only_what_is_below_it(path: Path) -> None:
    found = list(imports(parsed(path)))
    # A bare import loads every class twice; a relative one says less of where it leads.
    forbidden = (*FORBIDDEN[path.parts[0]], "compiler", "passes", "runtime", "")
    if path.parent == RUNS_IN_TORCH:
        forbidden = tuple(name for name in forbidden if name != "torch")
    assert [
        name for name in found if f"{name}.".startswith(tuple(f"{f}." for f in forbidden))
    ] == []


@pytest.mark.parametrize("part", PARTS)
def test_the_order_names_every_room(part: str) -> None:
    entries = (ROOT / part).iterdir()
    rooms = {path.stem for path in entries if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms - {"__init__"} == set(ROOMS[part])


@pytest.mark.parametrize("part", PARTS)
def test_contributors_are_shown_the_rooms_in_this_order(part: str) -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith(f"| `{part}/")]
    assert re.findall(rf"`{part}/(\w+)(?:/|\.py)`", " ".join(cells)) == list(ROOMS[part])


@pytest.mark.parametrize("path", [p for p in MODULES if len(p.parts) > 2], ids=str)
def test_a_room_imports_earlier_rooms_only(path: Path) -> None:
    own = dotted(path)
    part = own.split(".")[1]
    others = [name for name in imported_modules(path) if name.split(".")[1] == part]
    assert [name for name in others if room_of(name) > room_of(own)] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    # What a package re-exports doesn't count: nobody imports it to get at one of its modules.
    graph = {
        name: imported_modules(path)
        for name, path in NAMES.items()
        if path.name != "__init__.py" or "policies" in path.parts
    }
    assert sum(map(len, graph.values())) > 400
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", ALL_MODULES, ids=str)
def test_a_module_stays_short(path: Path) -> None:
    assert len((ROOT / path).read_text("utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in ALL_MODULES}), ids=str)
def test_a_folder_stays_small(folder: Path) -> None:
    names = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert len(names) <= MODULES_PER_FOLDER


@pytest.mark.parametrize("path", [p for p in MODULES if len(p.parts) > 2], ids=str)
def test_no_name_begins_with_its_folders(path: Path) -> None:
    assert not path.stem.startswith(path.parent.name)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if len(f.parts) > 1], ids=str)
def test_a_room_says_what_enters_and_what_leaves(folder: Path) -> None:
    said = ast.get_docstring(parsed(folder / "__init__.py")) or ""
    if folder.name == "policies":  # an interface of its own
        return
    assert "In: " in said
    assert "Out: " in said
    begin = said.partition("Begin at `")[2].partition("`")[0]
    assert begin
    assert (ROOT / folder / f"{begin}.py").is_file() or (ROOT / folder / begin).is_dir()


def test_no_module_is_named_after_the_standard_library() -> None:
    assert {path.stem for path in ALL_MODULES} & sys.stdlib_module_names == set()
