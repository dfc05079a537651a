"""What a bundle has besides the graph: configurations, tokenizer, plan."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from alloc_moe.compiler.workspace.files import explained
from alloc_moe.runtime.artifact.plan import MODEL_FILE, PLAN_FILE, SHARED_CACHE_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.runtime.artifact.plan import AllocationPlan

_KEYS = re.compile(r"past_key_values\.\d+\.key")
_CACHED = {
    "key": "key",
    "value": "value",
    "conv": "conv_state",
    "recurrent": "recurrent_state",
}  # what onnxruntime-genai calls it, and what our inputs are called by
_OS_ERROR = re.compile(r"(?P<reason>.+) \(os error (?P<code>\d+)\)")


def write_bundle_files(folder: Path, moe: MoeModel, graph: ir.Model, plan: AllocationPlan) -> None:
    """Write what a bundle has besides the graph: configurations, tokenizer, plan.

    Raises:
        OutputError: They can't be written.
    """
    genai = genai_config(moe, graph)
    write_model_files(folder, moe, moe.config)
    with explained("The bundle's files", folder):
        (folder / PLAN_FILE).write_text(plan.to_json() + "\n", "utf-8")
        (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", "utf-8")


def write_model_files(folder: Path, moe: MoeModel, config: PreTrainedConfig) -> None:
    """Write configurations and tokenizer as transformers reads them.

    Raises:
        OutputError: They can't be written.
    """
    with explained("The model's files", folder):
        folder.mkdir(exist_ok=True)
        config.save_pretrained(folder)
        moe.model.generation_config.save_pretrained(folder)
        with _os_errors():
            moe.checkpoint.tokenizer.save_pretrained(folder)


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
    cache = next(value.shape for name, value in inputs.items() if _KEYS.fullmatch(name or ""))
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
                **_layer_types(inputs, config.num_hidden_layers),
                "inputs": {**names, **_cache_names("past", "past_key_values", inputs)},
                "outputs": {"logits": "logits", **_cache_names("present", "present", inputs)},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": SHARED_CACHE_KEY in graph.metadata_props,
        },
    }


def _cache_names(side: str, prefix: str, inputs: Mapping[str | None, ir.Value]) -> dict[str, str]:
    """Return how the layers' parts of the cache are called that there are."""
    return {
        f"{side}_{kind}_names": f"{prefix}.%d.{name}"
        for kind, name in _CACHED.items()
        if any((given or "").endswith(f".{name}") for given in inputs)
    }


def _layer_types(inputs: Mapping[str | None, ir.Value], layers: int) -> dict[str, list[str]]:
    """Return the kind of each layer of a graph that has states besides keys and values."""

    def kind(layer: int) -> str:
        past = f"past_key_values.{layer}"
        if f"{past}.recurrent_state" in inputs:
            return "linear_attention"
        return "conv" if f"{past}.conv_state" in inputs else "full_attention"

    kinds = [kind(layer) for layer in range(layers)]
    return {} if set(kinds) == {"full_attention"} else {"layer_types": kinds}
