"""Give the key/value cache the names that ONNX text-generation runtimes expect."""

from __future__ import annotations

import re

import onnx_ir as ir

_HF = re.compile(
    r"(?:in|out)put\.past_key_values\.layers\.(?P<layer>\d+)\."
    r"(?:(?P<grows>key|value)s|(?P<state>conv|recurrent)_states\.0)"
)
_SLOT = re.compile(r"(?:past_key_values|present)\.(\d+\.(?:key|value|conv_state|recurrent_state))")


def cache_slots(values: list[ir.Value]) -> set[str]:
    """Return the slots (``3.key``) that the names of `values` speak of."""
    return {match[1] for value in values if (match := _SLOT.fullmatch(value.name or ""))}


class RenameCachePass(ir.passes.InPlacePass):
    """Rename ``input.past_key_values.layers.3.keys`` to ``past_key_values.3.key``.

    ``...conv_states.0`` becomes ``past_key_values.3.conv_state``, and so do recurrent states.
    Outputs become ``present.3.key``. Names only: shapes and wiring stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        sides = (("past_key_values", model.graph.inputs), ("present", model.graph.outputs))
        for prefix, values in sides:
            for value in values:
                if match := _HF.fullmatch(value.name or ""):
                    kind = match["grows"] or f"{match['state']}_state"
                    value.name = f"{prefix}.{match['layer']}.{kind}"
                    modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        past = cache_slots(list(model.graph.inputs))
        present = cache_slots(list(model.graph.outputs))
        if past != present:
            raise ir.passes.PostconditionError(
                f"Cache slots {sorted(past ^ present)} are on one side only; "
                "each past_key_values.N.* input needs its present.N.* output."
            )
