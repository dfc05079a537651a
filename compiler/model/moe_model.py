"""MoeModel: a checkpoint as it runs in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from alloc_moe.compiler.workspace.results import NamedResults, SavedResults

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from alloc_moe.compiler.model.checkpoint import Checkpoint
    from alloc_moe.compiler.model.offloading import Offloading
    from alloc_moe.compiler.records import MoeLayer, Quantization


@dataclass(frozen=True)
class MoeModel:
    """A model that runs: ``model`` is in eval mode, float32 on the CPU.

    With ``offloading`` the weights of its decoder layers are in memory only while these run. With
    a ``quantization`` its weights are rounded as that says; those that the checkpoint's reader
    reads are not. ``chosen`` has the packed values and scales of those, by name, that aren't just
    rounded to the nearest. ``results`` keeps what took long to compute, if anything does.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    quantization: Quantization | None = None
    offloading: Offloading | None = None
    results: SavedResults = field(default_factory=SavedResults)
    chosen: NamedResults | None = None

    @property
    def layers(self) -> tuple[MoeLayer, ...]:
        """The MoE layers, in the order in which tokens pass them."""
        return self.checkpoint.layers

    @property
    def config(self) -> PreTrainedConfig:
        """The checkpoint's configuration."""
        return self.checkpoint.config

    @property
    def fingerprint(self) -> str:
        """A hash of configuration and weights, and what the weights are rounded to."""
        marks = self.quantization.marks if self.quantization else ()
        return ":".join((self.checkpoint.fingerprint, *marks))

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a text, as the generation configuration says, or the model's own."""
        generation = self.model.generation_config.eos_token_id
        return generation if generation is not None else self.config.get_text_config().eos_token_id  # type: ignore[no-any-return]
