"""A GGUF file in llama.cpp as a contender; see protocol.py. Run by peers.py.

    pip install llama-cpp-python gguf

builds llama.cpp for the processor at hand; its settings here are its defaults but for the threads:
weights repacked at load for the processor's widest instructions, cache in float16, prompts in
pieces of 512. Each budget is a model of its own, since it is a load-time setting: experts used by
every token in every layer, rounded to whole ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from contenders import protocol

_CONTEXT, _BATCH = 1024, 512


class LlamaCpp:
    """A model in llama.cpp, once per budget."""

    def __init__(self, path: str, *, threads: int, flash_attention: int, mapped: bool) -> None:
        self._path = path
        self._threads = threads
        self._flash_attention = flash_attention
        self._mapped = mapped
        reader = gguf.GGUFReader(path)
        self._trained = int(reader.fields["olmoe.expert_used_count"].contents())
        self._experts = int(reader.fields["olmoe.expert_count"].contents())
        self.vocabulary = int(reader.fields["olmoe.vocab_size"].contents())
        self._bytes = {str(tensor.name): int(tensor.n_bytes) for tensor in reader.tensors}
        self._contexts: dict[int, Any] = {}  # ctypes pointers
        llama_cpp.llama_backend_init()
        self.set_budget(1.0)

    def set_budget(self, budget: float) -> None:
        """Use the model with that many experts, loading it if it is not there yet."""
        self._used = max(1, round(budget * self._trained))
        if self._used not in self._contexts:
            self._contexts[self._used] = self._load(self._used)
        self._context = self._contexts[self._used]

    def reset(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def forward(self, ids: NDArray[np.int64]) -> None:
        """Evaluate tokens; only the last one's logits are computed."""
        for start in range(0, len(ids), _BATCH):
            piece = ids[start : start + _BATCH].tolist()
            tokens = (llama_cpp.llama_token * len(piece))(*piece)
            batch = llama_cpp.llama_batch_get_one(tokens, len(piece))
            if code := llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
        llama_cpp.llama_get_logits_ith(self._context, -1)  # waits until they are there

    def seconds(self, workload: str, measure: Callable[[], float]) -> float:
        """Return the time; there is nothing to choose."""
        return measure()

    def activations(self) -> float:
        """Return the experts used per token and layer."""
        return self._used

    def active_bytes(self) -> float:
        """Return the bytes of the experts used and of everything else but the embeddings."""
        sizes = self._bytes.items()
        experts = sum(size for name, size in sizes if "_exps" in name)
        others = sum(
            size for name, size in sizes if "_exps" not in name and "token_embd" not in name
        )
        return others + experts * self._used / self._experts

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the last token."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy()

    def _load(self, used: int) -> Any:  # a ctypes pointer
        overrides = (llama_cpp.llama_model_kv_override * 2)()  # the last one, empty, ends them
        overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].key = b"olmoe.expert_used_count"
        overrides[0].value.val_i64 = used
        model_options = llama_cpp.llama_model_default_params()
        model_options.kv_overrides = overrides
        if not self._mapped:
            model_options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        model = llama_cpp.llama_model_load_from_file(self._path.encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT, _BATCH, _BATCH
        options.n_threads = options.n_threads_batch = self._threads
        options.flash_attn_type = self._flash_attention
        context = llama_cpp.llama_init_from_model(model, options) if model else None
        if not context:
            raise RuntimeError(f"llama.cpp can't load {self._path}; see its messages")
        return context


_DISCARD = llama_cpp.llama_log_callback(lambda level, text, data: None)


def main() -> None:
    """Serve a GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attention", type=int, default=-1, help="-1 auto, 0 off, 1 on")
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="llama.cpp's log on stderr")
    options = parser.parse_args()
    if not options.verbose:
        llama_cpp.llama_log_set(_DISCARD, None)
    system = llama_cpp.llama_print_system_info().decode().strip(" |")
    protocol.serve(
        lambda: LlamaCpp(
            options.gguf,
            threads=options.threads,
            flash_attention=options.flash_attention,
            mapped=not options.no_mmap,
        ),
        f"llama.cpp, llama-cpp-python {llama_cpp.__version__}, {system}",
    )
