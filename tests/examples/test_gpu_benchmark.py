"""The script of GPU figures, tried out on the CPU with a tiny model, and where parts of it fail."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.runtime.execution.step_programs.programs import prefill_obstacle, step_program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="writes at offsets of a file")


@pytest.fixture
def gpu(load: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Return what imports a module of the GPU benchmark."""
    return lambda name: load(f"benchmarks/gpu/{name}")


@pytest.mark.slow
def test_a_tiny_model_is_made_checked_timed_and_reported(
    gpu: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = gpu("cases")
    made = cases.tiny(next(case for case in cases.LARGE if case.name == "olmoe"))
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    make = gpu("make")
    make.write_case(made, graphs)
    description = json.loads((graphs / "olmoe.json").read_text("utf-8"))
    for_small = {
        **description,
        "name": "small-olmoe",
        "plans": {"price": description["plans"]["price"]},
    }
    (graphs / "small-olmoe.json").write_text(json.dumps(for_small), "utf-8")

    out = tmp_path / "out.json"
    only = "memory,small,olmoe,decode,logits,tokens"
    command = ["run.py", "--graphs", str(graphs), "--device", "cpu", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--only", only])
    assert gpu("run").main() == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    assert "WRONG" not in shown
    records = {record["name"]: record for record in json.loads(out.read_text("utf-8"))["records"]}
    half = records["olmoe/decode/half/captured"]
    assert half["bytes"] < records["olmoe/decode/full/captured"]["bytes"]
    assert {"floor_fraction", "of_full", "of_plain"} <= set(half)
    assert records["olmoe/tokens/full/captured"]["value"] == 21
    assert records["small-olmoe/logits/price/captured"]["value"] == 0
    assert "olmoe/prefill/full/captured" not in records


@pytest.mark.rare
@pytest.mark.parametrize("name", ["deepseek", "deepseek-int4"])
def test_steps_of_deepseek_have_a_program(
    gpu: Callable[[str], ModuleType], tmp_path: Path, name: str
) -> None:
    cases = gpu("cases")
    case = cases.tiny(next(case for case in cases.LARGE if case.name == name))
    gpu("make").write_case(dataclasses.replace(case, plans=("price",)), tmp_path)
    program = step_program(ir.load(tmp_path / f"{name}-price.onnx").metadata_props)
    assert not isinstance(program, str), program
    assert [op["op"] for op in program["ops"]].count("attention") == 2
    assert prefill_obstacle(program, redistribution="price", most_shared=232_448) is None


def test_parts_that_end_or_hang_are_reported_and_the_rest_goes_on(
    gpu: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu("run")
    script = tmp_path / "parts.py"
    script.write_text(
        "import json, os, sys, time\n"
        "skipped = json.loads(sys.argv[-1])\n"
        "for name in ('m/decode/a/p', 'm/decode/b/p', 'm/decode/c/p', 'm/decode/d/p'):\n"
        "    if name in skipped: continue\n"
        "    print(json.dumps({'begin': name}), flush=True)\n"
        "    if '/b/' in name: os.abort()\n"
        "    if '/c/' in name: time.sleep(60)\n"
        "    print(json.dumps({'name': name, 'value': 1.0, 'unit': 'ms'}), flush=True)\n"
    )
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    found = list(run.run_part("m", [], deadline=time.time() + 60, silence=6))
    assert [record["name"].split("/")[2] for record in found] == ["a", "b", "c", "d"]
    assert [record.get("error") for record in found] == [
        None,
        "the process ended with -6",
        "no answer in 6 s",
        None,
    ]
    late = list(run.run_part("m", [], deadline=time.time() - 1, silence=6))
    assert late[-1]["error"] == "out of time"


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "UINT8"])
def test_weights_are_as_large_as_asked_for(gpu: Callable[[str], ModuleType], kind: str) -> None:
    pools = gpu("fill").Pools(size=5001)
    given: dict[str, Any] = {"type": kind, "std": 0.02} if kind != "UINT8" else {"type": kind}
    found = pools.of(given)
    assert found is pools.of(dict(given))
    if kind == "UINT8":
        assert found.std() == pytest.approx(74, abs=3)
        return
    values = {
        "FLOAT": lambda: found.view(np.float32),
        "FLOAT16": lambda: found.view(np.float16).astype(np.float32),
        "BFLOAT16": lambda: (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    }[kind]()
    assert values.std() == pytest.approx(0.02, rel=0.05)
    even = pools.of({"type": "FLOAT", "low": 0.8, "high": 1.2}).view(np.float32)
    assert 0.8 <= even.min() < even.max() <= 1.2


def test_wrong_logits_and_near_ties_are_told_apart(gpu: Callable[[str], ModuleType]) -> None:
    checks = gpu("checks")
    expected = np.zeros((1, 200, 5), np.float32)
    expected[..., 1], expected[..., 2] = 1.0, 0.99
    near, wrong = expected.copy(), expected.copy()
    near[0, 0, 2] += 0.011
    wrong[0, :, 3] = 2.0
    for logits, ok in ((expected, True), (near, True), (wrong, False), (wrong * np.nan, False)):
        comparison = checks.Comparison()
        comparison.add(logits, expected)
        assert comparison.verdict(0.02)["ok"] is ok
    ids, mask = checks.left_padded(4, 10, 50)
    assert ids.shape == mask.shape == (4, 10)
    assert (np.diff(mask, axis=1) >= 0).all()
    assert mask[0].all()
    assert mask[:, -1].all()
    assert checks.same_tokens(np.array([[1, 2, 3]]), np.array([[1, 9, 3]])) == (1, 3)


def test_only_known_parts_and_kinds_are_taken(gpu: Callable[[str], ModuleType]) -> None:
    run = gpu("run")
    assert run.chosen(None) == (list(run.PARTS), [])
    assert run.chosen("olmoe,decode") == (["olmoe"], ["decode"])
    assert run.chosen("decode") == (list(run.PARTS), ["decode", "copy"])
    with pytest.raises(ValueError, match="no absent among"):
        run.chosen("absent")
