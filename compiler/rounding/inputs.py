"""What enters linear layers and experts on a text: as trained, and with what is rounded so far."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.experts import library_experts, replaced_experts

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel

_TOKENS_PER_BATCH = 4096
_TOKENS_AT_HEAD = 512  # whose logits are in memory together


class LayerInputs:
    """A model cut before one of its decoder layers, and the states that enter there.

    There are two of each: those of the trained model, and those that the rounded weights of the
    layers before leave.

    Args:
        moe: The model. The weights of the layer that the states enter are the trained ones until
            `as_trained` was called; then they may be rounded.
        ids: The text [windows, sequence].
    """

    def __init__(self, moe: MoeModel, ids: torch.Tensor) -> None:
        self._moe = moe
        self._stack = DecoderStack(moe.model, moe.layers[0])
        self._experts = {layer.experts_name for layer in moe.layers}
        self._batches = torch.split(ids, max(1, _TOKENS_PER_BATCH // ids.shape[1]))
        self._states: list[torch.Tensor | None] = [None] * len(self._batches)
        self._trained = self._states
        self._next: list[torch.Tensor | None] = []  # the trained model's, after the layer
        self._at = 0

    @property
    def layer(self) -> int:
        """The decoder layer that the states enter; their number at the end."""
        return self._at

    def advance(self) -> None:
        """Move all states past the layer, which is rounded now."""
        self._states = [self._run(ids, hidden) for ids, hidden in self._pairs()]
        self._trained = self._next
        self._at += 1
        self._keep()

    def resume(self) -> None:
        """Go on from the states that an earlier run kept, if it did."""
        for layer in range(len(self._stack), 0, -1):
            if (found := self._moe.results.find(self._inputs(layer))) is not None:
                count = len(self._batches)
                self._states, self._trained = list(found[:count]), list(found[count:])
                self._at = layer
                return

    def as_trained(self, modules: Collection[str]) -> dict[str, list[torch.Tensor]]:
        """Return by name the first input of modules of the layer, batch by batch."""
        found: dict[str, list[torch.Tensor]] = {module: [] for module in modules}
        after: list[torch.Tensor | None] = []
        with self._noted(modules) as calls:
            for ids, hidden in zip(self._batches, self._trained, strict=True):
                after.append(self._run(ids, hidden))
                for module, inputs in found.items():
                    inputs.append(calls.pop(module))
        self._next = after
        return found

    def together(self, modules: Collection[str]) -> list[list[str]]:
        """Return modules of the layer as they run, those of one input together.

        Those that don't run are left out.
        """
        with self._noted(modules) as calls:
            ids, hidden = next(self._pairs())
            self._run(ids[:1], None if hidden is None else hidden[:1])

        def place(call: tuple[str, torch.Tensor]) -> tuple[bool, int]:
            return call[0] in self._experts, call[1].data_ptr()

        return [[name for name, _ in same] for _, same in itertools.groupby(calls.items(), place)]

    def entering(self, module: str) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield what a module of the layer is given, batch by batch.

        Of a linear layer that is its input [..., columns], of experts hidden states [T, H], experts
        [T, K] and weights [T, K]. What would run after it doesn't.
        """
        for ids, hidden in self._pairs():
            yield self._caught(module, functools.partial(self._run, ids, hidden))

    def entering_head(self, head: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield what the module `head` is given, and was as trained [T, C], some tokens at a time.

        Third are the model's logits as trained [T, V]. The states must be at the end.
        """
        # The cut model learns from a run what its layers return.
        self._stack.run(self._batches[0][:1], None, start=0, stop=1)
        for states in zip(self._states, self._trained, strict=True):
            pieces = (torch.split(_tokens(each), _TOKENS_AT_HEAD) for each in states)
            for now, before in zip(*pieces, strict=True):
                rounded, *_ = self._caught(head, functools.partial(self._stack.head, now))
                with self._noted([head]) as calls:
                    logits = self._stack.head(before)
                yield rounded.flatten(0, -2), calls[head].flatten(0, -2), logits

    def _run(self, ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        return self._stack.run(ids, hidden, start=self._at, stop=self._at + 1)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        return zip(self._batches, self._states, strict=True)

    def _inputs(self, layer: int) -> list[object]:
        return ["entering", self._moe.fingerprint, layer]

    def _keep(self) -> None:
        pairs = (*self._states, *self._trained)
        states = [state for state in pairs if state is not None]
        self._moe.results.keep(self._inputs(self._at), states)
        self._moe.results.forget(self._inputs(self._at - 1))

    def _caught(self, module: str, run: Callable[[], Any]) -> tuple[torch.Tensor, ...]:
        """Return what a module is given in a run, which ends there."""

        def stop(given: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(given)

        try:
            with self._watched(module, stop):
                run()
        except _Reached as reached:
            return reached.given
        raise RuntimeError(f"The model's forward did not call {module}.")

    @contextlib.contextmanager
    def _noted(self, modules: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what grows by the first input of each module while the block lasts."""
        calls: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for module in modules:
                note = functools.partial(_note_first, calls, module)
                stack.enter_context(self._watched(module, note))
            yield calls

    @contextlib.contextmanager
    def _watched(
        self, name: str, note: Callable[[tuple[torch.Tensor, ...]], object]
    ) -> Iterator[None]:
        """Let `note` be called with what a module is given while the block lasts."""
        if name in self._experts:

            def call(experts: torch.nn.Module, *given: torch.Tensor) -> torch.Tensor:
                note(given)
                return library_experts(experts, *given)

            with replaced_experts(self._moe.model, {name: call}):
                yield
            return

        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            note(given)

        handle = self._moe.model.get_submodule(name).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _tokens(states: torch.Tensor | None) -> torch.Tensor:
    assert states is not None
    return states.flatten(0, 1)


def _note_first(
    calls: dict[str, torch.Tensor], module: str, given: tuple[torch.Tensor, ...]
) -> None:
    calls.setdefault(module, given[0])


class _Reached(Exception):  # noqa: N818, it is no error but the way out of the model's forward
    def __init__(self, given: tuple[torch.Tensor, ...]) -> None:
        self.given = given
