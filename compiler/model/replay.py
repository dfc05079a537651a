"""Part of a model at a time: run some of its decoder layers, or its head, on hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from alloc_moe.compiler.model.layer_weights import is_offloaded, resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alloc_moe.compiler.records import MoeLayer


class DecoderStack:
    """A causal language model cut at its decoder layers, whatever its architecture.

    The model's own forward runs each time, so that masks and rotary embeddings are its own; only
    decoder layers outside the wanted range hand their input through. "Hidden states at i" are what
    enters decoder layer i, or leaves the last one.
    """

    def __init__(self, model: PreTrainedModel, layer: MoeLayer) -> None:
        """Cut `model` at the list of decoder layers that holds `layer`."""
        self._model = model
        self._layers = find_decoder_layers(model, layer)
        self._outputs: int | None = None  # how many a decoder layer returns; None if a bare tensor
        # Its auxiliary loss would ask for the router logits of layers that don't run.
        routers = getattr(model.config, "output_router_logits", False)
        self._options = {"use_cache": False} | ({"output_router_logits": False} if routers else {})

    def __len__(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def __getitem__(self, index: int) -> torch.nn.Module:
        """A decoder layer."""
        return self._layers[index]

    @property
    def offloaded(self) -> bool:
        """Whether the layers' weights are read each time that they run, unless held."""
        return is_offloaded(self._layers[0])

    def resident(self, index: int) -> AbstractContextManager[None]:
        """Hold the weights of a decoder layer in memory while the block lasts."""
        return resident(self._layers[index])

    def stream(
        self,
        inputs: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the hidden states at `stop` of each of the inputs, which are those of `run`.

        With offloaded layers all inputs go through one layer before the next is read; their states
        are then in memory together, else those of one.
        """
        stop = len(self) if stop is None else stop
        if not self.offloaded:
            for ids, hidden in inputs:
                yield self.run(ids, hidden, start=start, stop=stop)
            return
        batches = [list(pair) for pair in inputs]
        for layer in range(start, max(stop, start + 1)):
            end = min(layer + 1, stop)
            with self.resident(layer) if end > layer else nullcontext():
                for batch in batches:
                    batch[1] = self.run(batch[0], batch[1], start=layer, stop=end)  # type: ignore[arg-type]
        for _, hidden in batches:
            assert hidden is not None
            yield hidden

    def run(
        self,
        ids: torch.Tensor,
        hidden: torch.Tensor | None,
        *,
        start: int,
        stop: int,
        context: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states at `stop` [batch, sequence, hidden] from those at `start`.

        Args:
            ids: Token ids [batch, sequence]; no padding, unless `context` has a mask.
            hidden: [batch, sequence, hidden]; None starts from the embeddings, with `start` 0.
            start: The first decoder layer to run.
            stop: The first not to run.
            context: What else the model's forward is given: mask, positions, cache.
        """
        if hidden is not None and start == stop:
            return hidden
        last = len(self) - 1

        def forward(layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if layer == stop:
                raise _Reached(_first(args, kwargs))
            if layer < start:
                return self._as_output(_first(args, kwargs))
            if layer == start and hidden is not None:
                args, kwargs = _with_first(hidden, args, kwargs)
            output = original(*args, **kwargs)
            if isinstance(output, tuple):
                self._outputs = len(output)
            if layer == last:
                raise _Reached(output[0] if isinstance(output, tuple) else output)
            return output

        try:
            with self._replaced(forward):
                self._model(input_ids=ids, **{**self._options, **(context or {})})
        except _Reached as reached:
            return reached.hidden
        raise RuntimeError(f"The model's forward did not call decoder layer {min(stop, last)}.")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [positions, vocabulary] of [positions, hidden] states at the end.

        Call `run` first: it finds out what decoder layers return.
        """

        def forward(layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._as_output(hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._replaced(forward):
            logits: torch.Tensor = self._model(input_ids=ids, **self._options).logits
        return logits[0].float()

    def _as_output(self, hidden: torch.Tensor) -> Any:
        """Give hidden states the structure that decoder layers return."""
        return hidden if self._outputs is None else (hidden, *[None] * (self._outputs - 1))

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Let ``forward(index, original, ...)`` stand for each decoder layer's forward."""
        own = [vars(layer).get("forward") for layer in self._layers]
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = functools.partial(forward, index, layer.forward)
            yield
        finally:
            for layer, previous in zip(self._layers, own, strict=True):
                if previous is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = previous


class _Reached(Exception):  # noqa: N818, it is no error but the way out of the model's forward
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def find_decoder_layers(model: PreTrainedModel, layer: MoeLayer) -> torch.nn.ModuleList:
    """Return the list of decoder layers one of which holds the MoE layer."""
    parts = layer.experts_name.split(".")
    for depth, part in enumerate(parts):
        module = model.get_submodule(".".join(parts[:depth]))
        if part == str(layer.decoder_layer) and isinstance(module, torch.nn.ModuleList):
            return module
    raise ValueError(f"{layer.experts_name} is in no list of layers.")


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_first(
    hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
