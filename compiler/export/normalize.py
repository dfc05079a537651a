"""Model -> its graph with the passes that no plan changes: ready for any number of plans."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.export.graph import export_graph
from alloc_moe.compiler.rounding.weights import weight_reader
from alloc_moe.passes.default import normalize_passes
from alloc_moe.runtime.artifact.plan import GENERATION_KEY

if TYPE_CHECKING:
    import onnx_ir as ir

    from alloc_moe.compiler.export.graph import ReadWeight
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import DType


def export_model(moe: MoeModel, *, dtype: DType, read: ReadWeight | None = None) -> ir.Model:
    """Return the model's graph, ready to be specialised for any number of plans.

    Linear layers and embeddings are stored as the model's quantization says, if it has one.

    Args:
        moe: The model.
        dtype: Type of weights and activations, unless it has a quantization.
        read: What reads a weight, by name and type, whenever the graph is saved; by default what
            `weight_reader` gives for this model.

    Raises:
        UnsupportedModelError: The model keeps more from call to call than keys, values and one
            state of each kind.
    """
    activations = moe.quantization.activations if moe.quantization else dtype
    graph = export_graph(moe.checkpoint, dtype=activations, read=read or weight_reader(moe))
    normalize_passes(moe.quantization.weights if moe.quantization else {})(graph)
    _check_inputs(graph, moe)
    graph.metadata_props[GENERATION_KEY] = generation_metadata(moe)
    return graph


def generation_metadata(moe: MoeModel) -> str:
    """Return what an artifact that stands alone says of generation, a JSON object."""
    return json.dumps({"eos_token_id": moe.eos_token_id, "context_length": _context_length(moe)})


def _context_length(moe: MoeModel) -> int | None:
    """Return how many positions the model takes; dynamic rotary embeddings stretch beyond them."""
    config = moe.config.get_text_config()
    length: int | None = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if length is not None and rotary.get("rope_type") == "dynamic":
        return int(length * float(rotary.get("factor", 1.0)))
    return length


def _check_inputs(graph: ir.Model, moe: MoeModel) -> None:
    known = re.compile(
        r"input_ids|attention_mask|position_ids|"
        r"past_key_values\.\d+\.(key|value|conv_state|recurrent_state)"
    )
    unknown = [v.name for v in graph.graph.inputs if not known.fullmatch(v.name or "")]
    if unknown:
        raise UnsupportedModelError(
            f"{moe.config.model_type} keeps more than keys, values and one state of each kind "
            f"({unknown[0]}), which the runtimes can't carry from call to call."
        )
