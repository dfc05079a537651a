"""What a bundle has besides the graph: configurations, tokenizer, plan."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from alloc_moe.compiler.workspace.files import explained
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE, SHARED_CACHE_KEY

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.artifact.plan import AllocationPlan

_OS_ERROR = re.compile(r"(?P<reason>.+) \(os error (?P<code>\d+)\)")


def write_bundle_files(folder: Path, moe: MoeModel, graph: ir.Model, plan: AllocationPlan) -> None:
    """Write what a bundle has besides the graph: configurations, tokenizer, plan.

    Raises:
        OutputError: They can't be written.
    """
    genai = genai_config(moe, graph)
    with explained("The bundle's files", folder):
        folder.mkdir(exist_ok=True)
        moe.config.save_pretrained(folder)
        moe.model.generation_config.save_pretrained(folder)
        with _os_errors():
            moe.checkpoint.tokenizer.save_pretrained(folder)
        (folder / PLAN_FILE).write_text(plan.to_json() + "\n", "utf-8")
        (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", "utf-8")


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Make OSErrors of the tokenizers library what they are: it knows only plain exceptions."""
    try:
        yield
    except Exception as error:
        match = _OS_ERROR.search(str(error)) if type(error) is Exception else None
        if match is None:
            raise
        raise OSError(int(match["code"]), match["reason"]) from error


def genai_config(moe: MoeModel, graph: ir.Model) -> dict[str, Any]:
    """Return the configuration with which onnxruntime-genai runs the graph.

    ``past_present_share_buffer`` is on if the graph appends to its cache in place.
    """
    config = moe.config.get_text_config()
    generation = moe.model.generation_config
    eos = moe.eos_token_id
    bos = generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = moe.checkpoint.tokenizer.pad_token_id
    inputs = {value.name: value for value in graph.graph.inputs}
    cache = inputs["past_key_values.0.key"].shape
    assert cache is not None
    names = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in inputs}
    heads = config.num_attention_heads
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": bos if bos is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else first_eos,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "hidden_size": config.hidden_size,
                "head_size": int(cache[3]) if isinstance(cache[3], int) else config.head_dim,
                "num_attention_heads": heads,
                "num_key_value_heads": int(cache[1]) if isinstance(cache[1], int) else heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **names,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": SHARED_CACHE_KEY in graph.metadata_props,
        },
    }
