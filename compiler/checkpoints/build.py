"""Model and plan -> a verified folder in the Hugging Face layout, ready to be published."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.checkpoints.shards import index_of, write_shards
from alloc_moe.compiler.checkpoints.tensors import write_tensors
from alloc_moe.compiler.choices import check_onnx_only
from alloc_moe.compiler.correction.folding import ADDED_BIAS, changed_weights
from alloc_moe.compiler.errors import OptionsError
from alloc_moe.compiler.model.files.weight_files import INDEX
from alloc_moe.compiler.model.layer_progress import layers_progress
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.records import Correction
from alloc_moe.compiler.verify.parity import verify_checkpoint
from alloc_moe.compiler.workspace.files import explained
from alloc_moe.compiler.workspace.moves import link_or_copy
from alloc_moe.runtime.artifact.plan import CHECKPOINT_PLAN_FILE, CHECKPOINT_SHIFTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.package.output import Output
    from alloc_moe.compiler.records import (
        CompileOptions,
        Planned,
        Verification,
    )
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.console import Console

DTYPES = ("float32", "float16", "bfloat16")
"""What weights of a checkpoint can be."""


def check_checkpoint(options: CompileOptions) -> None:
    """Raise OptionsError for what there is in ONNX artifacts only: before anything is loaded."""
    if options.trust_remote_code:
        raise OptionsError(
            "--target checkpoint writes no code, without which a model that needs "
            "--trust-remote-code can't be loaded. Leave out one of the two."
        )
    check_onnx_only(
        options.target,
        DTYPES,
        f"a checkpoint has {', '.join(DTYPES)}, which other programs round by themselves. Leave it "
        "out, or leave out --target checkpoint.",
    )


def build_checkpoint(
    moe: MoeModel,
    planned: Planned,
    token_ids: NDArray[np.int64],
    options: CompileOptions,
    output: Output,
    staged: Path,
    console: Console,
) -> tuple[AllocationPlan, Verification]:
    """Write a checkpoint into `staged`, and verify what was written.

    Args:
        moe: The model.
        planned: The plan, and the corrections that become weights.
        token_ids: Text to verify on [windows, tokens].
        options: What the user asked for.
        output: Where the checkpoint goes.
        staged: The folder in which it is made.
        console: Where progress is told.

    Returns:
        The plan with how it was verified, and that.

    Raises:
        OutputError: It can't be written.
        VerificationError: Loaded again, it doesn't compute what the model does under the plan.
    """
    plan, corrections, dtype = planned.plan, planned.corrections, options.target.dtype
    shifts = _shifts(moe, corrections)
    folder = staged / package.FILES
    shards = write_shards(staged, moe, corrections, getattr(torch, dtype), console)
    package.write_model_files(folder, moe, _config(moe, dtype))
    with explained("The checkpoint", output.path):
        for name in shards:
            link_or_copy(staged / name, folder / name)  # those there are for the next compile
        if len(shards) > 1:
            (folder / INDEX).write_text(index_of(folder, shards), "utf-8")
    with layers_progress(console, "Verifying against PyTorch", moe, passes=1):
        verification = verify_checkpoint(
            load_model(
                str(folder),
                offload="never" if moe.offloading is None else "always",
            ),
            moe,
            plan,
            token_ids,
            dtype=dtype,
            corrections=corrections,
            left=_left(moe, shifts),
        )
    plan = dataclasses.replace(plan, verify=verification.to_plan())
    with explained("The checkpoint", output.path):
        _write_plan(folder, moe, plan, shifts, dtype)
    return plan, verification


def _config(moe: MoeModel, dtype: str) -> PreTrainedConfig:
    """Return the configuration with which transformers loads what is written."""
    config = copy.deepcopy(moe.config)
    config.architectures = [type(moe.model).__name__]
    config.dtype = dtype
    return config


def _shifts(moe: MoeModel, corrections: Sequence[Correction | None]) -> dict[str, np.ndarray]:
    """Return of corrections what no weight can hold [experts, hidden], by experts module."""
    end = f".{ADDED_BIAS}"
    changes = changed_weights(moe, corrections)
    return {
        name.removesuffix(end): change(None)
        for name, change in changes.items()
        if name.endswith(end)
    }


def _left(moe: MoeModel, shifts: Mapping[str, np.ndarray]) -> list[Correction | None]:
    """Return the corrections that are still to be made where the weights have the rest."""
    found = [shifts.get(layer.experts_name) for layer in moe.layers]
    return [
        None if shift is None else Correction(np.ones(shift.shape[1], np.float32), shift)
        for shift in found
    ]


def _write_plan(
    folder: Path,
    moe: MoeModel,
    plan: AllocationPlan,
    shifts: Mapping[str, np.ndarray],
    dtype: str,
) -> None:
    data = json.loads(plan.to_json())
    for entry, layer in zip(data["layers"], moe.layers, strict=True):
        entry["experts_module"] = layer.experts_name
    data["checkpoint"] = {"dtype": dtype} | ({"shifts": CHECKPOINT_SHIFTS_FILE} if shifts else {})
    (folder / CHECKPOINT_PLAN_FILE).write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    if shifts:
        named = {f"{name}.shift": torch.from_numpy(shift) for name, shift in shifts.items()}
        write_tensors(named, folder / CHECKPOINT_SHIFTS_FILE)
