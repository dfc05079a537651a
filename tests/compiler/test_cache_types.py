"""The type of keys and values between calls, from option to artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from alloc_moe.compiler import artifact
from alloc_moe.compiler.records import Compiled
from alloc_moe.runtime.artifact.plan import SHARED_CACHE_KEY
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.execution.buffers import FLOAT, INT8
from alloc_moe.runtime.execution.session import open_session

Compile = Callable[..., Compiled]


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_the_cache_has_the_type_asked_for(compile_to: Compile, tmp_path: Path, cache: str) -> None:
    compiled = compile_to(f"{tmp_path / 'bundle'}/", cache=cache)
    session = open_session(compiled.path, ep="cpu")
    assert session.shares_cache
    assert session.files.onnx.metadata[SHARED_CACHE_KEY] == cache
    slot = session.slots[0]
    assert slot.element_type == {"float32": FLOAT, "int8": INT8}[cache]
    genai = json.loads((compiled.path / "genai_config.json").read_text())
    assert genai["search"]["past_present_share_buffer"] is True


def test_a_cache_that_is_copied_is_told_of(
    compile_to: Compile,
    monkeypatch: pytest.MonkeyPatch,
    exported: Callable[[str], ir.Model],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph = exported("olmoe").clone()
    for node in graph.graph:
        if node.op_type == "Attention":
            node.attributes["softcap"] = ir.AttrFloat32("softcap", 1e9)  # changes nothing else
    monkeypatch.setattr(artifact, "export_model", lambda *_, **__: graph)
    compiled = compile_to(tmp_path / "out.onnx", console=Console())
    assert "The cache is copied at every step" in capsys.readouterr().err
    assert not open_session(compiled.path, ep="cpu").shares_cache
