"""What step programs are refused, before kernels read what they say."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alloc_moe.runtime.artifact.plan import NO_STEP_KEY, STEP_KEY
from alloc_moe.runtime.artifact.tensors import Initializer
from alloc_moe.runtime.errors import ArtifactError, DeviceError
from alloc_moe.runtime.execution.buffers import FLOAT, FLOAT16
from alloc_moe.runtime.execution.slots import CacheSlot
from alloc_moe.runtime.execution.step_programs.programs import (
    check_graph,
    check_program,
    prefill_obstacle,
    step_program,
    weight_names,
)

PROGRAM: dict[str, Any] = {
    "format": 1,
    "dtype": "float16",
    "hidden": 32,
    "vocabulary": 40,
    "context_length": 16,
    "kv": [],
    "ops": [
        {"op": "embed", "weight": "table", "out": "b0", "n": 32},
        {
            "op": "route",
            "x": "b0",
            "weight": "router",
            "out": "routed1",
            "experts": 4,
            "hidden": 32,
            "top_k": 2,
            "score": "softmax",
            "keep": {"kind": "top", "k": 1},
            "weights": "keep",
            "norm": {"weight": "norm", "eps": 1e-6},
        },
        {
            "op": "experts",
            "x": "b0",
            "routing": "routed1",
            "gate_up": "up",
            "down": "down",
            "intermediate": 16,
            "out": "b2",
            "n": 32,
            "activation": "silu",
        },
        {"op": "linear", "x": "b2", "weight": "head", "out": "logits", "n": 40, "k": 32},
    ],
}
SIZES = {"table": 1280, "router": 128, "norm": 32, "up": 4096, "down": 2048, "head": 1280}


def _initializers(**sizes: int) -> dict[str, Initializer]:
    return {
        name: Initializer(10, (size,), np.zeros(size, np.float16))
        for name, size in {**SIZES, **sizes}.items()
    }


def test_a_program_names_its_weights() -> None:
    assert not isinstance(step_program({STEP_KEY: json.dumps(PROGRAM)}), str)
    assert weight_names(PROGRAM) == set(SIZES)
    check_program(PROGRAM, _initializers())


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_weight_too_small_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"the weight {name} doesn't fit"):
        check_program(PROGRAM, _initializers(**{name: SIZES[name] - 1}))


def test_a_weight_of_another_type_is_refused() -> None:
    initializers = _initializers()
    initializers["down"] = Initializer(1, (2048,), np.zeros(2048, np.float32))
    with pytest.raises(DeviceError, match="the weight down doesn't fit"):
        check_program(PROGRAM, initializers)


def refused(program: dict[str, Any]) -> str:
    """Return why a program isn't run."""
    found = step_program({STEP_KEY: json.dumps(program)})
    assert isinstance(found, str), "it is run"
    return found


EMBED, ROUTE, EXPERTS, HEAD = range(4)
SCORED = {"kind": "score", "score": "price", "sizes": "sizes", "threshold": 0.1}


