"""Models whose decoder layers are read when they run take the memory of a few layers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.runtime.artifact.plan import AllocationPlan

EXAMPLES = Path(__file__).parents[3] / "examples"

# Print by how much the resident memory of a process grows at most while it works on each of its
# arguments but the first, which is small.
IMPORTS = """
import sys
from pathlib import Path
import numpy as np
import torch
from alloc_moe.compiler.model.loading import load_model
"""
PEAK = """
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

torch.set_num_threads(1)
warm, *subjects = sys.argv[1:]
work(warm)
for subject in subjects:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    work(subject)
    print(status("VmHWM") - before)
"""
PROFILE = """
from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity

def work(folder):
    ids = np.random.default_rng(0).integers(0, 256, (2, 64))
    text = CalibrationSet(ids, "", 0, 128, 64, "random")
    measure_sensitivity(load_model(folder, offload="always"), text, metric="fisher")
"""
VERIFY = """
from alloc_moe.compiler.verify import parity as verify
from alloc_moe.runtime.artifact.files import find_artifact

verify.SEGMENT_BYTES = 1 << 25

def work(path):
    plan = find_artifact(path).plan
    moe = load_model(plan.source, offload="always")
    ids = np.random.default_rng(0).integers(0, 256, (2, 64))
    verify.verify_artifact(Path(path), moe, plan, ids, dtype="float32")
"""
LAYER = 48 * 3 * 256 * 256 * 4  # bytes of its experts: 36 MiB


def peak_memory(work: str, warm: Path, *subjects: Path) -> list[int]:
    """Return by how many bytes memory grows at most in `work` on each, after it on a small one."""
    result = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}{work}{PEAK}", warm, *subjects],
        check=True,
        capture_output=True,
        text=True,
        # Else glibc keeps some of what was freed, at times twice a layer.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"},
    )
    return [int(line) for line in result.stdout.splitlines()]


@pytest.fixture
def many_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Return a function that writes a checkpoint of so many layers of `LAYER` bytes."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "checkpoints"))
    import full_size

    def write(layers: int) -> Path:
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_experts": 48, "vocab_size": 512}
        settings = full_size.MODELS["OLMoE-1B-7B"] | sizes
        folder = tmp_path / str(layers)
        full_size.write_checkpoint(folder, settings | {"num_hidden_layers": layers})
        return folder

    return write


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_with_a_layer_and_not_with_their_number(
    checkpoint: Callable[[str], Path], many_layers: Callable[[int], Path]
) -> None:
    few, many = peak_memory(PROFILE, checkpoint("olmoe"), many_layers(4), many_layers(12))
    assert many < 5 * LAYER  # of 12
    assert many - few < 2 * LAYER


# Its sibling in any run is test_no_segment_is_loaded_before_the_last_one_is_freed.
@pytest.mark.rare
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_verification_is_that_of_a_layer(
    checkpoint: Callable[[str], Path],
    many_layers: Callable[[int], Path],
    plan_for: Callable[..., AllocationPlan],
    tmp_path: Path,
) -> None:
    artifacts = []
    for folder in (checkpoint("olmoe"), many_layers(6)):
        moe = load_model(str(folder), offload="always")
        plan = plan_for(moe, [2] * len(moe.layers))
        graph = specialize(export_model(moe, dtype="float32"), plan, device="cpu")
        artifacts.append(tmp_path / f"{folder.name}.onnx")
        package.save_graph(graph, artifacts[-1])
    [peak] = peak_memory(VERIFY, *artifacts)
    assert peak < 4 * LAYER  # of 6
