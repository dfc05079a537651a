"""Programs of torch against the ONNX artifact of the same plan."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.model.checkpoint import Checkpoint
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.programs import build as building
from alloc_moe.compiler.programs.build import build
from alloc_moe.compiler.programs.capture import Captured, capture
from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.onnx_file import OnnxFile
from alloc_moe.runtime.artifact.plan import PROGRAM_KEY, AllocationPlan
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.execution.calls import Session
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.execution.torch_programs.session import open_program
from alloc_moe.runtime.text.generation import generate

TOLERANCE = 1e-4
POLICIES = {"mixtral": "sequence", "deepseek_v2": "none", "gpt_oss": "batch"}

PLAIN = """
import sys
import torch
module = torch.jit.load(sys.argv[1])
ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
with torch.no_grad():
    whole, _, kept = module(ids, mask, torch.arange(3)[None], module.empty_cache(1))
    cache = module.empty_cache(1)
    for step in range(3):
        token, past = ids[:, step : step + 1], mask[:, : step + 1]
        last, cache, _ = module(token, past, torch.tensor([[step]]), cache, logits_to_keep=1)
torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)
print(*kept.sum(1).tolist(), *(name for name in sys.modules if name.startswith("alloc_moe")))
"""


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace a model under a plan once for both kinds of programs: only what follows differs."""
    kept: list[tuple[AllocationPlan, Captured]] = []

    def capture_once(checkpoint: Checkpoint, plan: AllocationPlan, **options: Any) -> Captured:
        for known, captured in kept:
            if known == plan:
                return captured
        kept.append((plan, capture(checkpoint, plan, **options)))
        return kept[-1][1]

    with mock.patch.object(building, "capture", capture_once):
        yield


def built(moe: MoeModel, plan: AllocationPlan, path: Path) -> Session:
    """Write the program of a plan, and load it."""
    interface = build(moe, plan, (), path, dtype="float32", console=Console(quiet=True))
    metadata = {PROGRAM_KEY: interface.to_json()}
    files = ArtifactFiles(path, OnnxFile(metadata, {}, frozenset()), plan)
    return open_program(files, counting=True)


@pytest.fixture(scope="module")
def program(
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Session]:
    """Return a function from a family and a suffix to a program at half, built once."""

    @functools.cache
    def make(family: str, suffix: str) -> Session:
        moe = moe_model(family)
        plan = plan_for(moe, half(moe), redistribution=POLICIES[family])
        return built(moe, plan, tmp_path_factory.mktemp("programs") / f"{family}{suffix}")

    return make


def calls(vocabulary: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield ids and mask of a left-padded batch that is prefilled, then decoded."""
    random = np.random.default_rng(0)
    ids, mask = random.integers(0, vocabulary, (3, 20)), np.ones((3, 20), np.int64)
    mask[0, :11] = mask[2, :2] = 0
    yield ids, mask
    for _ in range(5):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        yield random.integers(0, vocabulary, (3, 1)), mask


def run(session: Session) -> tuple[NDArray[np.floating], list[tuple[int, ...]]]:
    """Return the logits of all real tokens, and the experts executed by call and layer."""
    assert session.vocabulary is not None
    cache, logits, counts = session.empty_cache(3), [], []
    for ids, mask in calls(session.vocabulary):
        output = session.run(ids, attention_mask=mask, cache=cache)
        logits.append(output.logits[mask[:, -ids.shape[1] :] > 0])
        assert output.activations is not None
        counts.append(output.activations)
    return np.concatenate(logits), counts


def half(moe: MoeModel) -> list[int]:
    """Return half of the experts of each layer, one less in the first."""
    ks = [max(1, layer.experts_per_token // 2) for layer in moe.layers]
    return [max(1, ks[0] - 1), *ks[1:]]


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v2", pytest.param("gpt_oss", marks=pytest.mark.families)]
)
@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_programs_and_the_onnx_artifact_agree(
    exported: Callable[[str], ir.Model],
    program: Callable[[str, str], Session],
    written: Callable[..., Path],
    family: str,
    suffix: str,
) -> None:
    found = program(family, suffix)
    plan = found.files.plan
    expected = open_session(written(exported(family), plan), ep="cpu")
    logits, counts = run(found)
    other = open_session(expected.files.graph, ep="cpu", count_activations=True)
    np.testing.assert_allclose(logits, run(other)[0], rtol=0, atol=TOLERANCE)
    tokens = [int(mask[:, -ids.shape[1] :].sum()) for ids, mask in calls(2)]
    assert counts == [tuple(count * layer.k for layer in plan.layers) for count in tokens]
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]
    assert _continued(found, prompts) == _continued(expected, prompts)


def _continued(session: Session, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return generate(session, prompts, max_new_tokens=64, eos_ids=())


def test_a_script_needs_nothing_but_torch(program: Callable[[str, str], Session]) -> None:
    files = program("deepseek_v2", ".pt").files
    assert files.plan.redistribution == "none"  # of which it doesn't matter how tokens are called
    code = [sys.executable, "-W", "ignore", "-c", PLAIN, str(files.graph)]
    done = subprocess.run(code, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(3 * layer.k) for layer in files.plan.layers]


def test_two_scripts_of_one_shape_keep_their_own_plans(
    checkpoint: Callable[..., Path],
    plan_for: Callable[..., AllocationPlan],
    tmp_path: Path,
) -> None:
    moe = load_model(str(checkpoint("mixtral", num_hidden_layers=1)))
    counts = []
    for k in (1, 2):
        plan = plan_for(moe, [k], redistribution="none")
        counts.append(run(built(moe, plan, tmp_path / f"{k}.pt"))[1][-1])
    assert counts == [(3 * k,) for k in (1, 2)]


def test_an_export_has_no_paths_of_this_machine(program: Callable[[str, str], Session]) -> None:
    path = program("deepseek_v2", ".pt2").files.graph
    assert not path.with_name(f"{path.name}.data").exists()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/weights/weight_" not in name]
        code = b"".join(map(archive.read, names))
    assert b"modeling_deepseek_v2.py" not in code
    assert str(Path(__file__).parents[3]).encode() not in code
