"""Write an OLMoE of random weights for llama.cpp, quantised to Q4_0; needs the package gguf.

    python examples/benchmarks/speed/random_gguf.py -o olmoe-q4_0.gguf

The weights are drawn as Q4_0 blocks, tensor by tensor, so that memory stays small: a block of 32
has one float16 scale of random sign, as those of llama-quantize have, and 4 random bits each.
As in llama-quantize's files, norms and routers stay float32. Its Q4_0 files keep the output
matrix at 6 bits; here that has 4, as in the artifact it is compared with: the same bytes to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from random_models.shapes import SHAPES, Shape

_DEVIATION = 0.02  # of the weights
_BLOCK, _BLOCK_BYTES = 32, 18
_LEVELS_DEVIATION = 4.61  # of 0..15, evenly distributed


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and type (``norm``, ``router`` or ``q4_0``) of every tensor in order."""
    hidden, experts, size = shape.hidden, shape.experts, shape.expert_size
    yield "token_embd.weight", (shape.vocabulary, hidden), "q4_0"
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            yield f"{block}.{name}.weight", (hidden,), "norm"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}.{name}.weight", (hidden, hidden), "q4_0"
        yield f"{block}.ffn_gate_inp.weight", (experts, hidden), "router"
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            yield f"{block}.{name}.weight", (experts, size, hidden), "q4_0"
        yield f"{block}.ffn_down_exps.weight", (experts, hidden, size), "q4_0"
    yield "output_norm.weight", (hidden,), "norm"
    yield "output.weight", (shape.vocabulary, hidden), "q4_0"


def random_blocks(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return Q4_0 blocks of weights whose mean is 0, as bytes; the last axis holds the blocks."""
    *rows, columns = shape
    count = int(np.prod(shape)) // _BLOCK
    blocks = np.frombuffer(bytearray(random.bytes(count * _BLOCK_BYTES)), np.uint8)
    blocks = blocks.reshape(count, _BLOCK_BYTES)
    scales = np.full(count, _DEVIATION / _LEVELS_DEVIATION, np.float16)
    scales[random.integers(0, 2, count, dtype=np.int8) == 1] *= -1
    blocks[:, :2] = scales.view(np.uint8).reshape(count, 2)
    return blocks.reshape(*rows, columns // _BLOCK * _BLOCK_BYTES)


def write_gguf(path: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write the model; half a file is left if that fails."""
    import gguf

    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_per_token)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.vocabulary)
    for name, size, kind in tensors(shape):
        if kind == "q4_0":
            size = (*size[:-1], size[-1] // _BLOCK * _BLOCK_BYTES)
        dtype, raw = (
            (np.uint8, gguf.GGMLQuantizationType.Q4_0)
            if kind == "q4_0"
            else (np.float32, gguf.GGMLQuantizationType.F32)
        )
        nbytes = int(np.prod(size)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, size, np.dtype(dtype), nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for _, size, kind in tensors(shape):
        writer.write_tensor_data(_data(random, size, kind))
    writer.close()


def _data(
    random: np.random.Generator, shape: tuple[int, ...], kind: str
) -> NDArray[np.uint8] | NDArray[np.float32]:
    if kind == "q4_0":
        return random_blocks(random, shape)
    if kind == "norm":
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(_DEVIATION)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="olmoe-1b-7b", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, shape: str, seed: int) -> None:
    """Write a random model as GGUF."""
    write_gguf(output, SHAPES[shape], seed=seed)
    print(f"{output}: {output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
