"""Step programs as artifacts carry them: what of them can be run, and that their weights fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alloc_moe.runtime.artifact.plan import NO_STEP_KEY, STEP_KEY
from alloc_moe.runtime.artifact.shapes import ShapeError, load_json
from alloc_moe.runtime.artifact.tensors import Initializer
from alloc_moe.runtime.cuda.launches import attention_bytes
from alloc_moe.runtime.cuda.routers import MOST_CANDIDATES, MOST_EXPERTS
from alloc_moe.runtime.errors import ArtifactError, DeviceError
from alloc_moe.runtime.execution.buffers import BFLOAT16, FLOAT, FLOAT16
from alloc_moe.runtime.execution.slots import CacheSlot
from alloc_moe.runtime.execution.step_programs.operations import PROGRAM
from alloc_moe.runtime.execution.step_programs.weight_reads import weight_reads

Program = Mapping[str, Any]

_FORMAT = 1
_POOLS = ("batch", "sequence")
_ELEMENT_TYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT}
_INTEGERS = (2, 3)  # uint8, int8


def step_program(metadata: Mapping[str, str]) -> Mapping[str, Any] | str:
    """Return an artifact's step program, or why it can't be run."""
    text = metadata.get(STEP_KEY)
    if text is None:
        return metadata.get(NO_STEP_KEY, "the artifact was compiled without a step program")
    try:
        given = load_json(text)
        if reason := _refusal(given):
            return reason
        program: Program = PROGRAM(given, "")
        weight_names(program)
    except ShapeError as error:
        return f"its step program is damaged: {error}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"its step program is damaged: {error!r}"
    return program


def _refusal(program: Program) -> str | None:
    """Return what the kernels don't handle of a program."""
    if program.get("format") != _FORMAT:
        given = f"{program.get('format')!r:.40}"
        return f"its step program is of format {given}, which isn't known here"
    for op in program["ops"]:
        if op["op"] == "route" and (op["experts"] > MOST_EXPERTS or op["top_k"] > MOST_CANDIDATES):
            chosen = f"{op['top_k']} of {op['experts']} experts"
            return f"a router chooses {chosen}, more than is handled"
        if op["op"] == "experts" and op.get("activation", "silu") != "silu":
            return f"its experts' activation is {op['activation']}"
        if any((op.get(norm) or {}).get("offset") for norm in ("q_norm", "k_norm")):
            return "its norms of queries have an offset"
    return "its weights have zero points" if '"zero_points"' in json.dumps(program) else None


def weight_names(program: Program) -> set[str]:
    """Return the initializers that a step program reads."""
    reads = list(weight_reads(program))
    return {read.name for read in reads} | {read.block["scales"] for read in reads if read.block}


def quantized_names(program: Program) -> set[str]:
    """Return the initializers that are integers in blocks, and their scales."""
    blocks = [(read.name, read.block) for read in weight_reads(program) if read.block]
    return {name for weight, block in blocks for name in (weight, block["scales"])}


def prefill_obstacle(program: Program, *, redistribution: str, most_shared: int) -> str | None:
    """Return why a program's calls of many tokens can't be computed so, None if they can.

    Args:
        program: The step program.
        redistribution: That of the plan.
        most_shared: Bytes of shared memory that a block of the GPU can have.
    """
    if program["dtype"] == "float32":
        return "float32"
    if redistribution in _POOLS:
        return f"redistribution {redistribution}"
    for op in program["ops"]:
        if op["op"] == "route" and (op["keep"].get("quota") is not None or op.get("bias")):
            return "a cap or a biased router"
        if op["op"] == "attention" and op["size"] % 16:
            return "a head size that is no multiple of 16"
        if op["op"] == "attention" and attention_bytes(op["size"]) > most_shared:
            return f"heads of {op['size']}, for which the GPU has too little shared memory"
    return None


def check_program(program: Program, initializers: Mapping[str, Initializer]) -> None:
    """Raise DeviceError unless the weights have the types and sizes that kernels will read.

    Kernels check nothing: what a damaged or hostile program says would be read beyond its end.
    """
    dtype = program["dtype"]
    if dtype != "float16" and quantized_names(program):
        raise DeviceError(f"kernels take weights in blocks with float16, not with {dtype}")
    element_type = _ELEMENT_TYPES[dtype]
    for read in weight_reads(program):
        given, block = initializers[read.name], read.block
        if block is None:
            size = given.values.size
            if read.constant:  # rows and columns are told apart by these sizes
                fits = size == read.size
            else:
                fits = size >= read.size and given.element_type == element_type
        else:
            scales = initializers[block["scales"]]
            fits = given.values.nbytes >= read.size * block["bits"] // 8
            fits = fits and given.element_type in _INTEGERS
            fits = fits and scales.values.size >= read.size // block["block"]
            fits = fits and scales.element_type == element_type
        if not fits:
            raise DeviceError(f"the weight {read.name} doesn't fit the step program")


def check_graph(
    program: Program, slots: Sequence[CacheSlot], vocabulary: int | None, *, path: Path
) -> None:
    """Raise ArtifactError unless the graph has the cache and the vocabulary of a step program.

    The cache is made as the graph says, and kernels write into it as the program says.
    """
    expected = {
        (f"past_key_values.{entry['layer']}.{part}", (1, entry["heads"], 0, size))
        for entry in program["kv"]
        for part, size in (("key", entry["key_size"]), ("value", entry["value_size"]))
    }
    element_type = _ELEMENT_TYPES[program["dtype"]]
    alike = all(
        (slot.batch_axis, slot.past_axis, slot.element_type) == (0, 2, element_type)
        for slot in slots
    )
    numbered = {entry["layer"] for entry in program["kv"]} == set(range(len(program["kv"])))
    found = {(slot.past, slot.empty_shape) for slot in slots}
    if not alike or not numbered or found != expected or vocabulary != program["vocabulary"]:
        raise ArtifactError(
            f"The step program of {path} is that of another graph: their caches or vocabularies "
            "differ. Compile the model again."
        )
