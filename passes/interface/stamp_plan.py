"""Write the plan into the model's metadata."""

from __future__ import annotations

import onnx_ir as ir


class StampPlanPass(ir.passes.InPlacePass):
    """Set the metadata entry `key` to `plan_json`."""

    def __init__(self, key: str, plan_json: str) -> None:
        super().__init__()
        self._key = key
        self._plan_json = plan_json

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = model.metadata_props.get(self._key) != self._plan_json
        model.metadata_props[self._key] = self._plan_json
        return ir.passes.PassResult(model, modified=modified)
