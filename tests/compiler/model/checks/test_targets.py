"""Targets that states of a fixed size can't have."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.checks.targets import check_target
from alloc_moe.compiler.records import TargetOptions


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"device": "cuda", "dtype": "float16"},
            r"have no operators on CUDA yet\. Use --device cpu",
        ),
        ({"dtype": "float16"}, "are float32 on the CPU. Use --dtype float32, int8 or int4"),
        ({"cache": "int8"}, r"can't be rounded to 8 bits\. Use --cache float32"),
    ],
    ids=str,
)
def test_a_hybrid_is_refused_what_it_cannot_have(target: dict[str, Any], message: str) -> None:
    options = TargetOptions(**target)
    start = "qwen3_next has layers of type linear_attention, whose states"
    with pytest.raises(UnsupportedModelError, match=f"{start} {message}"):
        check_target(AutoConfig.for_model("qwen3_next"), options)
    check_target(AutoConfig.for_model("olmoe"), options)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_hybrid_may_have_fewer_bits(dtype: Any) -> None:
    check_target(AutoConfig.for_model("lfm2_moe"), TargetOptions(dtype=dtype))
