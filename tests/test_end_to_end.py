"""The bundled model through the installed commands, against PyTorch and onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-moe"
HELD_OUT = MODEL / "heldout.txt"
NEW_TOKENS = 64
NEAR_TIE = 1e-3


def run(command: str, *arguments: object) -> Any:
    """Run an installed command with --json and return what it printed."""
    executable = shutil.which(command, path=str(Path(sys.executable).parent))
    assert executable is not None, f"{command} is not installed"
    done = subprocess.run(
        [executable, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "half"
    compiled = run(
        "alloc-compile", MODEL, "--budget", "0.5", "--tokens", "1024", "-o", f"{folder}/"
    )
    assert compiled["plan"]["verify"]["max_abs_logit_error"] < 1e-3
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Three pieces of held-out text of different lengths."""
    text = HELD_OUT.read_text("utf-8")
    return [text[1000:1090], text[60_000:60_030], text[150_000:150_240]]


def test_held_out_text_executes_exactly_what_is_planned(bundle: Path) -> None:
    found = run("alloc-eval", bundle, "--text", HELD_OUT, "--tokens", "4096")
    planned = [layer["k"] * found["tokens_run"] for layer in found["plan"]["layers"]]
    assert found["activations"] == planned
    assert sum(layer["k"] for layer in found["plan"]["layers"]) <= 24


def test_full_budget_has_the_perplexity_of_the_original(tmp_path: Path) -> None:
    run("alloc-compile", MODEL, "--budget", "1.0", "-o", tmp_path / "full.onnx")
    options = ("--text", HELD_OUT, "--tokens", "4096")
    artifact = run("alloc-eval", tmp_path / "full.onnx", *options)
    original = run("alloc-eval", MODEL, *options)
    assert artifact["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    assert artifact["activations"] == original["activations"]


def test_artifact_and_pytorch_under_its_plan_have_the_same_loss(bundle: Path) -> None:
    options = ("--text", HELD_OUT, "--tokens", "2048")
    artifact = run("alloc-eval", bundle, *options)
    plan = bundle / "allocation.json"
    reference = run("alloc-eval", MODEL, "--plan", plan, *options)
    assert artifact["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert artifact["activations"] == reference["activations"]


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_greedy_tokens_equal_those_of_pytorch(
    bundle: Path, prompts: list[str], rows: list[int]
) -> None:
    from alloc_moe.runtime.generate import generate
    from alloc_moe.runtime.session import open_session
    from alloc_moe.runtime.text import load_tokenizer

    session = open_session(bundle, ep="cpu")
    tokenizer = load_tokenizer(session.files)
    ids = [tokenizer.encode(prompts[row]).ids for row in rows]
    made = generate(session, ids, max_new_tokens=NEW_TOKENS, eos_ids=frozenset())
    expected, logits = _generate_in_pytorch(bundle, ids)
    _assert_same_but_near_ties(np.asarray(made), expected, logits)


def test_greedy_tokens_equal_those_of_onnxruntime_genai(bundle: Path, prompts: list[str]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from alloc_moe.runtime.generate import generate
    from alloc_moe.runtime.session import open_session

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
    command = Path(sys.executable).with_name("alloc-run")
    streamed = subprocess.run(
        [command, bundle, "--prompt", prompt, "--max-new-tokens", "24"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert prompt + returned["completions"][0]["text"] == streamed.removesuffix("\n")


def _generate_in_pytorch(
    bundle: Path, ids: list[list[int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return tokens [rows, new] and logits [rows, new, vocabulary] under the plan."""
    import torch

    from alloc_moe.compiler.load import load_model
    from alloc_moe.compiler.policies import layer_parameters
    from alloc_moe.compiler.reference import allocated
    from alloc_moe.runtime.files import find_artifact

    plan = find_artifact(bundle).plan
    moe = load_model(str(MODEL))
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    given = layer_parameters(plan)
    with (
        torch.inference_mode(),
        allocated(moe.model, moe.layers, given, redistribution="batch", weights="keep"),
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