@pytest.mark.parametrize(
    ("op", "field", "value", "problem"),
    [
        (HEAD, "n", 10**12, "ops[3].n is 1000000000000"),
        (HEAD, "n", -40, "ops[3].n is -40"),
        (HEAD, "n", 32, "no operation computes logits of 40 tokens"),
        (HEAD, "k", 31, "no multiple of 8"),
        (HEAD, "weight", None, "ops[3].weight is null"),
        (HEAD, "x", "b9", "ops[3] reads 32 elements of b9"),
        (HEAD, "x", "routed1", "ops[3] reads 32 elements of routed1"),
        (HEAD, "x_offset", 8, "ops[3] reads 32 elements of b2"),
        (HEAD, "x_offset", -8, "ops[3].x_offset is -8"),
        (HEAD, "format", {"bits": "4, 0>", "block": 32, "scales": "s"}, "format.bits is '4, 0>'"),
        (HEAD, "format", {"bits": 4, "block": 16, "scales": "s"}, "32 as what is read at once"),
        (HEAD, "format", {"bits": 8, "block": 48, "scales": "s"}, "48 as the block"),
        (HEAD, "out", "alloc_moe.routing", "ops[3].out names no buffer"),
        (HEAD, "out", "experts", "ops[3].out names no buffer"),
        (HEAD, "out", "b2", "ops[3] writes b2 again"),
        (HEAD, "more", 1, "unknown field ops[3].more"),
        (EMBED, "n", 40, "ops[0] has 40 as n, where 32 is expected"),
        (EMBED, "scale", "2", "ops[0].scale is '2'"),
        (EXPERTS, "intermediate", True, "ops[2].intermediate is true"),
        (EXPERTS, "n", 64, "ops[2] has 64 as n, where 32 is expected"),
        (EXPERTS, "routing", "routed7", "experts that routed7 doesn't choose"),
        (EXPERTS, "x", "routed1", "ops[2] has 0 as routed1"),
        (ROUTE, "experts", "4", "damaged"),
        (ROUTE, "top_k", 5, "ops[1] keeps 1 of 5 of 4 experts"),
        (ROUTE, "keep", {"kind": "top", "k": 3}, "ops[1] keeps 3 of 2 of 4 experts"),
        (ROUTE, "keep", {"kind": "top"}, "ops[1] keeps None of 2"),
        (ROUTE, "keep", {**SCORED, "sizes": None}, "no sizes of experts"),
        (ROUTE, "keep", {**SCORED, "threshold": None}, "no score or threshold"),
        (ROUTE, "groups", {"count": 3, "keep": 1, "best": 1}, "3 as groups.count"),
        (ROUTE, "groups", {"count": 2, "keep": 3, "best": 1}, "keeps 1 of 2 of 4"),
        (ROUTE, "hidden", 64, "ops[1] has 64 as hidden"),
        (ROUTE, "op", "format_disk", "ops[1].op is 'format_disk'"),
    ],
)
def test_a_damaged_program_is_refused(op: int, field: str, value: object, problem: str) -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][op][field] = value
    assert problem in refused(program)


def test_a_scored_choice_reads_the_sizes_of_experts() -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][ROUTE]["keep"] = SCORED
    assert "sizes" in weight_names(program)
    check_program(program, _initializers(sizes=4))
    with pytest.raises(DeviceError, match="the weight sizes doesn't fit"):
        check_program(program, _initializers(sizes=3))


def test_quantised_weights_are_integers_with_enough_scales() -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][HEAD]["format"] = {"bits": 4, "block": 32, "scales": "scales"}
    packed = {"head": Initializer(2, (640,), np.zeros(640, np.uint8))}
    check_program(program, {**_initializers(scales=40), **packed})
    with pytest.raises(DeviceError, match="the weight head doesn't fit"):
        check_program(program, {**_initializers(scales=39), **packed})
    with pytest.raises(DeviceError, match="the weight head doesn't fit"):
        check_program(program, _initializers(scales=40))


def test_weights_in_blocks_are_for_activations_of_float16() -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][HEAD]["format"] = {"bits": 4, "block": 32, "scales": "scales"}
    given: dict[str, Any] = {"redistribution": "none", "most_shared": 101_376}
    assert prefill_obstacle(program, **given) is None
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(DeviceError, match=f"blocks with float16, not with {dtype}"):
            check_program({**program, "dtype": dtype}, _initializers(scales=40))


SHARED = {"gate_up": {"gate": "gate", "up": "second"}, "down": "last", "intermediate": 32}
BLOCKS = [{"bits": 8, "block": 16, "scales": name} for name in ("s1", "s2")]


@pytest.mark.parametrize(
    ("formats", "problem"),
    [
        ({"gate": BLOCKS[0], "up": BLOCKS[1]}, None),
        ({"gate": BLOCKS[0]}, "quantised otherwise than its factor"),
        (BLOCKS[0], "two weights in one format"),
    ],
)
def test_a_shared_experts_two_weights_are_quantised_alike(
    formats: dict[str, Any], problem: str | None
) -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][EXPERTS]["shared"] = {**SHARED, "format": {"gate_up": formats}}
    if problem:
        assert problem in refused(program)
    else:
        assert {"gate", "second", "s1", "s2", "last"} <= weight_names(program)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "of format 2"),
        ({"ops": 5}, "damaged"),
        ({"ops": [{"op": "experts", "activation": "gelu"}]}, "activation is gelu"),
        ({"ops": [{"op": "route", "experts": 512, "top_k": 8}]}, "8 of 512 experts"),
        ({"ops": [{"op": "linear", "format": {"zero_points": "z"}}]}, "zero points"),
    ],
)
def test_what_kernels_lack_is_named(change: dict[str, Any], reason: str) -> None:
    found = step_program({STEP_KEY: json.dumps({**PROGRAM, **change})})
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}', "[" * 5000])
def test_a_text_that_is_no_program_is_damaged(text: str) -> None:
    assert str(step_program({STEP_KEY: text})).startswith("its step program is damaged")


