"""The bundled model through the commands, against PyTorch and onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction
    from alloc_moe.runtime.artifact.plan import AllocationPlan

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-moe"
HELD_OUT, CALIBRATION = MODEL / "heldout.txt", MODEL / "calibration.txt"
CALIBRATION_TOKENS = 2048
NEW_TOKENS = 64
NEAR_TIE = 1e-3


def run(command: str, *arguments: object) -> Any:
    """Run a command with --json in this process, and return what it printed."""
    [entry] = entry_points(group="console_scripts", name=command)
    done = CliRunner().invoke(entry.load(), [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def shown_by(command: str, *arguments: object) -> str:
    """Return what an installed command prints, run in a process of its own."""
    executable = shutil.which(command, path=str(Path(sys.executable).parent))
    assert executable is not None, f"{command} is not installed"
    whole = [executable, *map(str, arguments)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, captured_once: None) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "half"
    sized = ("--budget", "0.5", "--tokens", CALIBRATION_TOKENS)
    compiled = run("alloc-compile", MODEL, *sized, "-o", f"{folder}/")
    assert compiled["plan"]["verify"]["max_abs_logit_error"] < 1e-3
    return folder


class Reference(NamedTuple):
    """What the artifact must equal: the model in PyTorch, and what its experts are changed by."""

    moe: MoeModel
    plan: AllocationPlan
    corrections: Sequence[Correction | None]


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Reference:
    """The artifact's plan, and the corrections that the same options give again."""
    from alloc_moe.compiler.calibration.windows import calibrate
    from alloc_moe.compiler.model.loading import load_model
    from alloc_moe.compiler.planning.allocation import parse_budget
    from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
    from alloc_moe.compiler.records import CalibrationOptions, PlanOptions, SensitivityProfile
    from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
    from alloc_moe.runtime.artifact.files import find_artifact
    from alloc_moe.runtime.console import Console

    moe, console = load_model(str(MODEL)), Console(quiet=True)
    path = bundle.with_name("half.profile.json")
    profile = SensitivityProfile.from_json(path.read_text("utf-8"), path=path)
    text = calibrate(moe.checkpoint, CalibrationOptions(tokens=CALIBRATION_TOKENS), console)
    sizes = expert_sizes("price", profile, moe)
    assert sizes is not None
    token_sizes = fit_token_sizes(moe, text, sizes, console)
    planned = make_planned(
        moe,
        text,
        parse_budget("0.5", [layer.experts_per_token for layer in moe.layers]),
        PlanOptions(dial=False),
        profile=profile,
        token_sizes=token_sizes,
        console=console,
    )
    plan = find_artifact(bundle).plan
    assert tuple(layer.token_sizes for layer in plan.layers) == token_sizes
    assert plan.price == pytest.approx(planned.plan.price, rel=1e-4)
    assert plan.correction["layers"] == planned.plan.correction["layers"]
    assert any(planned.corrections)
    return Reference(moe, plan, planned.corrections)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Three pieces of held-out text of different lengths."""
    text = HELD_OUT.read_text("utf-8")
    return [text[1000:1090], text[60_000:60_030], text[150_000:150_240]]


def test_text_like_the_calibration_text_executes_the_plan(bundle: Path) -> None:
    options = ("--text", CALIBRATION, "--tokens", "8192", "--json")
    found = json.loads(shown_by("alloc-eval", bundle, *options))
    plan = found["plan"]
    assert plan["redistribution"] == "price"
    assert plan["budget"]["activations"] == pytest.approx(24, rel=0.003)
    assert plan["budget"]["activations"] <= 24
    # A price that was set on four windows: other text runs some per cent more.
    assert sum(found["activations_per_token"]) == pytest.approx(24, rel=0.06)


@pytest.mark.parametrize(("budget", "activations"), [("0.25", 12), ("36", 36)])
def test_the_same_artifact_executes_other_budgets(
    bundle: Path, budget: str, activations: int
) -> None:
    options = ("--text", CALIBRATION, "--tokens", "8192", "--budget", budget)
    found = run("alloc-eval", bundle, *options)
    assert sum(found["activations_per_token"]) == pytest.approx(activations, rel=0.05)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, captured_once: None) -> Path:
    """An artifact of the full budget, whose weights are the model's own at any price."""
    artifact = tmp_path_factory.mktemp("full") / "full.onnx"
    run("alloc-compile", MODEL, "--budget", "1.0", "--tokens", "512", "-o", artifact)
    return artifact


