"""What step programs are refused, before kernels read what they say."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from alloc_moe.runtime.artifact.plan import NO_STEP_KEY, STEP_KEY
from alloc_moe.runtime.artifact.tensors import Initializer
from alloc_moe.runtime.errors import DeviceError
from alloc_moe.runtime.execution.programs import (
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
        {"op": "embed", "weight": "table", "out": "a", "n": 32},
        {
            "op": "route",
            "x": "a",
            "weight": "router",
            "out": "r",
            "experts": 4,
            "top_k": 2,
            "score": "softmax",
            "keep": {"kind": "top", "k": 1},
            "weights": "keep",
            "norm": {"weight": "norm", "eps": 1e-6},
        },
        {
            "op": "experts",
            "x": "a",
            "routing": "r",
            "gate_up": "up",
            "down": "down",
            "intermediate": 16,
            "out": "b",
            "n": 32,
            "activation": "silu",
        },
        {"op": "linear", "x": "b", "weight": "head", "out": "logits", "n": 40, "k": 32},
    ],
}
SIZES = {"table": 1280, "router": 128, "norm": 32, "up": 4096, "down": 2048, "head": 1280}


def _initializers(**sizes: int) -> dict[str, Initializer]:
    return {
        name: Initializer(10, (size,), np.zeros(size, np.float16))
        for name, size in {**SIZES, **sizes}.items()
    }


def test_a_program_names_its_weights() -> None:
    assert set(weight_names(PROGRAM)) == set(SIZES)
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


@pytest.mark.parametrize(
    ("op", "field", "value"),
    [
        (3, "n", 10**12),
        (3, "n", -40),
        (3, "k", 31),
        (2, "intermediate", True),
        (2, "routing", "nowhere"),
        (1, "experts", "4"),
        (3, "weight", None),
        (3, "x", "nowhere"),
        (3, "x_offset", 8),
        (3, "x_offset", -8),
        (2, "x", "r2"),
    ],
)
def test_a_damaged_program_is_refused(op: int, field: str, value: object) -> None:
    program = copy.deepcopy(PROGRAM)
    program["ops"][op][field] = value
    with pytest.raises((DeviceError, KeyError)):
        check_program(program, _initializers())


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
    assert step_program({STEP_KEY: text}) == "its step program is damaged"


def test_without_a_program_the_compilers_reason_is_given() -> None:
    assert step_program({NO_STEP_KEY: "it is round"}) == "it is round"
    assert "without a step program" in step_program({})


def test_prompts_that_kernels_leave_to_onnxruntime() -> None:
    assert prefill_obstacle(PROGRAM, redistribution="none") is None
    assert prefill_obstacle(PROGRAM, redistribution="batch") == "redistribution batch"
    assert prefill_obstacle({**PROGRAM, "dtype": "float32"}, redistribution="none") == "float32"


@pytest.mark.parametrize(
    "change", [{"layer": 1}, {"size": 32}, {"heads": 5}, {"q": {"buffer": "a", "offset": 24}}]
)
def test_attention_beyond_its_buffer_or_cache_is_refused(change: dict[str, Any]) -> None:
    attention: dict[str, Any] = {
        "op": "attention",
        "layer": 0,
        "heads": 2,
        "kv_heads": 1,
        "size": 8,
        "out": "c",
        **{part: {"buffer": "a", "offset": 0} for part in "qkv"},
    }
    cache = {"layer": 0, "heads": 1, "key_size": 8, "value_size": 8}

    def program(attention: dict[str, Any]) -> dict[str, Any]:
        ops = [PROGRAM["ops"][0], attention, *PROGRAM["ops"][1:]]
        return {**PROGRAM, "kv": [cache], "ops": ops}

    check_program(program(attention), _initializers())
    with pytest.raises(DeviceError, match="the step program is damaged"):
        check_program(program({**attention, **change}), _initializers())