def test_without_a_program_the_compilers_reason_is_given() -> None:
    assert step_program({NO_STEP_KEY: "it is round"}) == "it is round"
    assert "without a step program" in step_program({})


def test_prompts_that_kernels_leave_to_onnxruntime() -> None:
    given: dict[str, Any] = {"redistribution": "none", "most_shared": 101_376}
    assert prefill_obstacle(PROGRAM, **given) is None
    assert prefill_obstacle(PROGRAM, **{**given, "redistribution": "batch"}) == (
        "redistribution batch"
    )
    assert prefill_obstacle({**PROGRAM, "dtype": "float32"}, **given) == "float32"


def test_prompts_with_heads_too_large_for_the_gpu_are_left_to_onnxruntime() -> None:
    program = {**PROGRAM, "ops": [{"op": "attention", "size": 256}]}
    given: dict[str, Any] = {"redistribution": "none"}
    assert prefill_obstacle(program, **given, most_shared=166_912) is None
    assert prefill_obstacle(program, **given, most_shared=101_376) == (
        "heads of 256, for which the GPU has too little shared memory"
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layer": 1}, "don't fit the cache of layer 1"),
        ({"size": 32}, "elements of b0"),
        ({"heads": 5, "kv_heads": 2}, "2 as kv_heads"),
        ({"q": {"buffer": "b0", "offset": 24}}, "elements of b0"),
        ({"rotary": {"cos": "c", "sin": "s", "size": 16, "interleaved": False}}, "rotates 16 of 8"),
    ],
)
def test_attention_beyond_its_buffer_or_cache_is_refused(
    change: dict[str, Any], problem: str
) -> None:
    attention: dict[str, Any] = {
        "op": "attention",
        "layer": 0,
        "heads": 2,
        "kv_heads": 1,
        "size": 8,
        "scale": 0.5,
        "out": "b1",
        **{part: {"buffer": "b0", "offset": 0} for part in "qkv"},
    }
    cache = {"layer": 0, "heads": 1, "key_size": 8, "value_size": 8}

    def program(attention: dict[str, Any]) -> dict[str, Any]:
        ops = [PROGRAM["ops"][0], attention, *PROGRAM["ops"][1:]]
        return {**PROGRAM, "kv": [cache], "ops": ops}

    check_program(program(attention), _initializers())
    assert problem in refused(program({**attention, **change}))


SLOT = CacheSlot("past_key_values.0.key", "present.0.key", (1, 1, 0, 8), 0, 2, FLOAT16)
SLOTS = [SLOT, dataclasses.replace(SLOT, past="past_key_values.0.value")]


@pytest.mark.parametrize(
    ("slots", "vocabulary"),
    [
        (SLOTS, 41),
        (SLOTS, None),
        (SLOTS[:1], 40),
        ([SLOTS[0], dataclasses.replace(SLOTS[1], empty_shape=(1, 1, 0, 4))], 40),
        ([SLOTS[0], dataclasses.replace(SLOTS[1], element_type=FLOAT)], 40),
        ([SLOTS[0], dataclasses.replace(SLOTS[1], past_axis=1)], 40),
    ],
)
def test_a_program_of_another_graph_is_refused(
    slots: list[CacheSlot], vocabulary: int | None
) -> None:
    cache = [{"layer": 0, "heads": 1, "key_size": 8, "value_size": 8}]
    check_graph({**PROGRAM, "kv": cache}, SLOTS, 40, path=Path("x.onnx"))
    with pytest.raises(ArtifactError, match=r"step program of x\.onnx is that of another graph"):
        check_graph({**PROGRAM, "kv": cache}, slots, vocabulary, path=Path("x.onnx"))