def test_full_budget_has_the_perplexity_of_the_original(full: Path) -> None:
    options = ("--text", HELD_OUT, "--tokens", "4096")
    artifact = run("alloc-eval", full, *options)
    original = run("alloc-eval", MODEL, *options)
    assert artifact["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    assert artifact["activations"] == original["activations"]


def test_artifact_and_original_have_the_same_loss_at_a_budget(full: Path) -> None:
    options = ("--text", HELD_OUT, "--tokens", "2048", "--budget", "0.5")
    artifact = run("alloc-eval", full, *options)
    in_pytorch = run("alloc-eval", MODEL, "--plan", full, *options)
    assert artifact["loss"] == pytest.approx(in_pytorch["loss"], rel=1e-4)
    # A score at the price may fall on either side.
    assert artifact["activations"] == pytest.approx(in_pytorch["activations"], rel=1e-3)


@pytest.mark.parametrize("budget", [None, "0.25"])
def test_artifact_and_pytorch_have_the_same_loss_under_plan_and_corrections(
    bundle: Path, reference: Reference, budget: str | None
) -> None:
    import torch

    from alloc_moe.compiler.reference.experts import allocated
    from alloc_moe.compiler.reference.policies import layer_parameters
    from alloc_moe.runtime.artifact.dial import price_of
    from alloc_moe.runtime.measure.evaluate import evaluate

    options = ("--text", HELD_OUT, "--tokens", "2048", *(("--budget", budget) if budget else ()))
    artifact = run("alloc-eval", bundle, *options)
    moe, plan, corrections = reference
    ids = moe.checkpoint.tokenizer(
        HELD_OUT.read_text("utf-8"), add_special_tokens=False, verbose=False
    )
    given = layer_parameters(plan, price_of(plan, budget) if budget else None)
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            given,
            redistribution="price",
            weights="keep",
            corrections=corrections,
        ) as activations,
    ):
        found = evaluate(
            lambda tokens: moe.model(torch.from_numpy(tokens)).logits.numpy(),
            ids["input_ids"][:2048],
            window=artifact["window"],
            stride=artifact["stride"],
        )
    assert artifact["loss"] == pytest.approx(found.loss, rel=1e-4)
    # A score at the price may fall on either side.
    assert artifact["activations"] == pytest.approx(activations.executed, rel=1e-3)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_greedy_tokens_equal_those_of_pytorch(
    bundle: Path, reference: Reference, prompts: list[str], rows: list[int]
) -> None:
    from alloc_moe.runtime.execution.session import open_session
    from alloc_moe.runtime.text.generation import generate
    from alloc_moe.runtime.text.tokenizer import load_tokenizer

    session = open_session(bundle, ep="cpu")
    tokenizer = load_tokenizer(session.files)
    ids = [tokenizer.encode(prompts[row]).ids for row in rows]
    made = generate(session, ids, max_new_tokens=NEW_TOKENS, eos_ids=frozenset())
    expected, logits = _generate_in_pytorch(reference, ids)
    _assert_same_but_near_ties(np.asarray(made), expected, logits)


def test_greedy_tokens_equal_those_of_onnxruntime_genai(bundle: Path, prompts: list[str]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from alloc_moe.runtime.execution.session import open_session
    from alloc_moe.runtime.text.generation import generate

    model = genai.Model(str(bundle))
    ids = genai.Tokenizer(model).encode(prompts[0])
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    session = open_session(bundle, ep="cpu")
    assert session.files.eos_ids()
    ours = generate(
        session, [ids.tolist()], max_new_tokens=NEW_TOKENS, eos_ids=session.files.eos_ids()
    )
    assert ours[0][: len(tokens)] == tokens


def test_text_streams_the_same_as_it_is_returned(bundle: Path) -> None:
    prompt = "The committee of the House"
    returned = run("alloc-run", bundle, "--prompt", prompt, "--max-new-tokens", "24")
    streamed = shown_by("alloc-run", bundle, "--prompt", prompt, "--max-new-tokens", "24")
    assert prompt + returned["completions"][0]["text"] == streamed.removesuffix("\n")


def test_text_of_another_budget_is_that_of_its_price(bundle: Path) -> None:
    from alloc_moe.runtime.text.model import load

    prompt = HELD_OUT.read_text("utf-8")[1000:1300]
    options = ("--prompt", prompt, "--max-new-tokens", "24")
    as_compiled = run("alloc-run", bundle, *options)["completions"][0]
    with_budget = run("alloc-run", bundle, *options, "--budget", "0.25")["completions"][0]
    model = load(bundle, ep="cpu")
    for completion, budget in ((as_compiled, None), (with_budget, "0.25")):
        (expected,) = model.generate([prompt], max_new_tokens=24, budget=budget)
        assert completion["text"] == expected.text
    assert as_compiled["text"] != with_budget["text"]


def test_inspect_shows_price_dial_and_correction(bundle: Path) -> None:
    shown = shown_by("alloc-inspect", bundle)
    facts = {line.split("  ")[0] for line in shown.splitlines()}
    assert {"budget", "redistribution", "price", "dial", "correction", "verified"} <= facts
    assert shown.count("│ model.layers.") == 6
    data = run("alloc-inspect", bundle)
    assert data.pop("artifact") == str(bundle / "model.onnx")
    assert data == json.loads((bundle / "allocation.json").read_text("utf-8"))


def _generate_in_pytorch(
    reference: Reference, ids: list[list[int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return tokens [rows, new] and logits [rows, new, vocabulary] under plan and corrections."""
    import torch

    from alloc_moe.compiler.reference.experts import allocated
    from alloc_moe.compiler.reference.policies import layer_parameters

    moe, plan, corrections = reference
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            layer_parameters(plan),
            redistribution="price",
            weights="keep",
            corrections=corrections,
        ),
    ):
        output = moe.model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return output.sequences[:, longest:].numpy(), torch.stack(output.logits, 1).numpy()


def _assert_same_but_near_ties(
    made: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]
) -> None:
    """Compare up to the first step at which some row differs: there, the two must tie."""
    assert made.shape == expected.shape
    steps = np.flatnonzero((made != expected).any(axis=0))
    if len(steps) == 0:
        return
    for row in np.flatnonzero(made[:, steps[0]] != expected[:, steps[0]]):
        step = logits[row, steps[0]]
        gap = step[expected[row, steps[0]]] - step[made[row, steps[0]]]
        assert gap < NEAR_TIE, f"row {row} differs at step {steps[0]} by {gap}"
