"""Plans with token sizes, from the graph of a whole model to what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.errors import TokenSizesError, VerificationError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.records import (
    Compiled,
    CompileOptions,
    Goal,
    PlanOptions,
    TargetOptions,
)
from alloc_moe.compiler.sensitivity.token_sizes.choosing import (
    fit_if_possible,
    wants_token_sizes,
)
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.execution.session import open_session

Models = Callable[[str], MoeModel]
Graphs = Callable[[str], ir.Model]
Plans = Callable[..., AllocationPlan]
Written = Callable[..., Path]
Compile = Callable[..., Compiled]

PLAN = PlanOptions()


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
    compiled = compile_to(tmp_path / name)
    plan = compiled.plan
    assert all(layer.token_sizes is not None for layer in plan.layers)
    assert 5.9 < plan.budget.activations <= 6
    session = open_session(compiled.path, ep="cpu", count_activations=True)
    assert session.plan == plan
    shown = CliRunner().invoke(inspect_command, [str(compiled.path)])
    assert "in 3 of 3 layers" in shown.stdout
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


@pytest.fixture
def wants(moe_model: Models) -> Callable[..., bool]:
    """Return a function from options to whether a compile of a small model has token sizes."""

    def ask(
        plan: PlanOptions = PLAN,
        *,
        budget: str = "0.5",
        offloading: object = None,
        **options: Any,
    ) -> bool:
        moe = dataclasses.replace(moe_model("olmoe"), offloading=offloading)
        given = CompileOptions("model", "out.onnx", budget, plan=plan, **options)
        whole = parse_budget(budget, [layer.experts_per_token for layer in moe.layers])
        return wants_token_sizes(given, whole, moe, Console())

    return ask


@pytest.mark.parametrize(
    "plan",
    [PlanOptions(), PlanOptions(correction="none", weights="renorm", refine=3, cap=1.5)],
    ids=["default", "others"],
)
def test_what_has_sizes_in_nats_has_them_unless_told_otherwise(
    wants: Callable[..., bool], plan: PlanOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wants(plan)
    assert not wants(plan, token_sizes=False)
    assert wants(plan, target=TargetOptions(device="cuda"))
    assert wants(plan, goal=Goal("bytes", 1e6))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "sensitivity"),
    [
        (PlanOptions("threshold"), "fisher"),
        (PlanOptions("threshold", cost="bytes"), "fisher"),
        (PlanOptions(), "output"),
        (PlanOptions(allocation="uniform"), "fisher"),
    ],
    ids=str,
)
def test_what_was_chosen_otherwise_goes_without_them_and_nothing_is_said(
    wants: Callable[..., bool],
    plan: PlanOptions,
    sensitivity: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not wants(plan, sensitivity=sensitivity)
    assert not capsys.readouterr().err


def test_the_full_budget_has_them_for_its_dial_which_a_cap_leaves_out(
    wants: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert wants(budget="1.0")
    assert not wants(PlanOptions(cap=1.5), budget="1.0")
    assert not capsys.readouterr().err
    assert not wants(PlanOptions(cap=1.5), budget="1.0", token_sizes=True)
    assert "Token sizes are left out: they would decide nothing: under" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"offloading": object()}, "they take several times as long as the profile where layers"),
    ],
    ids=["offloaded"],
)
def test_what_can_not_have_them_yet_says_so(
    wants: Callable[..., bool],
    options: dict[str, Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not wants(**options)
    assert f"Token sizes are left out: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, True])
def test_text_too_short_for_them_is_an_error_only_if_they_are_asked_for(
    moe_model: Models,
    calibration: CalibrationSet,
    asked: bool | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moe = moe_model("olmoe")
    text = dataclasses.replace(calibration, ids=calibration.ids[:1], further=None)
    options = CompileOptions("model", "out.onnx", "0.5", token_sizes=asked)
    sizes = [[1.0] * layer.num_experts for layer in moe.layers]
    given = options, moe, text, sizes, tmp_path / "kept.json", Console()
    if asked:
        with pytest.raises(TokenSizesError, match=r"--token-sizes can't be: .* Leave it out\."):
            fit_if_possible(*given)
        return
    assert fit_if_possible(*given) is None
    assert "left out: they are fitted to 128 tokens of" in capsys.readouterr().err
