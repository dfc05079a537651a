"""The peer: the same model in transformers, compiled with a static cache by PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from artifacts import Sizes

_WARM, _RUNS = 8, 7


class Peer:
    """A model of random weights in PyTorch, with as many experts per token as wanted."""

    def __init__(self, description: dict[str, Any], device: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch, self.device = torch, device
        config = AutoConfig.for_model(**description["settings"])
        self._k = description["layers"][0]["k"]
        torch.manual_seed(0)
        dtype = torch.float16 if device == "cuda" else torch.float32
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.vocabulary = config.vocab_size

    def set_fraction(self, fraction: float) -> int:
        """Have every router choose that fraction of its experts; return how many."""
        k = max(int(self._k * fraction), 1)
        changed = 0
        for module in self.model.modules():
            for name in ("top_k", "num_experts_per_tok"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, k)
                    changed += 1
        self.model.config.num_experts_per_tok = k
        if not changed:
            raise RuntimeError("No router of this model says how many experts it chooses.")
        return k

    def decode_seconds(self, sizes: Sizes, *, compiled: bool = True) -> float:
        """Return the median seconds of a step, until its best token is in host memory."""
        torch = self.torch
        from transformers import StaticCache

        self._use("batched_mm")
        torch._dynamo.reset()
        past = sizes.past
        columns = past + _WARM + sizes.steps
        with torch.inference_mode():
            cache = StaticCache(config=self.model.config, max_cache_len=columns)
            where = torch.arange(past, device=self.device)
            prompt = self._tokens(past)
            self.model(prompt, past_key_values=cache, use_cache=True, cache_position=where)
            run: Any = self.model.forward
            if compiled:
                run = torch.compile(run, mode="reduce-overhead", fullgraph=False)
            token = self._tokens(1)
            position = torch.tensor([past], device=self.device)

            def step() -> None:
                output = run(token, past_key_values=cache, use_cache=True, cache_position=position)
                token.copy_(output.logits[:, -1:].argmax(-1))
                token.cpu()
                position.add_(1)

            return _median(step, _WARM, sizes.steps)

    def prefill_seconds(self, sizes: Sizes) -> float:
        """Return the median seconds of a prompt, with the logits of its last position."""
        self._use("grouped_mm")
        prompt = self._tokens(sizes.prompt)
        with self.torch.inference_mode():
            return _median(
                lambda: self.model(prompt, logits_to_keep=1, use_cache=True).logits.cpu(), 2, _RUNS
            )

    def _tokens(self, columns: int) -> Any:
        shape = (1, columns)
        return self.torch.randint(3, self.vocabulary, shape, device=self.device)

    def _use(self, experts: str) -> None:
        if self.device == "cuda":
            self.model.set_experts_implementation(experts)


def _median(call: Callable[[], object], warm: int, runs: int) -> float:
    seconds = []
    for _ in range(warm + runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm:])
