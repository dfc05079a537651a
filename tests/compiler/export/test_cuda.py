"""Artifacts for CUDA on a CUDA device; their graphs run on the CPU in test_export.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.package import output as package
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.execution.providers import cuda_obstacle
from alloc_moe.runtime.execution.session import open_session

OBSTACLE = cuda_obstacle()


@pytest.mark.gpu
@pytest.mark.skipif(OBSTACLE is not None, reason=f"needs a CUDA device: {OBSTACLE}")
def test_cuda_and_cpu_give_the_same_logits_in_prefill_and_decode(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
    token_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    plan = plan_for(moe_model("olmoe"), [2, 3, 1])
    path = tmp_path / "out.onnx"
    package.save_graph(specialize(exported("olmoe"), plan, device="cuda"), path)
    prompt, token = token_ids[:2, :16], token_ids[:2, 16:17]
    logits = []
    for provider in ("cpu", "cuda"):
        session = open_session(path, ep=provider)
        assert session.device == provider
        prefill = session.run(prompt)
        decode = session.run(token, cache=prefill.cache)
        logits.append(np.concatenate([prefill.logits, decode.logits], axis=1))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)
