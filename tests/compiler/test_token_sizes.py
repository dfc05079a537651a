"""Plans with token sizes, from the graph of a whole model to what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.errors import VerificationError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Compiled
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.execution.session import open_session

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]
Written = Callable[..., Path]
Compile = Callable[..., Compiled]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_tokens_have_their_own_sizes_as_in_the_reference(
    moe_model: Models,
    exported: Graphs,
    score_plan: Plans,
    token_ids: NDArray[np.int64],
    written: Written,
    family: str,
    device: str,
) -> None:
    moe = moe_model(family)
    plan, random = score_plan(moe, "price", overlap=0.5), np.random.default_rng(0)
    hidden = moe.config.get_text_config().hidden_size
    layers = tuple(
        dataclasses.replace(
            layer,
            token_sizes=TokenSizes.of(
                random.normal(scale=0.2, size=(hidden, layer.experts)), np.zeros(layer.experts)
            ),
        )
        for layer in plan.layers
    )
    of_tokens = dataclasses.replace(plan, layers=layers)
    path = written(exported(family), of_tokens, device=device)
    result = verify_artifact(path, moe, of_tokens, token_ids, dtype="float32")
    assert result.max_abs_logit_error < 1e-4
    # With the same sizes for all tokens other experts run.
    with pytest.raises(VerificationError, match=r"executed|logits"):
        verify_artifact(path, moe, plan, token_ids, dtype="float32")


@pytest.mark.parametrize("name", ["out.onnx", "out.pt", "out.pt2"])
def test_a_compile_fits_them_and_runs_by_them(
    compile_to: Compile, tmp_path: Path, name: str
) -> None:
    compiled = compile_to(tmp_path / name, token_sizes=True)
    plan = compiled.plan
    assert all(layer.token_sizes is not None for layer in plan.layers)
    assert 5.9 < plan.budget.activations <= 6
    session = open_session(compiled.path, ep="cpu", count_activations=True)
    assert session.plan == plan
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    counts = [session.run(ids, price=price).activations for price in (0.0, None, 1e9)]
    assert counts[0] == (72, 72, 72)
    assert counts[1] != counts[0]
    assert counts[2] == (18, 18, 18)


def test_the_same_compile_with_them_twice_gives_the_same_bytes(
    compile_to: Compile, tmp_path: Path
) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        compile_to(tmp_path / folder / "out.onnx", token_sizes=True)
    for name in ("out.onnx", "out.onnx.data"):
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name


def test_the_original_model_runs_by_a_plan_that_has_them(
    compile_to: Compile, model: str, tmp_path: Path
) -> None:
    compiled = compile_to(tmp_path / "out.onnx", token_sizes=True, correct="none")
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("The committee of the House met on Monday. " * 6)
    plan.write_text(compiled.plan.to_json())
    runs = []
    for target in ([str(compiled.path)], [model, "--plan", str(plan)]):
        result = CliRunner().invoke(eval_command, [*target, "--text", str(text), "--json", "-q"])
        assert result.exit_code == 0, result.output
        runs.append(json.loads(result.stdout))
    of_artifact, of_model = runs
    assert of_artifact["loss"] == pytest.approx(of_model["loss"], abs=1e-3)
    assert of_artifact["activations"] == pytest.approx(of_model["activations"], abs=3)  # near ties
