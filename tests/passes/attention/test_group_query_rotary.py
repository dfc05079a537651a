"""Attention on CUDA, whose pass takes no windows and no sinks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from alloc_moe.passes.attention.group_query_rotary import RotaryGroupAttentionPass


@pytest.mark.parametrize("features", [{"window": "two"}, {"sinks": True}], ids=str)
def test_windows_and_sinks_stay_as_they_are(
    exported_attention: ModuleType, features: dict[str, Any]
) -> None:
    model = exported_attention.attention(**features)
    before = [node.op_type for node in model.graph]
    assert not RotaryGroupAttentionPass(None)(model).modified
    assert [node.op_type for node in model.graph] == before


def test_without_them_the_operator_attends(exported_attention: ModuleType) -> None:
    model = exported_attention.attention()
    assert RotaryGroupAttentionPass(None)(model).modified
    found = [node.op_type for node in model.graph]
    assert found.count("GroupQueryAttention") == 2
    assert "Attention" not in found
