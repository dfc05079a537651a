from __future__ import annotations

import onnx_ir as ir

from alloc_moe.passes.interface.stamp_plan import StampPlanPass


def test_the_plan_is_in_the_metadata_once() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    )
    model.metadata_props["other"] = "stays"
    assert StampPlanPass("plan", '{"format": 1}')(model).modified
    assert not StampPlanPass("plan", '{"format": 1}')(model).modified
    assert StampPlanPass("plan", '{"format": 2}')(model).modified
    assert dict(ir.from_proto(ir.to_proto(model)).metadata_props) == {
        "other": "stays",
        "plan": '{"format": 2}',
    }
